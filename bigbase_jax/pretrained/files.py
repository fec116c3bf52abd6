"""Folders of published models: ``config.json`` and safetensors files, mapped into memory and written tensor by tensor.

A safetensors file is the length of its header (u64, little endian), the header (JSON: name -> dtype, shape and offsets
into what follows) and the tensors, row by row. So a tensor here is a view of the file, and nothing of it is read before
somebody takes a slice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from bigbase_jax.core import UserError, some
from bigbase_jax.runtime import whole
from bigbase_jax.runtime.limits import MOST_HEADER, MOST_UNPACKED, limit, too_much
from bigbase_jax.runtime.untrusted import open_regular, parse_json, read_object

CONFIG = "config.json"
SINGLE = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
)
"""What a tokenizer may be kept in."""
DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "BOOL": np.bool_,
}
STORED = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """
    Raises:
      UserError: the file is missing or broken; see ``untrusted.read_object``.
    """
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}.") from error


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Name -> tensor of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` names; views.

    Raises:
      UserError: there are none, one is missing, cut short or broken, or the weights are in another format.
    """
    if (folder / SINGLE).exists():
        return read_safetensors(folder / SINGLE)
    if not (folder / INDEX).exists():
        torch = [name for name in _TORCH if (folder / name).is_file()]
        if torch:
            raise UserError(
                f"{folder} has {torch[0]}, which only torch reads; convert it once, where transformers is installed: "
                "AutoModel.from_pretrained(DIR).save_pretrained(DIR), with the class that the model has."
            )
        raise UserError(f"{folder} has no {SINGLE} or {INDEX}.")
    place = read_json(folder / INDEX).get("weight_map")
    if not isinstance(place, dict) or not place or not all(isinstance(name, str) for name in place.values()):
        raise UserError(f"{folder / INDEX} has no weight_map, which tells the file of each tensor.")
    found: dict[str, np.ndarray] = {}
    twice: set[str] = set()
    for name in sorted(set(place.values())):
        if os.path.basename(name) != name or not (folder / name).exists():
            raise UserError(f"{folder} lacks {name}, which its {INDEX} names.")
        tensors = read_safetensors(folder / name)
        twice |= set(tensors) & set(found)
        found.update(tensors)
    absent = sorted(set(place) - set(found))
    if absent:
        raise UserError(f"{folder / INDEX} names tensors that its files do not have: {some(absent)}.")
    if twice:
        raise UserError(f"{folder / INDEX} names files that hold the same tensors: {some(sorted(twice))}.")
    return found


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Name -> tensor of one file, read-only views of it.

    Raises:
      UserError: it is cut short, is not such a file, or its header does not tell each byte of it once.
    """
    broken = f"{path} is damaged or was not copied whole"
    try:
        with open_regular(path, path.parent) as file:
            data = np.memmap(file, np.uint8, "r")
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise UserError(f"{broken} ({error}).") from error
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or start > len(data):
        raise UserError(f"{broken}: it ends within its header.")
    if start > limit(MOST_HEADER):
        raise too_much(f"{path} has a header of {start:,} bytes, more than {limit(MOST_HEADER):,}")
    header = parse_json(data[8:start].tobytes(), f"the header of {path}", unique=True)
    try:
        header.pop("__metadata__", None)
        found = {name: _view(data[start:], **about) for name, about in header.items()}
        ends = sorted(tuple(about["data_offsets"]) for about in header.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{broken}: {error}.") from error
    if [first for first, _ in ends] + [len(data) - start] != [0] + [last for _, last in ends]:
        raise UserError(f"{broken}: its tensors overlap, or leave bytes between them or at its end.")
    return found


def _view(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    if dtype not in DTYPES:
        raise ValueError(f"its dtype {dtype} is none of {', '.join(DTYPES)}")
    first, last = data_offsets
    kind = np.dtype(DTYPES[dtype])
    if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise ValueError("its header contradicts itself")
    if last - first != math.prod(shape) * kind.itemsize:
        raise ValueError("its header contradicts itself")
    if last > len(data):
        raise ValueError(f"{last - len(data):,} bytes are missing at its end")
    return data[first:last].view(kind).reshape(shape)


def read_npz(path: pathlib.Path, folder: pathlib.Path | None = None) -> dict[str, np.ndarray]:
    """Name -> array of a state dict that was saved as ``.npz``; ``folder``: see ``open_regular``.

    Raises:
      UserError: it is not such a file, or its arrays are larger than it holds or than they may be.
    """
    try:
        with open_regular(path, folder) as file, zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > limit(MOST_UNPACKED):
                raise too_much(f"{path} unpacks to more than {limit(MOST_UNPACKED):,} bytes")
            for member in archive.infolist():
                with archive.open(member) as opened:
                    old = np.lib.format.read_magic(opened) == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(opened)
                    if math.prod(shape) * dtype.itemsize != member.file_size - opened.tell():
                        raise ValueError(f"{member.filename} does not hold the {shape} numbers that it claims")
        with open_regular(path, folder) as file, np.load(file) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not an .npz file of arrays ({error}).") from error


# -------------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def whole_model(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """``whole.folder`` for a model, which may be in the place of another one.

    Raises:
      UserError: ``path`` holds something that is no such folder, or the disk refuses.
    """
    place = pathlib.Path(os.path.abspath(os.path.expanduser(path)))
    foreign = [] if not place.is_dir() else [p.name for p in place.iterdir() if not is_ours(p)]
    if foreign or place.is_file():
        holds = f"holds {some(sorted(foreign))}" if foreign else "is a file"
        raise UserError(f"{place} {holds}, which would be lost; choose another folder for the model.")
    with whole.folder(place) as partial:
        yield partial


def is_ours(path: pathlib.Path) -> bool:
    """Whether ``save`` may have written it."""
    names = (CONFIG, INDEX, GENERATION, PREPROCESSOR, *TOKENIZER)
    return path.is_file() and (path.name in names or (path.name.startswith("model") and path.suffix == ".safetensors"))


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Keys as they come; readable."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(
    folder: pathlib.Path,
    specs: Mapping[str, tuple[tuple[int, ...], Any]],
    tensor: Callable[[str], np.ndarray],
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes tensors, one in memory at a time, into one file or several with an index.

    Args:
      folder: where; it exists.
      specs: shape and dtype by name, in the order of the files.
      tensor: gives the tensor of a name.
      max_shard_bytes: of one file; a larger tensor has a file of its own.
    """
    size = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in specs.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name in specs:
        if shards[-1] and filled + size[name] > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size[name]
    of_shard = dict(_named(shards))
    for file, names in of_shard.items():
        write_safetensors(folder / file, {name: specs[name] for name in names}, tensor)
    if len(shards) > 1:
        place = {name: file for file, names in of_shard.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(size.values())}, "weight_map": place})


def _named(shards: list[list[str]]) -> Iterator[tuple[str, list[str]]]:
    for i, names in enumerate(shards):
        yield (SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"), names


def write_safetensors(
    path: pathlib.Path, specs: Mapping[str, tuple[tuple[int, ...], Any]], tensor: Callable[[str], np.ndarray]
) -> None:
    """Writes one file; see ``write_tensors``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in specs.items():
        first, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": STORED[np.dtype(dtype)], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in specs.items():
            value = np.asarray(tensor(name), dtype, order="C")
            assert value.shape == tuple(shape), (name, value.shape, shape)
            file.write(value.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
