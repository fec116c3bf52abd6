"""Pictures from files: whatever the format, colour mode or orientation, as uint8 RGB.

Axes: H height, W width, C channels.
"""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bigbase_jax.core import Example, UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".pgm", ".ppm", ".tif", ".tiff"})


def decode(file: str | os.PathLike | bytes) -> np.ndarray:
    """A picture as uint8[H,W,3].

    EXIF orientation is applied; grey, palette and CMYK become RGB; 16-bit grey is scaled to 8 bits; transparency is laid
    on white; of an animation the first frame counts.

    Args:
      file: a path, or the file's bytes.

    Raises:
      UserError: not a picture, cut short, or absurdly large; names the file and why.
    """
    name = "the picture" if isinstance(file, bytes) else os.fspath(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)  # broken EXIF does not make a broken picture
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
                return np.array(_rgb(_upright(picture)))
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not a picture that can be read.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name} is too large to be decoded safely ({error}).") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise UserError(f"{name} cannot be decoded: {reason}.") from error


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()  # all of it: a file cut short is an error, not a picture with a grey half
    try:
        return ImageOps.exif_transpose(picture)
    except (SyntaxError, ValueError, KeyError, TypeError, ZeroDivisionError, OSError):  # broken EXIF
        return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        grey = np.asarray(picture).astype(np.float64)
        scale = 1.0 if grey.max(initial=0) <= 255 and not picture.mode.startswith("I;16") else 257.0
        return Image.fromarray(np.clip(grey / scale + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


class Pictures:
    """What all picture data sets share: reading a user's file."""

    @staticmethod
    def read(path: str) -> Example:
        """``{"image": uint8[H,W,3]}`` of a file.

        Raises:
          UserError: it cannot be read.
        """
        return {"image": decode(path)}
