"""Steps over a table of files: pictures and sounds that are broken, poor, or there twice."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from bigbase_jax.audio import files as audio
from bigbase_jax.clean import engine
from bigbase_jax.clean.duplicates import linked
from bigbase_jax.clean.engine import col
from bigbase_jax.clean.read import key_of
from bigbase_jax.core import UserError
from bigbase_jax.data.files import File
from bigbase_jax.data.sources.image import image as pictures

_RATE = 8000  # Hz, of what fingerprints are taken of
_BANDS = np.geomspace(300, 2000, 18)  # Hz


@dataclasses.dataclass(frozen=True)
class Files:
    """A row for each file of some kinds: ``id``, its name, and ``path``. It takes the place of ``read.Read``.

    Attributes:
      of: "pictures" or "sounds".

    Raises:
      UserError: it is neither.
    """

    of: str = "pictures"

    name = "files"
    encodings = ("",)
    id = None

    def __post_init__(self) -> None:
        if self.of not in ("pictures", "sounds"):
            raise UserError(f"files are of pictures or sounds, not {self.of!r}.")

    @property
    def kinds(self) -> frozenset[str]:
        return pictures.SUFFIXES if self.of == "pictures" else audio.SUFFIXES

    schema: ClassVar = {"key": "uint64", **dict.fromkeys(("id", "path", "source", "split"), "large_string")}

    def documents(self, file: File, encoding: str, split: str) -> Iterator[dict[str, Any]]:
        """The row of ``schema`` of a file."""
        source = file.name.rpartition("/")[0]
        yield {"key": key_of(file.name, split), "id": file.name, "path": file.path, "source": source, "split": split}


class _Checks:
    """A step that opens each file by itself."""

    reads = ("path",)

    gives: ClassVar[Mapping[str, Any]]

    def checked(self, path: str) -> dict[str, Any]:
        """What ``gives`` says of a file, None where that is not there."""
        raise NotImplementedError

    def __call__(self, rows: Any) -> dict[str, list[Any]]:
        found = [self.checked(path) for path in rows["path"].to_pylist()]
        return {name: [f.get(name) for f in found] for name in self.gives}


@dataclasses.dataclass(frozen=True)
class PictureChecks(_Checks):
    """Sizes, sharpness and perceptual hashes of pictures; those that are broken, small, narrow or blurred go.

    Attributes:
      side: pixels that the shorter side has at least.
      aspect: most of the longer side to the shorter one.
      sharpness: least variance of the Laplacian (Pech-Pacheco et al. 2000) of the picture in grey, 0..255, as large as
        256 pixels on its longer side.
    """

    side: int = 64
    aspect: float = 4.0
    sharpness: float = 20.0

    name = "picture_checks"

    gives: ClassVar = {
        **{"height": "int32", "width": "int32", "sharpness": "float32"},
        **{"hash": "uint64", "mirrored": "uint64", "dropped": "string"},
    }

    def checked(self, path: str) -> dict[str, Any]:
        from PIL import Image
        from scipy.ndimage import laplace

        try:
            x_HWC = pictures.decode(path)
        except UserError:
            return {"dropped": "broken"}
        height, width = x_HWC.shape[:2]
        grey = Image.fromarray(x_HWC).convert("L")
        grey.thumbnail((256, 256))
        sharpness = float(laplace(np.asarray(grey, np.float64)).var())
        why = None
        if min(height, width) < self.side:
            why = "small"
        elif max(height, width) > self.aspect * min(height, width):
            why = "narrow"
        elif sharpness < self.sharpness:
            why = "blurred"
        flipped = grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        hashes = {"hash": perceptual_hash(grey), "mirrored": perceptual_hash(flipped)}
        return {"height": height, "width": width, "sharpness": sharpness, **hashes, "dropped": why}


def perceptual_hash(grey: Any) -> int:
    """u64: which of the 8 x 8 lowest frequencies (DCT of 32 x 32) are above their median (pHash, Zauner 2010)."""
    from scipy.fft import dctn

    low = dctn(np.asarray(grey.resize((32, 32)), np.float64), norm="ortho")[:8, :8].ravel()
    return int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big")


@dataclasses.dataclass(frozen=True)
class NearPictures:
    """Of pictures whose hashes differ in at most ``bits`` bits, one of them perhaps mirrored, one stays.

    Two hashes that differ in at most 3 bits share one of four parts of 16: none is missed.
    """

    bits: int = 3

    name = "near_pictures"

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= 3:
            raise UserError(f"bits is {self.bits}; it lies between 0 and 3.")

    def drop(self, df: Any, folder: pathlib.Path, workers: int | None, say: Callable[[str], None]) -> Any:
        """``df`` with ``dropped`` and ``of``."""
        step = engine.Step(("hash", "mirrored"), {to: "list<uint64>" for _, to in _BOTH}, _parts)
        parts = engine.mapped(df.select("key", "hash", "mirrored"), step, None).collect()
        one = parts.select(col("key").alias("a"), col("hash").alias("x"), col("parts").alias("part")).explode("part")
        two = [parts.select(col("key").alias("b"), col(h).alias("y"), col(p).alias("part")) for h, p in _BOTH]
        both = one.join(two[0].union_all(two[1]).explode("part"), on="part").where(col("a") > col("b"))
        both = engine.mapped(
            both.select("a", "b", "x", "y").distinct(), engine.Step(("x", "y"), {"bits": "int32"}, _differ), None
        )
        pairs = both.where(col("bits") <= self.bits).select("a", "b").distinct().collect()
        return linked(df, engine.components(pairs, say))


_BOTH = (("hash", "parts"), ("mirrored", "mirrored_parts"))


def _parts(table: Any) -> dict[str, list[Any]]:
    """The four parts of both hashes, each with its place."""
    return {
        to: [[i << 16 | x >> 16 * i & 0xFFFF for i in range(4)] for x in table[name].to_pylist()] for name, to in _BOTH
    }


def _differ(table: Any) -> dict[str, list[int]]:
    """In how many bits two hashes differ."""
    both = zip(table["x"].to_pylist(), table["y"].to_pylist(), strict=True)
    return {"bits": [(x ^ y).bit_count() for x, y in both]}


@dataclasses.dataclass(frozen=True)
class SoundChecks(_Checks):
    """Durations, silence, clipping and fingerprints of recordings; those that are broken or beyond a limit go.

    ``fingerprint`` is words as those of Haitsma and Kalker (2002): of 64 ms every 16 ms, which of 17 bands between 300
    and 2000 Hz have less energy than the next, and more so than before. ``NearDuplicates(column="fingerprint", ngram=1,
    threshold=0.5, bands=50, rows=2)`` finds recordings that are the same.

    Attributes:
      shortest, longest: seconds.
      silence: most of its frames that may be 50 dB below full scale or less.
      clipping: most of its samples that may be at full scale.
    """

    shortest: float = 0.3
    longest: float = 3600.0
    silence: float = 0.9
    clipping: float = 0.01

    name = "sound_checks"

    gives: ClassVar = {
        **dict.fromkeys(("seconds", "silence", "clipping"), "float32"),
        **{"fingerprint": "large_string", "dropped": "string"},
    }

    def checked(self, path: str) -> dict[str, Any]:
        try:
            seconds = audio.length(path)
            if not self.shortest <= seconds <= self.longest:
                return {"seconds": seconds, "dropped": "short" if seconds < self.shortest else "long"}
            x_T = audio.decode(path, _RATE)
        except UserError:
            return {"dropped": "broken"}
        frames_NF = x_T[: len(x_T) // 200 * 200].reshape(-1, 200)
        silence = float(np.mean(np.sqrt((frames_NF**2).mean(1)) < 10 ** (-50 / 20))) if len(frames_NF) else 1.0
        clipping = float(np.mean(np.abs(x_T) >= 0.999))
        why = "silent" if silence > self.silence else "clipped" if clipping > self.clipping else None
        told = {"seconds": seconds, "silence": silence, "clipping": clipping}
        return {**told, "fingerprint": fingerprint(x_T), "dropped": why}


def fingerprint(x_T: np.ndarray) -> str:
    """Words of 4 hex digits; see ``SoundChecks``. f32[T] at 8 kHz."""
    from scipy.signal import stft

    if len(x_T) < 1024:
        return ""
    frequencies, _, z_FN = stft(x_T, _RATE, nperseg=512, noverlap=384, boundary=None, padded=False)
    band = np.digitize(frequencies, _BANDS) - 1
    energy_BN = np.stack([(np.abs(z_FN[band == b]) ** 2).sum(0) for b in range(17)])
    # where there is next to no energy, noise would tell
    bits_BN = np.diff(np.diff(energy_BN, axis=0), axis=1) > 0.01 * energy_BN.sum(0)[1:]
    words = (bits_BN * (1 << np.arange(16))[:, None]).sum(0)
    return " ".join(f"{word:04x}" for word in words if word)
