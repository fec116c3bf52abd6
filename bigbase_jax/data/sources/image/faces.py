"""Folders of people's photos, and the pairs of a published list: whose face it is, and whether two are of one person.

``DIR/PERSON/*`` as of Labeled Faces in the Wild (LFW; Huang et al. 2007) or of the ORL faces (Samaria & Harter 1994).

Legend: N photos, P pairs.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import Source, UserError
from bigbase_jax.data.files import LIMITS, Limits, existing, file_at, is_archive, one_sentence, open_file
from bigbase_jax.data.sources.folder import ClassFolders, Listed
from bigbase_jax.data.sources.image.image import SUFFIXES, Pictures, ReadsPictures
from bigbase_jax.data.sources.splits import digest, stratified

_FOLDS = 10
_LISTS = ("pairsDevTrain.txt", "pairsDevTest.txt", "pairs.txt")
_MOST = 1 << 24  # bytes of a list of pairs

Pair = tuple[str, str, str, str]
"""A person and the stem of a photo of theirs, twice."""


class People(Pictures):
    """The photos of a split.

    Attributes:
      pairs: i64[P,2], photos of this split, in an order that mixes both kinds; None: there is no list.
      same: bool[P], whether both are of one person.
    """

    pairs: np.ndarray | None = None
    same: np.ndarray | None = None


class Faces(ReadsPictures):
    """Photos by person.

    By ``split="people"``, a person is in one split only, so that val and test are of people whom training has not seen:
    their labels are numbered behind those of the training. Where the folder has a list of pairs in LFW's format, people
    whom a pair joins stay together, so that no pair is lost; ten folds with about as many pairs are dealt, the last
    ones are test, those before them val, and people in no pair are trained on. By ``split="photos"``, everybody is in
    all splits, with photos of their own.

    Attributes:
      splits: ``image`` uint8 [H, W, 3] and ``label`` i32[] each; ``People``.
      dataset_info: ``num_classes`` and ``class_names``: the people that are trained on.
      description: photos, people and pairs, and what was left out.
    """

    def __init__(
        self,
        root: str,
        split: str = "people",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        least: int = 2,
        seed: int = 0,
        limits: Limits = LIMITS,
    ):
        """Lists the files; opens none but the pairs.

        Args:
          root: a folder with one folder of photos for each person, or an archive of one. Its list of pairs, which is
            called as LFW's, lies in it or beside it.
          split: "people" or "photos".
          val_fraction, test_fraction: shares of the people, of the folds of pairs, or of each person's photos.
          least: who has fewer photos is not trained on where ``split`` is "people".
          seed: of the splits.
          limits: of a picture and of archives.

        Raises:
          UserError: no people, nobody left to train on, or a list that is none, or that names nobody who is there.
        """
        if split not in ("people", "photos"):
            raise UserError(f'split is {split!r}; it is "people" (nobody in two splits) or "photos".')
        fractions = (val_fraction, test_fraction) if split == "photos" else (0.0, 0.0)
        listed = ClassFolders(root, SUFFIXES, "photos", *fractions, seed, limits)
        files, names, said = listed.files, listed.names, ""
        listing = None if is_archive(root) else _listing(existing(root))
        pairs: list[Pair] = []
        if split == "people":
            if len(files) > 1:
                raise UserError(f"{root} has folders of splits; put all people into one, or use split=photos.")
            if listing:
                pairs = list(_read(listing, limits))
            of = _dealt(names, pairs, {"test": test_fraction, "val": val_fraction}, seed, listing or root)
            files, names, said = _by_person(files["train"], names, of, least, root)
        self._files, self._names, self._pairs = files, names, pairs
        self.splits: Mapping[str, Source] = {}
        found = 0
        for name in ("train", "val", "test"):
            if not files.get(name):
                continue
            labels = np.array([file.label for file in files[name]], np.int32)
            people = People(listed.folder, [f.name for f in files[name]], labels, None, limits, listed.members)
            if pairs and name != "train":
                people.pairs, people.same = _indices(files[name], pairs, seed)
                found += len(people.same)
            self.splits = {**self.splits, name: people}
        if pairs and not found:
            raise UserError(f"of the pairs in {listing}, none has both photos in {root} outside of the training.")
        self.dataset_info: Mapping[str, Any] = {
            "num_classes": len({file.label for file in files["train"]}),
            "class_names": tuple(names),
        }
        of_pairs = f"; {found:,} pairs in val and test of {len(pairs):,}" if pairs else ""
        self.description = f"{listed.description.replace(' classes ', ' people ')}{said}{of_pairs}"

    def fingerprint(self) -> str:
        """A digest of each split's paths, sizes and modification times, and of the pairs."""
        files = {split: [tuple(file) for file in listed] for split, listed in self._files.items()}
        return digest([self._names, self._pairs, *sorted(files.items())])


def _listing(folder: str) -> str | None:
    """The path of a list of pairs in a folder, or beside it."""
    places = [os.path.join(where, name) for where in (folder, os.path.join(folder, os.pardir)) for name in _LISTS]
    return next((path for path in places if os.path.isfile(path)), None)


def _read(path: str, limits: Limits) -> Iterator[Pair]:
    """The pairs of a list: of one person ``NAME i j``, of two ``NAME i NAME j``, tabs between; numbers are counts.

    Raises:
      UserError: it is no such list.
    """
    file = file_at(path, path, limits)
    if file.size > _MOST:
        raise UserError(f"{path} has {file.size:,} bytes; a list of pairs has {_MOST:,} at most.")
    with one_sentence(file, "utf-8"), open_file(file) as opened:
        lines = opened.read(_MOST).decode("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        parts = line.strip().split("\t")
        if not line.strip() or (number == 1 and all(part.isdecimal() for part in parts)):
            continue
        if len(parts) == 3:
            parts = [parts[0], parts[1], parts[0], parts[2]]
        if len(parts) != 4 or not (parts[1].isdecimal() and parts[3].isdecimal()):
            raise UserError(f"{path}, line {number}, is no pair: NAME, i, j or NAME, i, NAME, j, with tabs between.")
        first, i, second, j = parts
        yield first, f"{first}_{int(i):04d}", second, f"{second}_{int(j):04d}"


def _dealt(
    names: Sequence[str], pairs: Sequence[Pair], fractions: Mapping[str, float], seed: int, where: str
) -> dict[str, str]:
    """The split of each person."""
    of = dict.fromkeys(names, "train")
    if not pairs:
        for split, chosen in stratified(names, np.zeros(len(names)), fractions, seed).items():
            of |= {names[i]: split for i in chosen}
        return of
    joined = {name: name for pair in pairs for name in (pair[0], pair[2]) if name in of}
    if not joined:
        raise UserError(f"{where} names nobody who has a folder, such as {pairs[0][0]!r}.")

    def first(name: str) -> str:
        while joined[name] != name:
            joined[name] = name = joined[joined[name]]
        return name

    for one, _, other, _ in pairs:
        if one in of and other in of:
            joined[first(one)] = first(other)
    count = collections.Counter(first(pair[0]) for pair in pairs if pair[0] in of and pair[2] in of)
    groups = sorted({first(name) for name in joined})
    sizes, fold_of = [0] * _FOLDS, dict[str, int]()
    for i in np.random.default_rng(seed).permutation(len(groups)):
        fold_of[groups[i]] = fold = int(np.argmin(sizes))
        sizes[fold] += count[groups[i]]
    splits = ["train"] * _FOLDS
    for split in reversed(list(fractions)):  # val, and behind it test
        splits = [*splits[round(_FOLDS * fractions[split]) :], *[split] * round(_FOLDS * fractions[split])]
    of |= {name: splits[fold_of[first(name)]] for name in joined}
    return of


def _by_person(
    files: Sequence[Listed], names: Sequence[str], of: Mapping[str, str], least: int, where: str
) -> tuple[dict[str, list[Listed]], list[str], str]:
    """Files by split with the labels of these, who is trained on, and what is said of the others."""
    count = collections.Counter(file.label for file in files)
    trained = [i for i, name in enumerate(names) if of[name] == "train" and count[i] >= least]
    few = sum(of[name] == "train" for name in names) - len(trained)
    if len(trained) < 2:
        raise UserError(
            f"{where} has {len(trained)} people with {least} photos or more to train on; two are the least: "
            "add photos or lower least."
        )
    order = [*trained, *(i for i, name in enumerate(names) if of[name] != "train")]
    number = {i: n for n, i in enumerate(order)}
    split: dict[str, list[Listed]] = {}
    for file in files:
        if file.label in number:
            split.setdefault(of[names[file.label]], []).append(file._replace(label=number[file.label]))
    said = f"; {few:,} with fewer than {least} photos are not trained on" if few else ""
    return split, [names[i] for i in trained], said


def _indices(files: Sequence[Listed], pairs: Sequence[Pair], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs whose photos are both among the files, mixed."""
    at = {
        (file.name.split("/")[-2], os.path.splitext(os.path.basename(file.name))[0]): i for i, file in enumerate(files)
    }
    found = [(at[p[:2]], at[p[2:]], p[0] == p[2]) for p in pairs if p[:2] in at and p[2:] in at]
    order = np.random.default_rng(seed).permutation(len(found))
    array = np.array(found, np.int64).reshape(-1, 3)[order]
    return array[:, :2], array[:, 2] > 0
