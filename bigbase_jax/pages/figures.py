"""What a task shows of an evaluation (``core.Figure``), as plain values that the macros of ``figures.html`` draw."""

from __future__ import annotations

import base64
import io
import math
import wave
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bigbase_jax.compare.numbers import finite, percent, plain
from bigbase_jax.core import Clips, Evaluated, Figure, Gallery, Highlights, Matrix, Plot, Table, Task, UserError
from bigbase_jax.pages.page import Series, chart
from bigbase_jax.runtime.log import say

Pictures = Callable[[str, int], tuple[np.ndarray, str]]
"""(split, index) -> the picture, uint8 or float in [0, 1], [H, W], [H, W, 1] or [H, W, 3], and its file's name."""
PIECES = 600
"""How many pieces of a text are shown."""
_COLOURS = ("train", "val", "test", "other")


def of_task(task: Task | None, evaluated: Evaluated) -> list[Figure]:
    """The figures of a task; those before the first that it fails to make. A task may have none."""
    found: list[Figure] = []
    try:
        found.extend(getattr(task, "figures", lambda _: ())(evaluated))
    except Exception as error:  # whatever the code of a task raises: the rest of the page is there all the same
        say(f"figures of {evaluated.split} are left out: {type(error).__name__}: {error}")
    return found


def shaped(figures: Iterable[Figure], split: str, pictures: Callable[[], Pictures] | None = None) -> list[dict]:
    """Figures as the template takes them.

    Args:
      pictures: gives what opens the pictures of a gallery, asked where there is one; None, or a ``UserError``: they are
        not at hand, and the page says so.
    """
    kinds: dict[type, Callable[[Any], dict[str, Any]]] = {
        Highlights: _highlights,
        Table: _table,
        Matrix: _matrix,
        Plot: _plot,
        Clips: _clips,
    }
    found = []
    for figure in figures:
        try:
            what = _gallery(figure, split, pictures) if isinstance(figure, Gallery) else kinds[type(figure)](figure)
        except (ValueError, TypeError, LookupError) as error:
            say(f"the figure {getattr(figure, 'title', figure)!r} cannot be drawn: {type(error).__name__}: {error}")
            continue
        about = {"kind": type(figure).__name__.lower(), "title": figure.title, "note": figure.note, "split": split}
        found.append(about | what)
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


def _highlights(figure: Highlights) -> dict[str, Any]:
    texts = []
    for title, pieces in figure.texts:
        shown = []
        for text, weight in pieces[:PIECES]:
            shade = 100 * min(max(weight, 0.0) / figure.most, 1) if math.isfinite(weight) else 100
            tip = f"{weight:.2f} {figure.unit}" if figure.unit and weight else ""
            shown.append((text, round(shade), tip))
        texts.append({"title": title, "pieces": shown, "more": max(len(pieces) - PIECES, 0)})
    return {"texts": texts}


def _table(figure: Table) -> dict[str, Any]:
    shares = [column in figure.shares for column in figure.columns]
    rows = []
    for row in figure.rows:
        cells = []
        for value, share in zip(row, shares, strict=True):
            number = finite(value) if share else None
            text = plain(value) if number is None else f"{100 * number:.1f} %"
            cells.append({"text": text, "share": None if number is None else round(100 * number, 1)})
        rows.append(cells)
    return {"columns": figure.columns, "rows": rows}


def _matrix(figure: Matrix) -> dict[str, Any]:
    names, count_KK = figure.names, np.asarray(figure.counts, np.float64).reshape(len(figure.names), -1)
    size = next((size for size, most in (("large", 6), ("middle", 12), ("small", 30)) if len(names) <= most), "tiny")
    share_KK = count_KK / np.maximum(count_KK.sum(1, keepdims=True), 1)
    rows = [
        [
            {
                "count": f"{count:,.0f}" if size != "tiny" else "",
                "share": percent(share) if size in ("large", "middle") else "",
                "shade": round(100 * math.sqrt(share)),
                "right": i == j,
                "tip": f"{name} called {guess}: {count:,.0f} ({percent(share)})",
            }
            if count
            else None
            for j, (guess, count, share) in enumerate(zip(names, count_KK[i], share_KK[i], strict=True))
        ]
        for i, name in enumerate(names)
    ]
    wrong_KK = count_KK * (1 - np.eye(len(names)))
    order = [divmod(int(flat), len(names)) for flat in np.argsort(-wrong_KK, axis=None, kind="stable")[:8]]
    confused = [
        (names[i], names[j], f"{wrong_KK[i, j]:,.0f}", percent(share_KK[i, j])) for i, j in order if wrong_KK[i, j]
    ]
    return {"names": names, "size": size, "rows": rows, "confused": confused if len(names) > 3 else []}


def _plot(figure: Plot) -> dict[str, Any]:
    series = [
        Series(name, _COLOURS[i % len(_COLOURS)], x, y, len(x) < 60, figure.counts.get(name, ()))
        for i, (name, (x, y)) in enumerate(figure.series.items())
        if len(x)
    ]
    if not series:
        return {"chart": None}
    text = lambda y: f"{y:.4g}"  # noqa: E731
    drawn = chart(
        figure.title, series, text, legend=len(series) > 1, x_title=figure.x, y_title=figure.y, steps=False,
        bars=figure.bars, diagonal=figure.diagonal,
    )  # fmt: skip
    return {"chart": drawn}


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
