"""Boxes of pictures as the usual formats write them: Pascal VOC's XML, COCO's JSON, YOLO's text files, and tables.

Each reader gives ``Annotated`` pictures whose boxes are corners; ``sources.image.detection`` repairs them. What is read
is data of any origin: XML with a document type, whose entities can grow or name other files, is refused.
"""

from __future__ import annotations

import math
import posixpath
import re
import xml.parsers.expat
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.data.files import File, kind_of, named_after, one_sentence, open_file, too_long
from bigbase_jax.data.rows import first_line, is_number, json_values, lines_of, rows
from bigbase_jax.models.boxes import convert


class Annotated(NamedTuple):
    """A picture's boxes.

    Attributes:
      picture: what the annotation calls it: a path or a name, perhaps without suffix.
      where: the annotation's file, and what of it.
      boxes: f64[n,4] xyxy: in pixels, or in shares of the sides.
      labels: names of their classes, n.
      ignored: bool of each: a crowd, or difficult.
      size: (width, height) that the annotation says; None: it does not.
      relative: whether boxes are in shares.
      stored: whether, where the size does not tell, they lie on the pixels as they are stored, before EXIF's rotation.
      split: that the annotation says; "": none.
    """

    picture: str
    where: str
    boxes: np.ndarray
    labels: Sequence[str]
    ignored: Sequence[bool]
    size: tuple[float, float] | None = None
    relative: bool = False
    stored: bool = False
    split: str = ""


TABLE = "a table"
"""The ``kind`` of a table of boxes."""


class Read(NamedTuple):
    """What a format's reader gives.

    Attributes:
      kind: the format, for people.
      convention: of its boxes, for people.
      pictures: all that are annotated.
      names: of the classes in the format's own order; (): it has none.
      unmarked: whether a picture without annotation is one without objects, rather than one that nobody has looked at.
    """

    kind: str
    convention: str
    pictures: list[Annotated]
    names: Sequence[str] = ()
    unmarked: bool = False


def read(root: str, files: Sequence[File], convention: str | None = None) -> Read:
    """The annotations among some files, of the one format that they are in.

    Args:
      root: in words.
      files: all that may be annotations: ``.xml``, ``.json``, ``.txt``, ``.yaml`` and tables.
      convention: of a table whose header does not say it: "xyxy", "xywh" or "cxcywh".

    Raises:
      UserError: there are none, of several formats, or one cannot be read.
    """
    readers: dict[str, Callable[[list[File]], Read | None]] = {
        ".xml": _voc,
        ".json": _coco,
        ".csv": lambda some: _tables(some, convention),
        ".txt": lambda some: _yolo(some, [f for f in files if kind_of(f.name) in (".yaml", ".yml")]),
    }
    kinds = {kind: [f for f in files if kind_of(f.name) == kind] for kind in readers}
    kinds[".csv"] += [f for f in files if kind_of(f.name) == ".tsv"]
    found = [result for kind, reader in readers.items() if kinds[kind] and (result := reader(kinds[kind])) is not None]
    if len(found) > 1:
        raise UserError(
            f"{root} has boxes as {' and as '.join(result.kind for result in found)}; leave one of them there."
        )
    if not found:
        raise UserError(
            f"{root} has no boxes: neither Pascal VOC's .xml, COCO's .json, YOLO's labels/*.txt, nor a .csv with"
            " columns such as filename, class, xmin, ymin, xmax, ymax."
        )
    return found[0]


# --- Pascal VOC -------------------------------------------------------------------------------------------------------


def _voc(files: list[File]) -> Read | None:
    pictures = []
    for file in files:
        tree = xml_of(file)
        if tree.tag != "annotation":
            continue
        boxes, labels, ignored = [], [], []
        for thing in tree.iter("object"):
            box = thing.find("bndbox")
            if box is None:
                continue
            boxes.append([_number(box.findtext(side), f"{file}: {side}") for side in ("xmin", "ymin", "xmax", "ymax")])
            labels.append((thing.findtext("name") or "").strip())
            ignored.append((thing.findtext("difficult") or "0").strip() == "1")
        sides = [_number(tree.findtext(f"size/{side}") or "0", f"{file}: {side}") for side in ("width", "height")]
        size = (sides[0], sides[1]) if min(sides) > 0 else None
        pictures.append(Annotated(file.name, str(file), _array(boxes), labels, ignored, size, stored=True))
    return Read("Pascal VOC", "corners in pixels", pictures) if pictures else None


def xml_of(file: File) -> ElementTree.Element:
    """The root element of an XML file.

    Raises:
      UserError: it is no XML, has a document type, or is too large.
    """
    most = file.limits.most_text
    builder = ElementTree.TreeBuilder()
    parser = xml.parsers.expat.ParserCreate()

    def refused(*_: Any) -> None:
        raise UserError(f"{file} has a document type (<!DOCTYPE ...>), which may grow without end; delete that line.")

    parser.StartDoctypeDeclHandler = refused
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    with one_sentence(file, "utf-8"), open_file(file) as opened:
        data = opened.read(most + 1)
    if len(data) > most:
        raise too_long(str(file), file.limits)
    try:
        parser.Parse(data, True)
        return builder.close()
    except (xml.parsers.expat.ExpatError, AssertionError, LookupError, ValueError) as error:
        raise UserError(f"{file} is not XML: {error}.") from error


# --- COCO -------------------------------------------------------------------------------------------------------------


def _coco(files: list[File]) -> Read | None:
    pictures: list[Annotated] = []
    names: dict[int, str] = {}
    for file in files:
        with one_sentence(file, "utf-8"):
            values = [value for _, value in json_values(file, "utf-8", False)] if _looks_like_coco(file) else []
        if len(values) != 1 or not isinstance(values[0], dict) or not {"images", "annotations"} <= values[0].keys():
            continue
        pictures += _coco_file(file, values[0], names)
    ordered = [names[key] for key in sorted(names)]
    return Read("COCO", "corner and size in pixels", pictures, ordered) if pictures else None


def _looks_like_coco(file: File) -> bool:
    """Other JSON beside it may be of any kind and length."""
    with open_file(file) as opened:
        return bool(opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{")


def _coco_file(file: File, value: Mapping[str, Any], names: dict[int, str]) -> Iterator[Annotated]:
    def records(name: str, *keys: str) -> list[Mapping[str, Any]]:
        found = value.get(name, [])
        bad = next((x for x in found if not isinstance(x, dict) or any(key not in x for key in keys)), None)
        if not isinstance(found, list) or bad is not None:
            raise UserError(f"{file}: {name} is no list of objects with {' and '.join(keys)}: {str(bad)[:60]}.")
        return found

    for category in records("categories", "id", "name"):
        if names.setdefault(category["id"], str(category["name"])) != str(category["name"]):
            raise UserError(f"{file}: category {category['id']} has another name than in the other files.")
    boxes: dict[Any, list[Mapping[str, Any]]] = {}
    for thing in records("annotations", "image_id"):
        boxes.setdefault(thing["image_id"], []).append(thing)
    split = _split_in(posixpath.basename(file.name))
    for image in records("images", "id", "file_name"):
        things = [thing for thing in boxes.pop(image["id"], []) if "bbox" in thing]
        where = f"{file}, image {image['id']}"
        unknown = next((t for t in things if t.get("category_id") not in names), None)
        if unknown is not None:
            raise UserError(f"{where} has a box of category {unknown.get('category_id')}, which is not in categories.")
        sides = [[_number(x, where) for x in _four(thing["bbox"], where)] for thing in things]
        size = [_number(image.get(side, 0), where) for side in ("width", "height")]
        yield Annotated(
            posixpath.join(posixpath.dirname(file.name), str(image["file_name"]).replace("\\", "/")),
            where,
            convert(_array(sides), "xywh"),
            [names[thing["category_id"]] for thing in things],
            [bool(thing.get("iscrowd", 0)) for thing in things],
            (size[0], size[1]) if min(size) > 0 else None,
            stored=True,
            split=split,
        )
    if boxes:
        raise UserError(f"{file} has boxes of image_id {next(iter(boxes))!r}, which is not in images.")


def _four(box: Any, where: str) -> list[Any]:
    if not isinstance(box, list) or len(box) != 4:
        raise UserError(f"{where} has the bbox {str(box)[:60]}, which is not [x, y, width, height].")
    return box


def _split_in(name: str) -> str:
    """The split of ``instances_val2017.json`` or ``train_annotations.json``: by any of its words."""
    words = [re.sub(r"\d+$", "", word) for word in re.split(r"[^A-Za-z0-9]+", name)]
    return next((split for word in words if (split := named_after(word, whole=True))), "")


# --- YOLO -------------------------------------------------------------------------------------------------------------


def _yolo(files: list[File], settings: list[File]) -> Read | None:
    names: list[str] = []
    for file in settings:
        names = names or _yaml_names(file)
    pictures: list[Annotated] = []
    kept: list[File] = []
    for file in files:
        base = posixpath.basename(file.name).casefold()
        if base in ("classes.txt", "labels.txt"):
            names = names or [line.strip() for _, line in lines_of(file, "utf-8") if line.strip()]
        elif not named_after(posixpath.splitext(base)[0], whole=True) and base != "trainval.txt":
            kept.append(file)
    highest = -1
    for file in kept:
        boxes, numbers = [], []
        with one_sentence(file, "utf-8"):
            for number, line in lines_of(file, "utf-8"):
                cells = line.split()
                if not cells:
                    continue
                if len(cells) not in (5, 6) or not re.fullmatch(r"\d{1,6}(\.0*)?", cells[0]):
                    if len(cells) > 6 and len(cells) % 2:
                        raise UserError(f"{file}, line {number} is a polygon; write boxes: class, x, y, width, height.")
                    if not pictures:
                        break  # some other text
                    raise UserError(f"{file}, line {number} is not: class, x, y, width, height.")
                numbers.append(int(float(cells[0])))
                boxes.append([_number(x, f"{file}, line {number}") for x in cells[1:5]])
            else:
                highest = max(highest, *numbers, -1)
                labels = [str(n) for n in numbers]
                centred = convert(_array(boxes), "cxcywh")
                pictures.append(Annotated(file.name, str(file), centred, labels, [False] * len(labels), relative=True))
    if highest < 0:
        return None
    if names and highest >= len(names):
        raise UserError(f"{len(names)} classes have names ({', '.join(names[:4])}, ...), and a box is of {highest}.")
    names = names or [str(n) for n in range(highest + 1)]
    named = [p._replace(labels=[names[int(label)] for label in p.labels]) for p in pictures]
    return Read("YOLO", "centre and size in shares of the sides", named, names, unmarked=True)


def _yaml_names(file: File) -> list[str]:
    """``names`` of a data.yaml, a list or a mapping from numbers; [] where there are none."""
    import yaml

    with one_sentence(file, "utf-8"), open_file(file) as opened:
        data = opened.read((1 << 20) + 1)
    try:
        found = yaml.safe_load(data) if len(data) <= 1 << 20 else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{file} is not YAML: {str(error).splitlines()[0]}.") from error
    names = found.get("names") if isinstance(found, dict) else None
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        names = [{str(key): value for key, value in names.items()}[str(i)] for i in range(len(names))]
    return [str(name) for name in names] if isinstance(names, list) else []


# --- tables -----------------------------------------------------------------------------------------------------------

_COLUMNS: Mapping[str, tuple[str, ...]] = {  # what columns may be called, the usual name first; of "sides", see there
    "picture": ("filename", "file_name", "image", "path", "file", "image_path", "img", "image_id", "imageid"),
    "label": ("class", "label", "name", "class_name", "category", "labelname"),
    "split": ("split",),
    "crowd": ("iscrowd", "difficult"),
    "sides": (),
    "size": (),
}
_SIDES = {  # what the columns of a convention may be called
    "xyxy": ("xmin ymin xmax ymax", "x0 y0 x1 y1", "x1 y1 x2 y2", "left top right bottom"),
    "xywh": ("x y width height", "x y w h", "left top width height", "bbox_x bbox_y bbox_width bbox_height"),
    "cxcywh": ("cx cy w h", "x_center y_center width height", "xcenter ycenter width height"),
}


def _tables(files: list[File], convention: str | None) -> Read | None:
    """Tables of a row for each box; without header as keras-retinanet's: picture, four numbers, class."""
    pictures: dict[tuple[str, str], list[dict[str, Any]]] = {}
    told = ""
    for file in files:
        head = [cell.strip().casefold() for cell in first_line(file) or ()]
        columns = _columns(head, convention)
        header = columns is not None
        if columns is None:
            if len(head) != 6 or not all(not cell or is_number(cell) for cell in head[1:5]):
                continue
            columns = {"convention": convention or "xyxy", "picture": [0], "sides": [1, 2, 3, 4], "label": [5]}
        told = columns["convention"]
        for row in rows(file, header=header):
            cells = [str(cell).strip() for cell in row.values.values()]
            of = {name: [cells[at] for at in columns.get(name, ())] for name in _COLUMNS}
            name = posixpath.join(posixpath.dirname(file.name), of["picture"][0].replace("\\", "/"))
            split = _split_in(posixpath.basename(file.name))
            split = (named_after(of["split"][0], whole=True) or "") if of["split"] else split
            about: dict[str, Any] = {"where": row.where, "size": tuple(_number(x, row.where) for x in of["size"])}
            if any(of["sides"]):  # a picture without boxes has a row without numbers
                box = np.array([_number(x, row.where) for x in of["sides"]])
                crowd = any(x.casefold() in ("1", "true") for x in of["crowd"])
                about |= {"box": convert(box, told), "label": of["label"][0], "crowd": crowd}
            pictures.setdefault((name, split), []).append(about)
    if not pictures:
        return None
    boxes = [about["box"] for some in pictures.values() for about in some if "box" in about]
    relative = bool(boxes) and np.nanmax(np.where(np.isfinite(boxes), boxes, np.nan)) <= 2.0
    found = []
    for (name, split), some in pictures.items():
        with_box = [about for about in some if "box" in about]
        sides, labels, ignored = ([about[key] for about in with_box] for key in ("box", "label", "crowd"))
        size, where = some[0]["size"] or None, some[0]["where"]
        found.append(Annotated(name, where, _array(sides), labels, ignored, size, relative, size is not None, split))
    words = {"xyxy": "corners", "xywh": "corner and size", "cxcywh": "centre and size"}[told]
    return Read(TABLE, f"{words} in {'shares of the sides' if relative else 'pixels'}", found)


def _columns(head: Sequence[str], convention: str | None) -> dict[str, Any] | None:
    """The numbers of the columns of each of ``_COLUMNS``, and the convention; None: this is no header of a table of
    boxes."""
    found = {name: [head.index(x) for x in usual if x in head][:1] for name, usual in _COLUMNS.items()}
    if not found["picture"] or not found["label"]:
        return None
    for kind in [convention] if convention else _SIDES:
        for names in map(str.split, _SIDES[kind]):
            if set(names) <= set(head):
                size = {"width", "height"} <= set(head) - set(names)
                found |= {
                    "sides": [*map(head.index, names)],
                    "size": [head.index(x) for x in ("width", "height") if size],
                }
                return {**found, "convention": kind}
    return None


# --- numbers ----------------------------------------------------------------------------------------------------------


def _number(text: Any, where: str) -> float:
    """A number, also one that is none (NaN), which is told of later."""
    try:
        return float(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is {str(text)[:40]!r}, which is no number.") from error
    except OverflowError:
        return math.inf


def _array(boxes: Sequence[Any]) -> np.ndarray:
    return np.asarray(boxes, np.float64).reshape(-1, 4)
