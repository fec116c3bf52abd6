"""Pictures from files: one decoder for every data set and for prediction.

Legend: H height, W width, C channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from bigbase_jax.core import Codec, Example, Fields, UserError
from bigbase_jax.data.files import KEY, LIMITS, File, Limits, file_at, given_file, limits_of, one_sentence, open_file
from bigbase_jax.data.sources.splits import Split
from bigbase_jax.runtime.limits import too_much

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".pgm", ".ppm"})
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")  # JPEG includes MPO, which some cameras write
COLUMNS = ("image", "path", "file", "file_name", "filename", "image_path", "picture", "img")
_ORIENTATION = 0x0112  # EXIF 2.3, table 4
_UPRIGHT = {  # orientation -> whether a picture is mirrored, turned upside down, and after that transposed
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}


Image.MAX_IMAGE_PIXELS = None  # ``decode`` has a limit of its own, which users can set


def decode(
    data: bytes | str | os.PathLike[str] | File, draft_size: int | None = None, limits: Limits = LIMITS
) -> np.ndarray:
    """The picture in a JPEG, PNG, WebP, GIF, BMP, PGM or PPM file, upright, as 8-bit RGB.

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits, of an animation the
    first frame is taken.

    Args:
      data: a file's contents, or its path, or a file in an archive.
      draft_size: lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, much faster, as long as both of its sides
        stay at least this long; None: at full size.
      limits: refuses a picture by the size in its header, before it is decoded.

    Returns:
      uint8 [H, W, 3].

    Raises:
      UserError: unreadable, truncated, no regular file, or beyond the limits. It names the path if given.
    """
    return oriented(data, draft_size, limits)[0]


def oriented(
    data: bytes | str | os.PathLike[str] | File, draft_size: int | None = None, limits: Limits = LIMITS
) -> tuple[np.ndarray, int]:
    """What ``decode`` gives, and the EXIF orientation that it has applied: 1 to 8 (see ``moved_upright``)."""
    if not isinstance(data, bytes):
        file = data if isinstance(data, File) else file_at("", os.fspath(data))
        try:
            if file.size > 4 * limits.most_pixels:
                raise too_large(f"a file of {file.size:,} bytes", file.size // 4)
            with one_sentence(file, "bytes"), open_file(file) as opened:
                contents = opened.read(file.size)
            return oriented(contents, draft_size, limits)
        except UserError as error:
            if str(file) in str(error):
                raise
            raise UserError(f"{file}: {error}") from error
    if not data:
        raise UserError("the file is empty.")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > limits.most_pixels:
                raise too_large(f"a size of {width:,} x {height:,} pixels", width * height)
            with _room(width * height):
                if draft_size is not None:
                    image.draft(None, (draft_size, draft_size))  # None keeps the mode
                x_HWC = _whole_jpeg(data, image) if image.size == (width, height) else None
                if x_HWC is None:
                    image.load()
                    x_HWC = np.asarray(_rgb(image))
                orientation = _orientation(image)
                if orientation in _UPRIGHT:
                    x_HWC = np.ascontiguousarray(turned_upright(x_HWC, orientation))
    except (MemoryError, UserError):
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError("this is not a picture in JPEG, PNG, WebP, GIF, BMP, PGM or PPM format.") from error
    except Exception as error:  # Pillow's parsers raise almost anything on bytes that are not what they should be
        raise UserError(f"the picture is broken: {str(error).rstrip('.') or type(error).__name__}.") from error
    return x_HWC, orientation if orientation in _UPRIGHT else 1


def turned_upright(x_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """A picture as it is stored -> a view of it, upright."""
    mirrored, upside_down, transposed = _UPRIGHT.get(orientation, (False, False, False))
    x_HWC = x_HWC[::-1] if upside_down else x_HWC
    x_HWC = x_HWC[:, ::-1] if mirrored else x_HWC
    return x_HWC.swapaxes(0, 1) if transposed else x_HWC


def moved_upright(boxes_N4: np.ndarray, orientation: int, height: int, width: int) -> np.ndarray:
    """Boxes xyxy [N,4] on a picture as it is stored -> on the upright one, which is ``height`` x ``width``."""
    mirrored, upside_down, transposed = _UPRIGHT.get(orientation, (False, False, False))
    w, h = (height, width) if transposed else (width, height)
    x_N2, y_N2 = boxes_N4[:, 0::2], boxes_N4[:, 1::2]
    x_N2 = w - x_N2[:, ::-1] if mirrored else x_N2
    y_N2 = h - y_N2[:, ::-1] if upside_down else y_N2
    return np.stack([y_N2, x_N2] if transposed else [x_N2, y_N2], -1).reshape(-1, 4)


def too_large(what: str, pixels: int) -> UserError:
    """Says that a picture is larger than ``limits.pixels``."""
    return too_much(f"{what} is too much for a picture", f"set {KEY}.pixels={pixels} or more")


_DECODED_AT_ONCE = 1 << 26  # pixels, of up to 24 bytes on the way, by all threads together; a larger one is alone
_decoding = threading.Condition()
_pixels = 0


@contextlib.contextmanager
def _room(pixels: int) -> Iterator[None]:
    """Waits until there is memory for so many pixels."""
    global _pixels
    with _decoding:
        _decoding.wait_for(lambda: not _pixels or _pixels + pixels <= _DECODED_AT_ONCE)
        _pixels += pixels
    try:
        yield
    finally:
        with _decoding:
            _pixels -= pixels
            _decoding.notify_all()


def _whole_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """The RGB pixels of a JPEG whose header ``image`` has read: Pillow's to the bit, in half its time.

    None: Pillow has to read it, since it is of another kind, or to say what is wrong with it.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    x_HWC = np.empty((image.height, image.width, 3), np.uint8)
    try:  # into memory of the size that was checked: a larger picture is refused
        decoded = simplejpeg.decode_jpeg(data, "RGB", buffer=x_HWC)
    except ValueError:
        return None
    return x_HWC if decoded.shape == x_HWC.shape else None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a picture is no worse for broken EXIF data
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class Pictures(Split):
    """A ``Source`` of picture files, ``image`` uint8 [H, W, 3] and ``label`` i32[], called by their paths."""

    labels: np.ndarray

    def __init__(
        self,
        root: str,
        names: Sequence[str],
        labels: np.ndarray,
        draft_size: int | None = None,
        limits: Limits = LIMITS,
        members: Mapping[str, File] | None = None,
    ):
        """Files ``names`` below ``root`` with ``labels`` i32[N]; ``draft_size`` and ``limits`` as in ``decode``.

        Args:
          members: by name where they are in an archive.
        """
        self._root, self._names, self._members = root, tuple(names), members
        self._decode = functools.partial(decode, draft_size=draft_size, limits=limits)
        label_N = np.asarray(labels, np.int32)
        super().__init__("", len(names), self._picture, labels=label_N, name=self._names.__getitem__)

    def _picture(self, index: int) -> Example:
        name = self._names[index]
        path = self._members[name] if self._members else os.path.join(self._root, name)
        return {"image": self._decode(path), "label": self.labels[index]}


def resized(x_HWC: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """An RGB picture, uint8 [H, W, 3], as uint8 of ``shape``: stretched, and grey where that has no third channel."""
    height, width, *channels = shape
    image = Image.fromarray(x_HWC)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    x = np.asarray(image if channels == [3] else image.convert("L"))
    return x if x.shape == tuple(shape) else x.reshape(shape)


@dataclasses.dataclass(frozen=True)
class PictureCodec(Codec):
    """A user's picture: a file, its bytes, or a row whose ``image`` is these in base64; a table names files.

    Attributes:
      limits: of decoding.
      shape: (H, W, C) of all pictures of the training data, where these are the same; None: they are as they come.
      draft_size: as the training data was decoded; see ``decode``.
    """

    limits: Limits = LIMITS
    shape: tuple[int, ...] | None = None
    draft_size: int | None = None

    fields = Fields({"image": [(name,) for name in COLUMNS]}, files=True)

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """``image`` uint8 [H, W, 3], or of ``shape``: stretched, and grey where that is.

        Raises:
          UserError: it does not decode.
        """
        x_HWC = decode(given_file(given, "image", "picture"), self.draft_size, self.limits)
        return [{"image": x_HWC if self.shape is None else resized(x_HWC, self.shape)}]

    def fit(self, example: Example, shapes: Mapping[str, Sequence[int]]) -> Example:
        """A picture as large as those of the training, where the transforms leave it another size."""
        x_HWC, shape = example["image"], shapes["image"]
        if x_HWC.shape == tuple(shape) or x_HWC.dtype != np.uint8:
            return example
        return {**example, "image": resized(np.broadcast_to(x_HWC, (*x_HWC.shape[:2], 3)), shape)}


class ReadsPictures:
    """The ``codec`` of data sets whose examples are pictures of any size."""

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        return PictureCodec(limits_of(config), draft_size=config.get("draft_size"))
