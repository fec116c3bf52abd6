"""The rows of README.md's table, from ett.jsonl: the mean MSE of each model over its seeds, and how many they are."""

import collections
import json
import pathlib
import statistics

found = collections.defaultdict(list)
for line in (pathlib.Path(__file__).parent / "ett.jsonl").read_text().splitlines():
    row = json.loads(line)
    found[row["data"], int(row["horizon"]), row["model"]].append(row["mse"])
for data, horizon in sorted({key[:2] for key in found}):
    cells = []
    for model in ("dlinear", "nlinear", "patchtst"):
        mses = found.get((data, horizon, model), [])
        cells.append(f"{statistics.mean(mses):.3f} ({len(mses)})" if mses else "-")
    print(f"| {data} | {horizon} | {' | '.join(cells)} |")
