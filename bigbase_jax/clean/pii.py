"""Personal data and secrets in texts: found by pattern and checksum; masked, replaced consistently, or dropped."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError

_PATTERNS = {  # by kind, in the order in which they are looked for; digits around are not theirs
    "email": r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}",
    "key": r"(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|AIza[0-9A-Za-z_-]{35}"
    r"|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----(?:[\s\S]{1,8000}?-----END (?:[A-Z]+ )?PRIVATE KEY-----)?",
    "ip": r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)"
    r"|(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,6}(?![\w:])",
    "cn_id": r"(?<!\d)[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?![\dA-Za-z])",
    "card": r"(?<![\d.])[3-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}(?![\d])|(?<![\d.])3[47]\d{2}[ -]?\d{6}[ -]?\d{5}(?!\d)",
    "phone": r"(?<![\d.+])(?:\+?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?!\d)"
    r"|(?<![\w.])\+\d{1,3}(?:[ .-]?\(?\d{2,4}\)?){2,4}(?!\d)"
    r"|(?<![\w.])\(?[2-9]\d{2}\)?[ .-][2-9]\d{2}[ .-]\d{4}(?!\d)|(?<!\d)0\d{2,3}-\d{7,8}(?!\d)",
}
KINDS = tuple(_PATTERNS)
ACTIONS = ("mask", "replace", "drop")
# What there is in every text that has one: most texts have none, and this is told faster.
_NUMBER = re.compile(r"\d[\d ().-]{5,}\d")
_HINTS: Mapping[str, Callable[[str], Any]] = {
    "email": lambda text: "@" in text,
    "key": re.compile("AKIA|ASIA|gh[pousr]_|sk-|xox[abprs]-|AIza|-----BEGIN").search,
    "ip": re.compile(r"\d\.\d+\.\d|[\dA-Fa-f]:[\dA-Fa-f]*:").search,
    **dict.fromkeys(("cn_id", "card", "phone"), _NUMBER.search),
}
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def luhn(number: str) -> bool:
    """Whether the check digit of a card's number is right (ISO/IEC 7812-1)."""
    digits = [int(c) for c in number if c.isdigit()][::-1]
    return 13 <= len(digits) <= 19 and sum(digits[::2] + [sum(divmod(2 * d, 10)) for d in digits[1::2]]) % 10 == 0


def cn_id(number: str) -> bool:
    """Whether the check digit of a Chinese id number is right (GB 11643-1999)."""
    return "10X98765432"[sum(int(c) * w for c, w in zip(number, _ID_WEIGHTS, strict=False)) % 11] == number[17].upper()


def _is_ip(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


_CHECKS: Mapping[str, Callable[[str], bool]] = {"card": luhn, "cn_id": cn_id, "ip": _is_ip}


@functools.cache
def _compiled(kind: str) -> re.Pattern[str]:
    return re.compile(_PATTERNS[kind])


def substituted(text: str, kinds: tuple[str, ...], by: Callable[[str, str], str]) -> tuple[str, dict[str, int]]:
    """The text with ``by(kind, value)`` in the place of what is found, and how many there were of each kind."""
    counts: dict[str, int] = {}

    def one(kind: str, match: re.Match[str]) -> str:
        value = match.group()
        if kind in _CHECKS and not _CHECKS[kind](value):
            return value
        counts[kind] = counts.get(kind, 0) + 1
        return by(kind, value)

    for kind in kinds:
        if _HINTS[kind](text):
            text = _compiled(kind).sub(functools.partial(one, kind), text)
    return text, counts


def masked(text: str, kinds: tuple[str, ...] = KINDS) -> str:
    """The text with ``[EMAIL]`` and the like in the place of what is found."""
    return substituted(text, kinds, lambda kind, _: f"[{kind.upper()}]")[0]


@dataclasses.dataclass(frozen=True)
class PII:
    """E-mail addresses, keys, IP addresses, Chinese id numbers, cards, phones. Gives ``pii``: kinds and counts.

    Attributes:
      action: "mask": by kind; "replace": the same value by the same made-up one, all over; "drop": the document goes.
      kinds: that are looked for.
      salt: of replacements, which are hashes; None: a secret of the output's own, which stays in it.

    Raises:
      UserError: an unknown action or kind.
    """

    action: str = "mask"
    kinds: tuple[str, ...] = KINDS
    salt: str | None = None

    name = "pii"
    reads = ("text",)

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise UserError(f"there is no action {self.action!r}.{suggest(self.action, ACTIONS, 'action')}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"there is no kind of personal data {kind!r}.{suggest(kind, KINDS, 'kind')}")

    gives: ClassVar = {"text": "large_string", "pii": "string", "dropped": "string"}

    def __call__(self, rows: Any) -> dict[str, Any]:
        by = self._replaced if self.action == "replace" else lambda kind, _: f"[{kind.upper()}]"
        found = [substituted(text, self.kinds, by) for text in rows["text"].to_pylist()]
        told = [" ".join(f"{kind}:{n}" for kind, n in sorted(counts.items())) or None for _, counts in found]
        dropped = ["personal data" if counts and self.action == "drop" else None for _, counts in found]
        return {"text": [text for text, _ in found], "pii": told, "dropped": dropped}

    def _replaced(self, kind: str, value: str) -> str:
        plain = re.sub(r"[\s().-]", "", value).lower() if kind in ("phone", "card") else value.lower()
        found = hashlib.blake2b(f"{kind}/{plain}".encode(), key=(self.salt or "").encode()[:64], digest_size=5)
        if kind == "email":
            return f"{found.hexdigest()}@example.com"
        if kind == "ip":
            return "198.51.100." + str(found.digest()[0])  # of documentation, RFC 5737
        return f"[{kind.upper()} {found.hexdigest()}]"
