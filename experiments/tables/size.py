"""A made-up table that is long (10^7 rows of 14 columns, 1.0 GB) or wide (3,000 rows of 10^4 columns, 0.2 GB).

python experiments/tables/size.py --form=long --output=long.csv
"""

import argparse

import numpy as np
import pyarrow as pa
from pyarrow import csv


def long(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Eight numbers, four categories of 50 names, ids of 10^12, and a class that the first two columns tell."""
    x, c = rng.normal(size=(rows, 8)).round(4), rng.integers(0, 50, (rows, 4))
    y = x[:, 0] + c[:, 0] / 25 + rng.normal(size=rows) > 1
    categories = {f"c{i}": np.char.add("v", c[:, i].astype(str)) for i in range(4)}
    ids = 10**12 + rng.integers(0, 10**6, rows)
    return {**{f"x{i}": x[:, i] for i in range(8)}, **categories, "id": ids, "y": np.where(y, "yes", "no")}


def wide(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """10^4 numbers, of which the first tells the class."""
    x = rng.normal(size=(rows, 10_000)).round(3)
    y = x[:, 0] + rng.normal(size=rows) > 0
    return {**{f"x{i}": x[:, i] for i in range(x.shape[1])}, "y": np.where(y, "yes", "no")}


FORMS = {"long": (long, 10_000_000, 250_000), "wide": (wide, 3_000, 500)}  # rows of all and of a block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", choices=FORMS, required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    make, rows, block = FORMS[args.form]
    rng = np.random.default_rng(0)
    with open(args.output, "wb") as file:
        for start in range(0, rows, block):
            csv.write_csv(pa.table(make(rng, block)), file, csv.WriteOptions(include_header=start == 0))


if __name__ == "__main__":
    main()
