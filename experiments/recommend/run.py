"""SASRec of this project and of RecBole on one log, one after the other on the same cores; see README.md.

python experiments/recommend/run.py games --recbole=PYTHON --recbole_epochs=1
python experiments/recommend/run.py movies --recbole=PYTHON --recbole_epochs=11

Core-seconds are the processor time of the processes: ours of the whole command, with compilation, the evaluations and
the report; RecBole's of its training epochs alone. Each line of results.jsonl is one model.
"""

import argparse
import csv
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
MEASURED = ("hr@10", "ndcg@10", "mrr", "coverage@10", "sampled/hr@10", "sampled/ndcg@10")


def recipes(data):
    """By study: the file of the log, arguments of the recipe, and flags."""
    movies = data / "ml_latest_small"
    long = ("--config.data.batch_size=32", "--config.train.epochs=100", "--config.train.eval_every=500")
    return {
        "games": (data / "amazon_video_games_sasrec" / "Video.txt", "loss=sampled_softmax", ()),
        "movies": (movies / "ratings.csv", f"items={movies / 'movies.csv'}", long),
    }


def measured(command, **how):
    """The last line that a command prints, as JSON, and what it took."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = []
    with subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True, **how) as process:
        for line in process.stdout:
            lines.append(line)
            print(line[:300].rstrip(), flush=True)
    if process.returncode:
        sys.exit(f"{command[:3]} ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [json.loads(line) for line in lines if line.startswith("{")], used, time.perf_counter() - begin


def ours(study, data, seed, more):
    log, arguments, flags = recipes(data)[study]
    workdir = ROOT / "runs" / f"recommend-{study}-{seed}"
    recipe = f"--config=configs/recommend.py:root={log},{arguments}"
    command = [sys.executable, "launch.py", recipe, f"--workdir={workdir}", f"--config.seed={seed}", *flags, *more]
    (result,), used, seconds = measured(command)
    ranking = result["ranking"]
    yield {"model": "SASRec, ours", "core_seconds": used, "seconds": seconds, **{k: ranking[k] for k in MEASURED}}
    for name, peer in ranking["peers"].items():
        yield {"model": name, **{k: peer[k] for k in MEASURED if k in peer}}


def recbole(study, data, python, epochs):
    log, *_ = recipes(data)[study]
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder) / study
        place.mkdir()
        with open(log) as file, open(place / f"{study}.inter", "w") as out:
            out.write("user_id:token\titem_id:token\ttimestamp:float\n")
            rows = [row for row in csv.reader(file, delimiter=" " if log.suffix == ".txt" else ",") if row[0].isdigit()]
            if len(rows[0]) > 2:
                rows.sort(key=lambda row: float(row[-1]))
            for number, (user, item, *_) in enumerate(rows):  # RecBole's times are float32: today's are 128 s apart
                out.write(f"{user}\t{item}\t{number}\n")
        found, *_ = measured(
            [python, HERE / "recbole_sasrec.py", place, f"--epochs={epochs}"], stderr=subprocess.DEVNULL
        )
    best = max(found, key=lambda row: row["valid_ndcg@10"])
    took = {key: best[key] for key in ("epoch", "core_seconds", "seconds")}
    yield {"model": "SASRec, RecBole", **took, "hr@10": best["test_hit@10"], "ndcg@10": best["test_ndcg@10"]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("study", choices=("games", "movies"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recbole", help="the Python of a virtual environment with RecBole 1.2.1; else it is left out")
    parser.add_argument("--recbole_epochs", type=int, default=1)
    args, more = parser.parse_known_args()
    data = pathlib.Path(os.environ["BIGBASE_DATA"])
    rows = [*ours(args.study, data, args.seed, more)]
    if args.recbole:
        rows += recbole(args.study, data, args.recbole, args.recbole_epochs)
    with open(HERE / "results.jsonl", "a") as file:
        for row in rows:
            line = json.dumps({"study": args.study, "seed": args.seed, **row})
            file.write(line + "\n")
            print(line)


main()
