"""What a task shows of an evaluation (``core.Figure``), as plain values that the macros of ``figures.html`` draw."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bigbase_jax.audio.files import wav
from bigbase_jax.core import (
    Clips,
    Differences,
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
"""(split, index) -> what a model sees of an example, and its file's name: a picture, uint8 or float in [0, 1], [H, W],
[H, W, 1] or [H, W, 3]; a recording, [T], i16 or float in [-1, 1]."""
PIECES = 600
"""How many pieces of a text are shown."""
TEXTS, SOUND = 24, 90.0
"""Texts that are shown with their differences, and seconds of recordings that a page holds with them."""
_MAGMA = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))  # matplotlib's, at each quarter
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
    kinds: dict[type, Callable[[Any], dict[str, Any]]] = {Matrix: _matrix, Plot: _plot}
    kinds[Clips] = lambda figure: {"clips": [(caption, *_sound(x_T, rate)) for caption, x_T, rate in figure.clips]}
    kinds |= {Table: lambda _: {}, Highlights: lambda _: {"shown": PIECES}}
    kinds[Gallery] = lambda figure: _gallery(figure, split, pictures)
    kinds[Differences] = lambda figure: _differences(figure, split, pictures)
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


def _differences(figure: Differences, split: str, pictures: Callable[[], Pictures] | None) -> dict[str, Any]:
    show, left = None, SOUND
    with contextlib.suppress(UserError):  # without the data, texts are all that there is
        show = pictures() if pictures is not None and figure.rate and figure.texts else None
    rows = []
    for index, right, said in figure.texts[:TEXTS]:
        row: dict[str, Any] = {"name": f"example {index}", "sound": None, "parts": aligned(right, said)}
        if show is not None:
            try:
                samples_T, row["name"] = show(split, index)
                if (left := left - len(samples_T) / figure.rate) > 0:
                    row["sound"] = _sound(samples_T, figure.rate)
            except (UserError, OSError, LookupError, TypeError, ValueError) as error:
                row["name"] += f" ({error})"
        rows.append(row)
    return {"rows": rows, "texts": (), "more": len(figure.texts) - len(rows)}


Part = tuple[str, Sequence[str], Sequence[str]]
"""("equal", "substitute", "delete" or "insert", what is right, what was said): a stretch of two texts."""


def aligned(right: Sequence[str], said: Sequence[str]) -> list[Part]:
    """Two texts, by jiwer.

    Raises:
      UserError: jiwer is not installed.
    """
    if not right or not said:
        return [("insert" if said else "delete", right, said)] if right or said else []
    try:
        import jiwer
    except ImportError as error:
        raise UserError("aligning transcripts needs the package jiwer: pip install 'bigbase_jax[speech]'.") from error
    (found,) = jiwer.process_words(" ".join(right), " ".join(said)).alignments
    return [(x.type, right[x.ref_start_idx : x.ref_end_idx], said[x.hyp_start_idx : x.hyp_end_idx]) for x in found]


def disagreements(found: Sequence[Differences]) -> list[tuple[int, str, list[list[Part]]]]:
    """Of figures of several models on the same examples, those that they say otherwise: (index, what is right, what
    each said, ``aligned``), first where the numbers of their errors differ most."""
    models = [{(index, tuple(right)): said for index, right, said in figure.texts} for figure in found]
    shared = [key for key in models[0] if all(key in model for model in models)]
    rows = []
    for index, right in shared:
        texts = [model[index, right] for model in models]
        if any(list(text) != list(texts[0]) for text in texts):
            parts = [aligned(list(right), text) for text in texts]
            errors = [sum(max(len(a), len(b)) for kind, a, b in some if kind != "equal") for some in parts]
            rows.append((max(errors) - min(errors), index, found[0].between.join(right), parts))
    return [row[1:] for row in sorted(rows, key=lambda row: -row[0])[:TEXTS]]


def _sound(samples_T: np.ndarray, rate: int) -> tuple[str, str]:
    """A recording and its spectrogram, as data URIs."""
    x_T = np.asarray(samples_T)
    x_T = x_T / np.float32(32768) if x_T.dtype == np.int16 else x_T.astype(np.float32)
    return _uri("audio/wav", io.BytesIO(wav(x_T, rate))), _spectrogram(x_T, rate)


def _spectrogram(x_T: np.ndarray, rate: int, width: int = 480) -> str:
    """Power in decibels, 70 below the loudest, of windows of 32 ms; low frequencies are at the bottom."""
    from PIL import Image

    size = max(1 << (int(0.032 * rate)).bit_length() - 1, 16)
    x_T = np.pad(x_T, (0, max(size - len(x_T), 0)))
    starts = np.unique(np.linspace(0, len(x_T) - size, min(width, 1 + (len(x_T) - size) * 4 // size)).astype(int))
    x_FW = np.lib.stride_tricks.sliding_window_view(x_T, size)[starts] * np.hanning(size)
    power_FN = np.abs(np.fft.rfft(x_FW)) ** 2
    level_FN = 1 + np.log10(np.maximum(power_FN / max(float(power_FN.max()), 1e-12), 1e-7)) / 7
    picture = Image.fromarray(np.round(255 * level_FN.T[::-1]).astype(np.uint8), "L").resize((len(starts), 96))
    ramp_3 = [
        np.interp(np.arange(256), np.linspace(0, 255, len(_MAGMA)), channel) for channel in zip(*_MAGMA, strict=True)
    ]
    picture.putpalette(np.round(np.stack(ramp_3, 1)).astype(int).ravel().tolist())
    file = io.BytesIO()
    picture.save(file, "PNG")
    return _uri("image/png", file)
