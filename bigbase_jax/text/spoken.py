"""Written text as it is spoken: numbers, dates, times, money and abbreviations in words; English and Chinese."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_NAMES = "January February March April May June July August September October November December"
_MONTHS = _NAMES.split()
_MONTH = "|".join(rf"{m[:3]}(?:{m[3:]}|t?\.?)" if m[3:] else m for m in _MONTHS)
_ABBREVIATIONS = {
    **{"mr": "mister", "mrs": "missus", "ms": "miz", "dr": "doctor", "prof": "professor", "rev": "reverend"},
    **{"jr": "junior", "sr": "senior", "gen": "general", "col": "colonel", "capt": "captain", "lt": "lieutenant"},
    **{"sgt": "sergeant", "gov": "governor", "sen": "senator", "rep": "representative", "hon": "honourable"},
    **{"co": "company", "ltd": "limited", "inc": "incorporated", "corp": "corporation", "dept": "department"},
    **{"vs": "versus", "etc": "et cetera", "approx": "approximately", "ave": "avenue", "blvd": "boulevard"},
    **{"mt": "mount", "ft": "fort", "vol": "volume", "fig": "figure", "e.g": "for example", "i.e": "that is"},
    **{"a.m": "a m", "p.m": "p m"},
}
_MONEY = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny"), "¥": ("yen", "")}
_UNITS = {
    **{"%": "percent", "km": "kilometer", "kg": "kilogram", "cm": "centimeter", "mm": "millimeter", "lb": "pound"},
    **{"lbs": "pound", "oz": "ounce", "°C": "degree Celsius", "°F": "degree Fahrenheit", "°": "degree"},
    **{"GB": "gigabyte", "MB": "megabyte", "mph": "mile per hour", "km/h": "kilometer per hour", "kHz": "kilohertz"},
}
_SIGNS = {
    "&": " and ",
    "@": " at ",
    "+": " plus ",
    "=": " equals ",
    "#": " number ",
    "%": " percent ",
    "°": " degrees ",
}
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?"


def tidy(text: str) -> str:
    """Compatibility forms replaced (full-width letters, ligatures), quotes and dashes as ASCII has them."""
    text = unicodedata.normalize("NFKC", text.replace("…", "."))
    text = re.sub("[\u2018\u2019\u02bc`]", "'", text)
    return re.sub(r"\s*(?:--+|[\u2013-\u2015])\s*|\s+-\s+", ", ", text)


def _words(number: str, to: str = "cardinal") -> str:
    from num2words import num2words  # type: ignore[import-untyped,unused-ignore]

    return str(num2words(int(number), to=to)).replace(",", "")


def _number(text: str) -> str:
    whole, _, part = text.replace(",", "").partition(".")
    long = len(whole) > 15 or (len(whole) > 1 and whole[0] == "0")
    said = " ".join(map(_words, whole)) if long else _words(whole)
    return said + (" point " + " ".join(map(_words, part)) if part else "")


def _many(name: str, count: str) -> str:
    """A unit's name for so many."""
    if count in ("1", "one") or name in ("percent", "yen", "kilohertz"):
        return name
    if name == "penny":
        return "pence"
    first, space, rest = name.partition(" ")
    return f"{first}s{space}{rest}"


def _money(found: re.Match[str]) -> str:
    (name, small), amount, scale = _MONEY[found[1]], found[2], found[3]
    whole, _, part = amount.replace(",", "").partition(".")
    if scale or len(part) != 2 or not small:
        return f"{_number(amount)}{scale or ''} {_many(name, amount + (scale or ''))}"
    said = [f"{_number(n)} {_many(unit, n)}" for n, unit in ((whole, name), (str(int(part)), small)) if n != "0"]
    return " and ".join(said) or f"zero {_many(name, '0')}"


def _year(text: str) -> str:
    return _words(text, "year")


def _day(month: str, day: str, year: str | None) -> str:
    name = next((m for m in _MONTHS if m[:3].lower() == month[:3].lower()), month)
    return f"{name} {_words(day, 'ordinal')}" + (f", {_year(year)}" if year else "")


def _date(year: str, month: int, day: int) -> str:
    if month > 12:
        month, day = day, month
    if not 1 <= month <= 12 or not 1 <= day <= 31:
        return " ".join(_words(str(n)) for n in (month, day, int(year)))
    return _day(_MONTHS[month - 1], str(day), year)


def _time(found: re.Match[str]) -> str:
    hour, minute, half = int(found[1]), int(found[2]), (found[3] or "").lower().replace(".", "")
    past = "" if half else " o'clock"
    if minute:
        past = f" {'oh ' if minute < 10 else ''}{_words(str(minute))}"
    return _words(str(hour)) + past + (f" {half[0]} m" if half else "")


def _abbreviation(found: re.Match[str]) -> str:
    """With its full stop where the text ends there."""
    said = _ABBREVIATIONS[found[1].lower()]
    return said + ("." if not found.string[found.end() :].strip(" \"')") else "")


_RULES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"\b(\d{4})-(\d\d)-(\d\d)\b", lambda m: _date(m[1], int(m[2]), int(m[3]))),
    (r"\b(\d{1,2})/(\d{1,2})/(\d{4})\b", lambda m: _date(m[3], int(m[1]), int(m[2]))),
    (r"(?<!\w)-(?=\d)", lambda m: "minus "),
    (rf"\b({_MONTH})\s+(\d\d?)(?:st|nd|rd|th)?\b(?:,?\s+(\d{{4}})\b)?", lambda m: _day(m[1], m[2], m[3])),
    (
        rf"\b(\d\d?)(?:st|nd|rd|th)?\s+({_MONTH})\b(?:,?\s+(\d{{4}})\b)?",
        lambda m: f"the {_words(m[1], 'ordinal')} of {_day(m[2], '1', m[3]).replace(' first', '', 1)}",
    ),
    (r"(?i)\b([01]?\d|2[0-3]):([0-5]\d)(?!\d|:)(?:\s*([ap]\.?m\b\.?))?", _time),
    (rf"([$€£¥])\s?({_NUMBER})(\s(?:hundred|thousand|million|billion|trillion)\b)?", _money),
    (r"\bSt\.(?=\s+[A-Z])", lambda m: "Saint"),
    (r"(?i)\bst\.", lambda m: "street"),
    (r"\b[Nn]o\.(?=\s*\d)", lambda m: "number"),
    (r"(?i)\b(" + "|".join(map(re.escape, _ABBREVIATIONS)) + r")\.(?!\w)", _abbreviation),
    (r"\b((?:[A-Z]\.){2,})", lambda m: " ".join(m[1].replace(".", " ").split())),
    (r"\b(\d+)(?:st|nd|rd|th)\b", lambda m: _words(m[1][:15], "ordinal")),
    (
        rf"({_NUMBER})\s?(" + "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True)) + r")(?!\w)",
        lambda m: f"{_number(m[1])} {_many(_UNITS[m[2]], m[1])}",
    ),
    (r"\b(1[1-9]\d\d|20\d\d)s\b", lambda m: re.sub(r"y$", "ie", _year(m[1])) + "s"),
    (r"(?<![\d.,-])(1[1-9]\d\d|20\d\d)(?![\d]|[.,]\d)", lambda m: _year(m[1])),
    (r"\b1/2\b", lambda m: "one half"),
    (rf"({_NUMBER})", lambda m: f" {_number(m[1])} "),
    (f"[{re.escape(''.join(_SIGNS))}]", lambda m: _SIGNS[m[0]]),
)


def english(text: str) -> str:
    """Without digits, signs and abbreviations: "Dr. Ruth paid $5.20 on 3/5/2024." -> "doctor Ruth paid five dollars and
    twenty cents on March fifth, twenty twenty-four."; numbers are num2words'."""
    text = tidy(text)
    for pattern, said in _RULES:
        text = re.sub(pattern, said, text)
    return re.sub(r"\s+([,.?!;:])", r"\1", " ".join(text.split()))


_DIGITS, _PLACES = "零一二三四五六七八九", ("", "十", "百", "千")


def _chinese_number(text: str) -> str:
    whole, _, part = text.replace(",", "").partition(".")
    tail = "点" + "".join(_DIGITS[int(d)] for d in part) if part else ""
    if len(whole) > 12 or (len(whole) > 1 and whole[0] == "0"):
        return "".join(_DIGITS[int(d)] for d in whole) + tail
    said = ""
    for i, digit in enumerate(whole):
        place = len(whole) - 1 - i
        if digit != "0":
            said += _DIGITS[int(digit)] + _PLACES[place % 4]
        elif said and said[-1] != "零":
            said += "零"
        if place % 4 == 0 and place and int(whole[max(0, i - 3) : i + 1]):
            said = said.rstrip("零") + ("", "万", "亿")[place // 4] + ("零" if digit == "0" else "")
    said = said.rstrip("零") or "零"
    return (said[1:] if said.startswith("一十") else said) + tail


_CHINESE: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})(?!\d)",
        lambda m: f"{m[1]}年{_chinese_number(str(int(m[2])))}月{_chinese_number(str(int(m[3])))}日",
    ),
    (r"(\d{4}|\d\d)(?=年)", lambda m: "".join(_DIGITS[int(d)] for d in m[1])),
    (
        r"(?<!\d)(\d{1,2}):(\d\d)(?![\d:])",
        lambda m: (
            f"{_chinese_number(str(int(m[1])))}点" + (f"{_chinese_number(str(int(m[2])))}分" if int(m[2]) else "")
        ),
    ),
    (rf"({_NUMBER})\s?%", lambda m: "百分之" + _chinese_number(m[1])),
    (rf"[¥￥]\s?({_NUMBER})", lambda m: _chinese_number(m[1]) + "元"),
    (rf"\$\s?({_NUMBER})", lambda m: _chinese_number(m[1]) + "美元"),
    (r"(?<![\w])-(?=\d)", lambda m: "负"),
    (rf"({_NUMBER})\s?(?:°C|℃)", lambda m: _chinese_number(m[1]) + "摄氏度"),
    (r"1\d{10}(?!\d)", lambda m: "".join(_DIGITS[int(d)] for d in m[0])),
    (rf"({_NUMBER})", lambda m: _chinese_number(m[1])),
)


def chinese(text: str) -> str:
    """Without digits: "2024年3月5日，¥10.5" -> "二零二四年三月五日,十点五元"."""
    text = unicodedata.normalize("NFKC", text)
    for pattern, said in _CHINESE:
        text = re.sub(pattern, said, text)
    return text
