"""Writes sentences.csv: what people say to a form, by what they want. Drawn from a grammar, and said to be so.

python experiments/assistant/sentences.py

The grammar is AN4's, as its training transcripts show it: words of control, letters, numbers and dates. Recognisers
write numbers as words or as figures, so sentences have both.
"""

import csv
import pathlib
import random

FILE = pathlib.Path(__file__).with_name("sentences.csv")
UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
DAYS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
]
NAMES = [
    "smith",
    "jones",
    "young",
    "garcia",
    "becker",
    "miller",
    "patterson",
    "walsh",
    "kelly",
    "novak",
    "rossi",
    "tanaka",
]


def spelt(number, figures):
    """A number below a hundred."""
    if figures:
        return str(number)
    if number < 20:
        return (UNITS + TEENS)[number]
    return " ".join([TENS[number // 10 - 2], *([UNITS[number % 10]] if number % 10 else [])])


def numbers(rng, least=1, most=4):
    figures = rng.random() < 0.4
    found = [
        spelt(rng.choice((rng.randrange(10), rng.randrange(100))), figures) for _ in range(rng.randint(least, most))
    ]
    return " ".join(found)


def letters(rng, least=2, most=6):
    if rng.random() < 0.4:
        return " ".join(rng.choice(NAMES))
    return " ".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(least, most)))


def code(rng):
    return f"{letters(rng, 1, 5)} {numbers(rng, 1, 2)}"


def date(rng):
    day = rng.choice((rng.choice(DAYS), spelt(rng.randrange(1, 32), rng.random() < 0.4)))
    year = rng.choice((f"nineteen {spelt(rng.randrange(20, 99), False)}", f"19{rng.randrange(20, 99)}"))
    return f"{rng.choice(MONTHS)} {day} {year}"


INTENTS = {
    "enter": lambda rng: f"enter {rng.choice((numbers, code))(rng)}",
    "erase": lambda rng: f"{rng.choice(('erase', 'rubout', 'rub out', 'erase', 'rubout'))} {code(rng)}",
    "spell": lambda rng: rng.choice((letters, code))(rng),
    "number": lambda rng: numbers(rng, 1, 7),
    "date": date,
    "help": lambda rng: rng.choice(("help", "help me", "i need help")),
    "repeat": lambda rng: rng.choice(("repeat", "repeat that", "again")),
    "start": lambda rng: rng.choice(("start", "go", "begin")),
    "stop": lambda rng: rng.choice(("stop", "stop it", "end")),
    "yes": lambda rng: rng.choice(("yes", "yes please", "yeah")),
    "no": lambda rng: rng.choice(("no", "no thanks", "nope")),
}


def main():
    rng, rows = random.Random(0), []
    for label, drawn in INTENTS.items():
        rows += [(drawn(rng), label) for _ in range(56)]
    rng.shuffle(rows)
    with open(FILE, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("text", "label"), *rows])


if __name__ == "__main__":
    main()
