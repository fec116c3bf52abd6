"""What a task shows of an evaluation (``core.Figure``), as plain values that the macros of ``figures.html`` draw."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import (
    Clips,
    Evaluated,
    Evaluator,
    Figure,
    Gallery,
    Highlights,
    Matrix,
    Plot,
    Table,
    Task,
    UserError,
)
from bigbase_jax.pages.page import Chart, Series
from bigbase_jax.runtime.log import say

Pictures = Callable[[str, int], tuple[np.ndarray, str]]
"""(split, index) -> the picture, uint8 or float in [0, 1], [H, W], [H, W, 1] or [H, W, 3], and its file's name."""
PIECES = 600
"""How many pieces of a text are shown."""
_SIZES = (("large", 6), ("middle", 12), ("small", 30))  # of a matrix, up to so many names
_COLOURS = ("train", "val", "test", "other")


def made_by(maker: Task | Evaluator | None, evaluated: Evaluated) -> list[Figure]:
    """The figures of a task or an evaluator; those before the first that it fails to make. It may have none."""
    found: list[Figure] = []
    try:
        found.extend(getattr(maker, "figures", lambda _: ())(evaluated))
    except Exception as error:  # whatever the code of a user raises: the rest of the page is there all the same
        say(f"figures of {evaluated.split} are left out: {type(error).__name__}: {error}")
    return found


def shaped(figures: Iterable[Figure], split: str, pictures: Callable[[], Pictures] | None = None) -> list[dict]:
    """Figures as the template takes them.

    Args:
      pictures: gives what opens the pictures of a gallery, asked where there is one; None, or a ``UserError``: they are
        not at hand, and the page says so.
    """
    kinds: dict[type, Callable[[Any], dict[str, Any]]] = {Matrix: _matrix, Plot: _plot, Clips: _clips}
    kinds |= {Table: lambda _: {}, Highlights: lambda _: {"shown": PIECES}}
    kinds[Gallery] = lambda figure: _gallery(figure, split, pictures)
    found = []
    for figure in figures:
        try:
            more = kinds[type(figure)](figure)
        except (ValueError, TypeError, LookupError) as error:
            say(f"the figure {getattr(figure, 'title', figure)!r} cannot be drawn: {type(error).__name__}: {error}")
            continue
        found.append({**figure._asdict(), "kind": type(figure).__name__.lower(), "split": split, **more})
    return found


def _gallery(figure: Gallery, split: str, pictures: Callable[[], Pictures] | None) -> dict[str, Any]:
    show, note = None, figure.note
    wanted = any(card.example is not None for card in figure.cards)
    try:
        show = pictures() if pictures is not None and wanted else None
    except UserError as error:
        say(f"the page has no pictures: {error}")
    if show is None and wanted:
        note += " The pictures are not here, since the data is not at hand: run --mode=report where it is."
    cards = []
    for card in figure.cards:
        what: dict[str, Any] = {"name": "" if card.example is None else f"example {card.example}", "picture": None}
        if show is not None and card.example is not None:
            try:
                pixels, what["name"] = show(split, card.example)
                what["picture"] = _picture(pixels, card.boxes)
            except (UserError, OSError, LookupError, TypeError, ValueError) as error:
                what["missing"] = str(error)
        tone = {None: "", True: "right", False: "wrong"}[card.right]
        cards.append({"missing": None, "tone": tone, "caption": card.caption, **what})
    return {"cards": cards, "note": note}


def _picture(pixels: np.ndarray, boxes: Sequence[Any], side: int = 224) -> dict[str, Any]:
    """A picture as a data URI, shrunk to ``side``, with boxes in its pixels; small ones keep their pixels."""
    from PIL import Image

    x_HWC = np.asarray(pixels)
    if x_HWC.ndim == 3 and x_HWC.shape[-1] == 1:
        x_HWC = x_HWC[..., 0]
    if x_HWC.dtype != np.uint8:
        x_HWC = x_HWC.astype(np.float32)
        low, high = float(x_HWC.min()), float(x_HWC.max())
        if low < 0 or high > 1:  # normalised: show its own range
            x_HWC = (x_HWC - low) / max(high - low, 1e-6)
        x_HWC = np.round(255 * x_HWC).astype(np.uint8)
    picture = Image.fromarray(x_HWC)
    small = max(picture.size) <= 64
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    width, height = picture.size
    drawn = [(x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height, label) for x0, y0, x1, y1, label in boxes]
    uri = _uri(f"image/{'png' if small else 'jpeg'}", file)
    return {"uri": uri, "crisp": small, "width": width, "height": height, "boxes": drawn}


def _uri(kind: str, file: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _matrix(figure: Matrix) -> dict[str, Any]:
    names = figure.names
    count_KK = np.asarray(figure.counts, np.float64).reshape(len(names), len(names))
    share_KK = count_KK / np.maximum(count_KK.sum(1, keepdims=True), 1)
    wrong_KK = count_KK * (1 - np.eye(len(names)))
    order = [divmod(int(flat), len(names)) for flat in np.argsort(-wrong_KK, axis=None, kind="stable")[:8]]
    return {
        "size": next((size for size, most in _SIZES if len(names) <= most), "tiny"),
        "cells": [list(zip(*row, strict=True)) for row in zip(count_KK.tolist(), share_KK.tolist(), strict=True)],
        "confused": [(i, j) for i, j in order if wrong_KK[i, j]] if len(names) > 3 else [],
    }


def _plot(figure: Plot) -> dict[str, Any]:
    series = [
        Series(name, _COLOURS[i % len(_COLOURS)], x, y, len(x) < 60, figure.counts.get(name, ()))
        for i, (name, (x, y)) in enumerate(figure.series.items())
        if len(x)
    ]
    words: dict[str, Any] = {"x_title": figure.x, "y_title": figure.y, "bars": figure.bars, "diagonal": figure.diagonal}
    text = "{:.4g}".format
    made = Chart(figure.title, series, text, legend=len(series) > 1, steps=False, **words) if series else None
    return {"chart": made}


def _clips(figure: Clips) -> dict[str, Any]:
    clips = []
    for caption, samples_T, rate in figure.clips:
        file = io.BytesIO()
        with wave.open(file, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(rate)
            sound.writeframes(np.round(32767 * np.clip(samples_T, -1, 1)).astype("<i2").tobytes())
        clips.append((caption, _uri("audio/wav", file)))
    return {"clips": clips}
