"""What the JSON of a published folder may say: a type and bounds for each key that is read, so that nothing else comes
any further. Keys that a schema does not have are left out, and null is as good as absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Union

from bigbase_jax.core import UserError


class Kind(NamedTuple):
    """What a value may be.

    Attributes:
      wanted: in words.
      fits: ``(value, the whole object)`` -> whether it is.
    """

    wanted: str
    fits: Callable[[Any, Mapping[str, Any]], bool]


Schema = Mapping[str, Union[Kind, "Schema"]]


def whole(least: int, most: int, divides: str = "") -> Kind:
    """A whole number within bounds; ``divides``: the key of a number that it divides, where that is there."""

    def fits(value: Any, beside: Mapping[str, Any]) -> bool:
        product = beside.get(divides)
        return type(value) is int and least <= value <= most and not (type(product) is int and product % value)

    return Kind(f"a whole number from {least:,} to {most:,}" + (f" that divides {divides}" if divides else ""), fits)


def number(least: float, most: float) -> Kind:
    """A number within bounds."""
    return Kind(
        f"a number from {least:g} to {most:g}", lambda x, _: type(x) in (int, float) and bool(least <= x <= most)
    )


def only(*values: Any) -> Kind:
    """One of these, since our models can be nothing else."""
    one = " or ".join(map(repr, values))
    return Kind(f"only {one} is known here", lambda x, _: any(type(x) is type(v) and x == v for v in values))


def listed(kind: Kind, least: int, most: int) -> Kind:
    """A list."""
    return Kind(
        f"a list of {least:,} to {most:,}, each {kind.wanted}",
        lambda xs, beside: isinstance(xs, list) and least <= len(xs) <= most and all(kind.fits(x, beside) for x in xs),
    )


def either(*kinds: Kind) -> Kind:
    """What fits one of them."""
    return Kind(", or ".join(k.wanted for k in kinds), lambda x, beside: any(k.fits(x, beside) for k in kinds))


FLAG = Kind("true or false", lambda x, _: isinstance(x, bool))
WORD = Kind("a word", lambda x, _: isinstance(x, str) and len(x) <= 200)
LABELS = Kind(
    "an object of up to 131,072 names by number",
    lambda x, _: (
        isinstance(x, dict)
        and len(x) <= 1 << 17
        and all(k.isdigit() and isinstance(v, (str, int)) for k, v in x.items())
    ),
)
VOCABULARY, LENGTH, TOKEN = whole(1, 1 << 24), whole(1, (1 << 31) - 1), whole(0, (1 << 31) - 1)
WIDTH, HIDDEN, LAYERS, CHANNELS = whole(1, 1 << 17), whole(1, 1 << 20), whole(1, 1024), whole(1, 1024)
HEADS = whole(1, 4096)
SIDE = either(whole(1, 4096), listed(whole(1, 4096), 2, 2))
SHARE = number(0, 1)


def heads_of(key: str) -> Kind:
    """How many heads divide the number of this key among them."""
    return whole(1, 4096, key)


def check(found: Mapping[str, Any], schema: Schema, where: str) -> dict[str, Any]:
    """What an object says of the schema's keys.

    Raises:
      UserError: a value that does not fit; says which, where, and what would.
    """
    values = {key: found[key] for key in schema if found.get(key) is not None}
    for key, value in values.items():
        kind = schema[key]
        if isinstance(kind, Kind):
            fits, wanted = kind.fits(value, found), kind.wanted
        elif fits := isinstance(value, dict):
            values[key] = check(value, kind, f"{where}, in {key},")
        else:
            wanted = "an object"
        if not fits:
            shown = text if len(text := repr(value)) <= 80 else f"{text[:77]}..."
            wanted = wanted if wanted.startswith("only ") else f"it must be {wanted}"
            raise UserError(f"{where} has {key}={shown}; {wanted}.")
    return values


class Checked(dict[str, Any]):
    """What ``check`` gave; a key that is needed, ``config[key]``, and is not there, is the folder's mistake."""

    def __init__(self, found: Mapping[str, Any], schema: Schema, where: str):
        super().__init__(check(found, schema, where))
        self._schema, self._where = schema, where

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise UserError(f"{self._where} has no {key!r}, which a {self.get('model_type')} needs.")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        assert key in self._schema, f"{key} is read and not checked"
        return super().get(key, default)
