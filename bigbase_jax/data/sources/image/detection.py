"""Pictures with boxes, in any of the usual formats.

``root`` is a folder or an archive (zip, tar) of pictures and their annotations: Pascal VOC's XML, COCO's JSON, YOLO's
text files or a table, told apart by what is there (``box_formats``). An annotation's picture is the one of its name,
wherever it is. The splits are, in this order: what annotations say (a column ``split``, ``instances_val2017.json``);
lists ``train.txt``, ``val.txt`` and ``test.txt`` (``ImageSets/Main``); folders named after splits; else they are
seeded, by picture.

Legend: N boxes of a picture.
"""

from __future__ import annotations

import dataclasses
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Codec, Example, Source, UserError
from bigbase_jax.data.files import (
    LIMITS,
    TABLES,
    File,
    Limits,
    existing,
    files_of,
    is_archive,
    kind_of,
    limits_of,
    named_after,
    refuse_permission,
)
from bigbase_jax.data.rows import lines_of
from bigbase_jax.data.sources.image import box_formats
from bigbase_jax.data.sources.image.box_formats import Annotated
from bigbase_jax.data.sources.image.image import SUFFIXES, PictureCodec, moved_upright, oriented
from bigbase_jax.data.sources.splits import digest, split_off
from bigbase_jax.models.boxes import CONVENTIONS

_SPLITS = ("train", "val", "test")
_PLACES = {"annotations", "labels", "jpegimages", "images", "imgs", "pictures", "photos"}


@dataclasses.dataclass(frozen=True)
class _Picture:
    """A picture and what is on it: boxes f64[N,4] as ``Annotated`` has them, repaired, and classes i32[N]."""

    file: File
    about: Annotated
    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray


class Boxes:
    """The ``Source`` of one split."""

    def __init__(self, pictures: Sequence[_Picture], limits: Limits):
        self._pictures, self._limits = pictures, limits

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Example:
        """``image`` uint8 [H, W, 3], upright; ``boxes`` f32[N,4] xyxy in its pixels, ``classes`` i32[N] and ``crowd``
        f32[N] (1: to be ignored).

        Raises:
          UserError: a picture that does not decode, or that has another size than its annotation says.
        """
        picture = self._pictures[index]
        x_HWC, orientation = oriented(picture.file, None, self._limits)
        height, width = x_HWC.shape[:2]
        boxes_N4 = _upright(picture, orientation, height, width).clip(0, (width, height, width, height))
        real_N = (boxes_N4[:, 2:] > boxes_N4[:, :2]).all(1)
        return {
            "image": x_HWC,
            "boxes": boxes_N4[real_N].astype(np.float32),
            "classes": picture.classes[real_N],
            "crowd": picture.crowd[real_N].astype(np.float32),
        }

    def name(self, index: int) -> str:
        """The picture's path below the root."""
        return self._pictures[index].file.name


def _upright(picture: _Picture, orientation: int, height: int, width: int) -> np.ndarray:
    """Boxes in pixels of the upright picture of this size."""
    about, boxes_N4 = picture.about, picture.boxes
    stored = (height, width) if orientation >= 5 else (width, height)
    on_stored = about.stored
    if about.size is not None and not about.relative:
        if about.size not in (stored, (width, height)):
            said = "x".join(f"{side:g}" for side in about.size)
            raise UserError(
                f"{about.where} says that {picture.file} has {said} pixels, and it has {width}x{height}; mend its size,"
                " or annotate it anew."
            )
        if stored != (width, height):
            on_stored = about.size == stored
    w, h = stored if on_stored else (width, height)
    boxes_N4 = boxes_N4 * (w, h, w, h) if about.relative else boxes_N4
    return moved_upright(boxes_N4, orientation, height, width) if on_stored else boxes_N4


class DetectionCodec(PictureCodec):
    """A user's picture for a detector: as ``PictureCodec`` reads it, and beside it ``original``, on which its answer is
    drawn, whatever the transforms make of ``image``."""

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        return [{**example, "original": example["image"]} for example in super().decode(given)]


class ReadsDetections:
    """The ``codec`` of data sets of pictures with boxes."""

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        return DetectionCodec(limits_of(config))


class DetectionFolder(ReadsDetections):
    """Pictures with boxes below a folder, or in an archive; see the module.

    Boxes are converted once to corners in pixels of the upright picture. Those with reversed corners are put right,
    those that reach beyond the picture are cut; those of no area, outside of the picture or with numbers that are none
    are left out, and so are classes that train has no box of. How many is told. A photo that EXIF rotates takes its
    boxes with it, where these lie on the stored pixels: the size in the annotation tells that; where it does not,
    those of VOC, COCO and tables with sizes do, and others do not. Crowds and difficult objects are kept as ``crowd``.

    Attributes:
      splits: see ``Boxes``.
      dataset_info: ``num_classes`` and ``class_names``: COCO's and YOLO's in their order, others by name.
      description: the format, pictures, boxes, classes, and what was mended.
    """

    def __init__(
        self,
        root: str,
        most_boxes: int = 100,
        convention: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        limits: Limits = LIMITS,
    ):
        """Reads all annotations, and lists the pictures; opens none of these.

        Args:
          root: the folder or archive.
          most_boxes: of a picture with more, the largest are taken.
          convention: of a table whose header does not say it: "xyxy", "xywh" or "cxcywh".
          val_fraction, test_fraction, seed: of splits that are not there, by picture.
          limits: of pictures, annotations and archives.

        Raises:
          UserError: no such folder, no pictures or boxes, or annotations that cannot be read.
        """
        if convention is not None and convention not in CONVENTIONS:
            raise UserError(f"there is no convention={convention}.{suggest(convention, CONVENTIONS, 'convention')}")
        if most_boxes < 1:
            raise UserError(f"most_boxes is {most_boxes}; it must be at least 1.")
        self._arguments = (most_boxes, convention)
        pictures, others = _listed(root, limits)
        others = [f if kind_of(f.name) in TABLES else f._replace(limits=limits.unasked) for f in others]
        read = box_formats.read(root, others, convention)
        told: Counter[str] = Counter()
        if read.kind != box_formats.TABLE:
            refuse_permission(limits, root)  # else the table says which pictures there are, whatever lists name
        found = _joined(root, pictures, read, told)
        lists = _lists(others, pictures)
        splits = {place: _split_of(about, pictures[place], lists) for place, about in found.items()}
        if lists and len(lists) > 1:
            told["pictures in no list"] = sum(not split for split in splits.values())
            found = {place: about for place, about in found.items() if splits[place]}
        if not all(splits[place] for place in found) or "train" not in splits.values():
            splits = dict.fromkeys(found, "train")
        train = [place for place in found if splits[place] == "train"]
        names = [pictures[place].name for place in train]
        flat = np.zeros(len(train), np.int32)
        for split, rows in split_off(set(splits.values()), names, flat, val_fraction, test_fraction, seed).items():
            splits |= {train[row]: split for row in rows}

        mended = {place: _mended(about, most_boxes, told) for place, about in found.items()}
        seen = {label for place, (_, labels, _) in mended.items() if splits[place] == "train" for label in labels}
        if not seen:
            raise UserError(f"{root}: no picture of the train split has a box; annotate some.")
        class_names = [name for name in read.names if name in seen] or sorted(seen)
        class_names += sorted(seen - set(class_names))
        number = {name: i for i, name in enumerate(class_names)}
        parts: dict[str, list[_Picture]] = {split: [] for split in _SPLITS}
        unseen: Counter[str] = Counter()
        for place in sorted(found, key=lambda place: pictures[place].name):
            boxes_N4, labels, crowd_N = mended[place]
            known = np.array([label in number for label in labels], bool)
            unseen.update(label for label in labels if label not in number)
            classes = np.array([number[label] for label in labels if label in number], np.int32)
            picture = _Picture(pictures[place], found[place], boxes_N4[known], classes, crowd_N[known])
            parts[splits[place]].append(picture)
        self.splits: Mapping[str, Source] = {s: Boxes(some, limits) for s, some in parts.items() if some}
        self._parts = parts
        self.dataset_info: Mapping[str, Any] = {"num_classes": len(class_names), "class_names": tuple(class_names)}
        told |= {f"boxes of the class {name!r}, which train lacks, left out": n for name, n in unseen.most_common(3)}
        count = sum(len(picture.boxes) for some in parts.values() for picture in some)
        empty = sum(not len(picture.boxes) for some in parts.values() for picture in some)
        notes = [f"{n:,} {what}" for what, n in told.items() if n]
        self.description = (
            f"{sum(map(len, parts.values())):,} pictures with {count:,} boxes of {len(class_names)} classes in {root},"
            f" as {read.kind} ({read.convention})"
        )
        self.description += f", {empty:,} without boxes" if empty else ""
        self.description += "; " + ", ".join(notes) if notes else ""

    def fingerprint(self) -> str:
        """A digest of the pictures' paths, sizes and times, of their boxes, and of the splits."""
        parts: list[object] = [self._arguments, self.dataset_info["class_names"]]
        for split, some in sorted(self._parts.items()):
            parts.append(split)
            for picture in some:
                about = picture.about
                parts += [picture.file.file_signature, about.size, about.relative, about.stored]
                parts += [picture.boxes, picture.classes, picture.crowd]
        return digest(parts)


def _listed(root: str, limits: Limits) -> tuple[list[File], list[File]]:
    """Pictures, and what may be annotations."""
    kinds = {*SUFFIXES, *TABLES, ".xml", ".txt", ".yaml", ".yml"}
    files = files_of(root if is_archive(root) else existing(root), kinds, limits)
    pictures = [file for file in files if kind_of(file.name) in SUFFIXES]
    if not pictures:
        raise UserError(f"{root} holds no pictures ({' '.join(sorted(SUFFIXES))}).")
    return sorted(pictures), sorted(file for file in files if kind_of(file.name) not in SUFFIXES)


def _key(name: str) -> str:
    """A path without suffix and without the folders that pictures and annotations are in by kind."""
    parts = posixpath.splitext(posixpath.normpath(name))[0].split("/")
    return "/".join(part for i, part in enumerate(parts) if i == len(parts) - 1 or part.casefold() not in _PLACES)


def _joined(root: str, pictures: Sequence[File], read: box_formats.Read, told: Counter[str]) -> dict[int, Annotated]:
    """The annotation of each picture, by its place among these."""
    by_name = {file.name: i for i, file in enumerate(pictures)}
    by_key: dict[str, list[int]] = {}
    by_stem: dict[str, list[int]] = {}
    for i, file in enumerate(pictures):
        by_key.setdefault(_key(file.name), []).append(i)
        by_stem.setdefault(posixpath.splitext(posixpath.basename(file.name))[0], []).append(i)
    found: dict[int, Annotated] = {}
    lost: list[str] = []
    for about in read.pictures:
        name = posixpath.normpath(about.picture)
        stem = posixpath.splitext(posixpath.basename(name))[0]
        if kind_of(name) not in SUFFIXES | {".xml", ".txt", ""}:
            stem = posixpath.basename(name)  # a dot in a name without suffix
        places = [by_name[name]] if name in by_name else by_key.get(_key(name)) or by_stem.get(stem, [])
        if len(places) > 1 and about.split:
            places = [i for i in places if _folder_split(pictures[i].name) in ("", about.split)] or places
        if len(places) > 1:
            both = " and ".join(pictures[i].name for i in places[:2])
            raise UserError(f"{about.where} may be of {both} in {root}; give pictures names of their own.")
        if not places:
            lost.append(about.picture)
        elif places[0] in found:
            raise UserError(f"{about.where} and {found[places[0]].where} are both of {pictures[places[0]].name}.")
        else:
            found[places[0]] = about
    if not found:
        raise UserError(
            f"none of the annotated pictures is in {root}, such as {lost[0]}." if lost else f"{root}: none."
        )
    if lost:
        told[f"annotated pictures that are not there (such as {lost[0]})"] = len(lost)
    rest = [i for i in range(len(pictures)) if i not in found]
    if read.unmarked:  # such as YOLO's, whose pictures without a file are background
        none = np.zeros((0, 4))
        found |= {i: Annotated(pictures[i].name, pictures[i].name, none, (), (), relative=True) for i in rest}
    elif rest:
        told["pictures without annotation left out"] = len(rest)
    return found


def _lists(files: Sequence[File], pictures: Sequence[File]) -> dict[str, str]:
    """The split of each picture that a list names, by its stem; those in ``ImageSets/Main`` go before others."""
    named: dict[str, File] = {}
    for file in sorted(files, key=lambda file: "ImageSets/Main/" not in file.name):
        stem = posixpath.splitext(posixpath.basename(file.name))[0]
        if kind_of(file.name) == ".txt" and (split := named_after(stem, whole=True)) and stem.casefold() != "trainval":
            named.setdefault(split, file)
    if "train" not in named:
        return {}
    stems = {posixpath.splitext(posixpath.basename(file.name))[0] for file in pictures}
    found: dict[str, str] = {}
    for split, file in named.items():
        for number, line in lines_of(file, "utf-8"):
            if not line.strip():
                continue
            name = posixpath.basename(line.strip().replace("\\", "/"))
            stem = name if name in stems else posixpath.splitext(name)[0]
            if found.setdefault(stem, split) != split:
                raise UserError(f"{file}, line {number}: {name} is in the list of {found[stem]} too; leave one.")
    return found if stems & found.keys() else {}


def _split_of(about: Annotated, picture: File, lists: Mapping[str, str]) -> str:
    stem = posixpath.splitext(posixpath.basename(picture.name))[0]
    return about.split or (lists.get(stem, "") if lists else _folder_split(picture.name))


def _folder_split(name: str) -> str:
    """The split that a folder of a path is named after; the innermost one's."""
    folders = posixpath.dirname(name).split("/")
    return next((split for folder in reversed(folders) if (split := named_after(folder, whole=True))), "")


def _mended(about: Annotated, most: int, told: Counter[str]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Boxes that can be learnt, their labels, and whether each is to be ignored; counts what was wrong."""
    boxes_N4, crowd_N = np.array(about.boxes), np.array(about.ignored, bool)
    finite_N = np.isfinite(boxes_N4).all(1)
    boxes_N4 = np.where(finite_N[:, None], boxes_N4, 0)
    reversed_N = finite_N & (boxes_N4[:, 2:] < boxes_N4[:, :2]).any(1)
    low, high = np.minimum(boxes_N4[:, :2], boxes_N4[:, 2:]), np.maximum(boxes_N4[:, :2], boxes_N4[:, 2:])
    flat_N = finite_N & (high <= low).any(1)
    outside_N = cut_N = np.zeros(len(boxes_N4), bool)
    if about.relative or about.size is not None:
        side = np.array((1.0, 1.0) if about.relative or about.size is None else about.size)
        inner_low, inner_high = low.clip(0, side), high.clip(0, side)
        outside_N = finite_N & ~flat_N & (inner_high <= inner_low).any(1)
        slack = 1e-6 if about.relative else 1e-3
        cut_N = finite_N & ~flat_N & ~outside_N & ((low < -slack) | (high > side + slack)).any(1)
        low, high = inner_low, inner_high
    told["boxes whose numbers are none left out"] += int((~finite_N).sum())
    told["boxes of no area left out"] += int(flat_N.sum())
    told["boxes outside of their picture left out"] += int(outside_N.sum())
    told["boxes with reversed corners put right"] += int((reversed_N & ~flat_N).sum())
    told["boxes cut at the border of their picture"] += int(cut_N.sum())
    kept = np.flatnonzero(finite_N & ~flat_N & ~outside_N)
    if len(kept) > most:
        told[f"pictures with more than {most} boxes, of which the largest stay (most_boxes={len(kept)} keeps all)"] += 1
        area = (high - low)[kept].prod(1)
        kept = np.sort(kept[np.argsort(-area, kind="stable")[:most]])
    told["crowds and difficult objects, which are ignored"] += int(crowd_N[kept].sum())
    return np.concatenate([low, high], 1)[kept], [about.labels[int(i)] for i in kept], crowd_N[kept]
