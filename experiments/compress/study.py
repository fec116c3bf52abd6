"""Trains a model, makes it smaller in every way that docs/compress.md, distil.md and export.md know, measures each.

python experiments/compress/study.py sst2 --data=DIR --runs=RUNS [--seeds=0,1,2] [--only=REGEX] [--list]
python experiments/compress/study.py sst2 --table

Each step is one command of launch.py, in a process of its own; a step whose folder is whole is not repeated, so that
the same command goes on where it was stopped. What a step measured is a line of results.jsonl beside this file.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.jsonl"


@dataclasses.dataclass(frozen=True)
class Study:
    """How a model is trained, pruned, trained on and taught.

    Attributes:
      config: recipe and its arguments, where {data} is the folder of data sets.
      own: further words of every training.
      metric, better: what is compared.
      prune: shares of the FLOPs that stay -> words of --prune.
      tune: words of the training after pruning.
      student: words that make it a quarter of the parameters, where {task} is the path of the innermost task.
      taught, alone: words of its training with the teacher, and without one.
      taught_config: further arguments of the student's recipe with a teacher.
    """

    config: str
    metric: str
    prune: dict[str, str]
    tune: tuple[str, ...]
    student: tuple[str, ...]
    taught: tuple[str, ...]
    alone: tuple[str, ...]
    own: tuple[str, ...] = ()
    better: str = "max"
    taught_config: str = ""


STUDIES = {
    "sst2": Study(
        "text_classify.py:root={data}/sst2,length=40,vocab=8192",
        metric="accuracy",
        prune={
            "75": "heads=0.25,mlp=0.25,score=taylor",
            "50": "heads=0.5,mlp=0.5,score=taylor",
            "25": "heads=0.75,mlp=0.75,score=taylor",
            "50-layers": "layers=0.5,score=taylor",
        },
        tune=("--config.train.epochs=1", "--config.optim.learning_rate=3e-4"),
        student=("--config.{task}.model.width=40",),
        taught=("--config.train.epochs=8",),
        alone=("--config.train.epochs=8",),
    ),
    "photos": Study(
        "catdog.py:data=folder,root={data}/cats_dogs_256",
        metric="accuracy",
        prune={
            "75": "channels=0.15,score=taylor",
            "50": "channels=0.3,score=taylor",
            "25": "channels=0.5,score=taylor",
            "46-of-8": "channels=0.33333,score=taylor",  # widths that 8 divides
        },
        tune=("--config.train.epochs=12", "--config.optim.learning_rate=1e-3"),
        student=("--config.{task}.model.stages=(12,24,48,96,96)",),
        taught=("--config.train.epochs=15",),
        alone=("--config.train.epochs=15",),
    ),
    "translation": Study(
        "translate.py:root={data}/multi30k/data/task1/raw,source=en,target=de,vocab=4096,size=mini",
        metric="bleu",
        own=("--config.train.steps=440", "--config.train.eval_every=440"),
        prune={
            "75": "heads=0.25,mlp=0.25,score=taylor",
            "50": "heads=0.5,mlp=0.5,score=taylor",
            "25": "heads=0.75,mlp=0.75,score=taylor",
        },
        tune=(
            "--config.train.steps=110",
            "--config.train.eval_every=110",
            "--config.optim.warmup=20",
            "--config.optim.learning_rate=1e-3",
        ),
        student=("--config.{task}.model.width=56", "--config.{task}.model.mlp_dim=224"),
        taught=(),
        alone=(),
    ),
    "resnet": Study(  # 18 layers of width 32
        "catdog.py:data=folder,root={data}/cats_dogs_256,model=resnet",
        metric="accuracy",
        own=("--config.train.epochs=12",),
        prune={
            "75": "channels=0.15,score=taylor",
            "50": "channels=0.3,score=taylor",
            "25": "channels=0.5,score=taylor",
        },
        tune=("--config.train.epochs=3", "--config.optim.learning_rate=1e-3"),
        student=("--config.{task}.model.width=16",),
        taught=(),
        alone=(),
    ),
    "decoder": Study(  # 10.6 M parameters; 300 steps of 2,048 characters are a start, not the 20.5 M of nanoGPT's
        "lm.py:data=text,root={data}/tiny_shakespeare/input.txt,tokenizer=chars,size=baby",
        metric="loss",
        better="min",
        own=(
            "--config.data.batch_size=8",
            "--config.train.steps=300",
            "--config.train.eval_every=300",
            "--config.{task}.model.dropout=0.0",
        ),
        prune={
            "75": "heads=0.33,mlp=0.25,score=taylor",
            "50": "heads=0.5,mlp=0.5,score=taylor",
            "25": "heads=0.67,mlp=0.75,score=taylor",
        },
        tune=(
            "--config.train.steps=75",
            "--config.train.eval_every=75",
            "--config.optim.warmup=10",
            "--config.optim.learning_rate=5e-4",
        ),
        student=("--config.{task}.model.width=192",),
        taught=(),
        alone=(),
    ),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One command: what it makes, and the words of launch.py."""

    name: str
    folder: pathlib.Path
    words: tuple[str, ...]


def steps(name: str, study: Study, seed: int, runs: pathlib.Path, data: str) -> list[Step]:
    """In the order in which they need one another."""
    place = runs / f"{name}-{seed}"
    seeds = (f"--config.seed={seed}", f"--config.data.seed={seed}")
    config = study.config.format(data=data)
    found: list[Step] = []

    def step(variant: str, *words: str, at: str = "workdir") -> None:
        found.append(Step(variant, place / variant, (*words, f"--{at}={place / variant}")))

    def trained(variant: str, *words: str, config: str = f"--config=configs/{config}") -> None:
        path = "task.task" if "distil.py" in config else "task"
        step(variant, config, *seeds, *(word.format(task=path) for word in (*study.own, *words)))

    def compressed(variant: str, parent: str, *words: str) -> None:
        step(variant, "--mode=compress", f"--workdir={place / parent}", *words, at="output")

    trained("base")
    compressed("int8", "base", "--quantize=int8")
    compressed("int4", "base", "--quantize=int4")
    recipe, _, arg = config.partition(".py:")
    taught = f"--config=configs/distil.py:recipe={recipe},{arg}{study.taught_config}"
    for share, words in study.prune.items():
        compressed(f"pruned-{share}", "base", f"--prune={words}")
        start = (*study.tune, f"--config.init_from={place / f'pruned-{share}'}")
        trained(f"tuned-{share}", *start)
        trained(f"taught-{share}", *start, f"--config.teacher={place / 'base'}", config=taught)
    trained("alone", *study.student, *study.alone)
    trained("distilled", *study.student, *study.taught, f"--config.teacher={place / 'base'}", config=taught)
    compressed("tuned-50-int8", "tuned-50", "--quantize=int8")
    compressed("distilled-int8", "distilled", "--quantize=int8")
    for variant, words in {
        "onnx": ("--to=onnx",),
        "onnx-int8": ("--to=onnx", "--quantize=int8"),
        "stablehlo": ("--to=stablehlo",),
    }.items():
        allowed = "--allow_drop=100"  # what differs is measured, and nothing refused
        step(variant, "--mode=export", f"--workdir={place / 'base'}", *words, allowed, at="output")
    return found


def whole(step: Step) -> bool:
    """Whether there is all that a step makes."""
    return any((step.folder / name).exists() for name in ("eval-test.json", "eval-val.json", "proof.json"))


def take(step: Step) -> None:
    """Runs a step; its log ends with its core-seconds, user and system, compilation included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    step.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(step.folder.with_name(f"{step.name}.log"), "a") as log:
        subprocess.run(
            [sys.executable, "launch.py", *step.words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"core-seconds: {spent:.0f}", file=log)


def measured(study: Study, step: Step) -> dict:
    """What a step's folder says of its model."""
    found: dict = {}
    log = step.folder.with_name(f"{step.name}.log")
    said = log.read_text() if log.exists() else ""
    if spent := re.findall(r"^core-seconds: (\d+)", said, re.MULTILINE):
        found["core_seconds"] = sum(map(int, spent))
    if size := re.search(r"^total +([\d,]+)", said, re.MULTILINE):
        found["parameters"] = int(size[1].replace(",", ""))
        found["bytes"] = 4 * int(size[1].replace(",", ""))
    if flops := re.search(r"forward pass: (.+) per example", said):
        found["forward"] = flops[1]
    if (step.folder / "proof.json").exists():
        proof = json.loads((step.folder / "proof.json").read_text())
        found |= {"split": proof["split"], "bytes": proof["bytes"]["after"], "bytes_before": proof["bytes"]["before"]}
        found["same_answers"] = proof.get("same_answers")
        found["metrics"] = {key: x["after"] for key, x in proof["metrics"].items() if isinstance(x["after"], float)}
        about = proof["metrics"][study.metric]
        found["difference"] = [about[key] for key in ("low", "high") if key in about] or None
        return found
    path = next(
        step.folder / f"eval-{split}.json" for split in ("test", "val") if (step.folder / f"eval-{split}.json").exists()
    )
    result = json.loads(path.read_text())
    found |= {"split": result["split"], "step": result["step"]}
    found["metrics"] = {key: x for key, x in result.items() if isinstance(x, float)}
    lines = [json.loads(line) for line in (step.folder / "metrics.jsonl").read_text().splitlines()]
    if values := [line[study.metric] for line in lines if line.get("kind") == "eval" and line.get("split") == "val"]:
        found["val"] = max(values) if study.better == "max" else min(values)
    return found


def shown(words: tuple[str, ...], runs: pathlib.Path, data: str) -> str:
    """A command as anyone would type it."""
    return " ".join(("python launch.py", *words)).replace(str(runs), "RUNS").replace(data, "DATA")


def records() -> list[dict]:
    """The last line of each step."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return list({(x["study"], x["seed"], x["variant"]): x for x in map(json.loads, lines)}.values())


def keep(record: dict) -> None:
    with open(RESULTS, "a") as file:
        print(json.dumps(record), file=file)


def table(name: str) -> None:
    """Markdown: a row for each variant, over its seeds."""
    study = STUDIES[name]
    rows: dict[str, list[dict]] = {}
    for record in records():
        if record["study"] == name:
            rows.setdefault(str(record["variant"]), []).append(record)
    scale = 100 if study.metric == "accuracy" else 1
    base = {row["seed"]: row["metrics"][study.metric] for row in rows["base"]}
    full = next(row["bytes_before"] for found in rows.values() for row in found if "bytes_before" in row)
    print(f"| variant | test {study.metric} | mean | against the original | forward pass | bytes | core-seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for variant, found in rows.items():
        found.sort(key=lambda row: row["seed"])
        values = [scale * row["metrics"][study.metric] for row in found]
        apart = [scale * (row["metrics"][study.metric] - base[row["seed"]]) for row in found if row["seed"] in base]
        size = statistics.fmean(row.get("bytes", full) for row in found)
        spent = [row["core_seconds"] for row in found if row.get("core_seconds")]
        digits = 2 if scale == 100 else 3
        print(
            f"| {variant} | {', '.join(f'{x:.{digits}f}' for x in values)} | {statistics.fmean(values):.{digits}f} "
            f"| {statistics.fmean(apart):+.{digits}f} | {found[0].get('forward', '')} "
            f"| {size / 1e6:.2f} MB ({size / full:.0%}) | {f'{statistics.fmean(spent):.0f}' if spent else ''} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", default=os.environ.get("BIGBASE_DATA"))
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/compress"))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default="", help="of the steps, those whose names this expression finds")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    parser.add_argument("--table", action="store_true", help="print what results.jsonl holds")
    args = parser.parse_args()
    if args.table:
        return table(args.study)
    if not args.data:
        parser.error("--data=DIR or BIGBASE_DATA: the folder of the data sets")
    study, runs = STUDIES[args.study], args.runs.resolve()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for seed in map(int, args.seeds.split(",")):
        for step in steps(args.study, study, seed, runs, args.data):
            command = shown(step.words, runs, args.data)
            if not re.search(args.only, step.name):
                continue
            if args.list:
                print(command)
                continue
            known = {(r["study"], r["seed"], r["variant"]) for r in records()}
            if whole(step) and (args.study, seed, step.name) in known:
                continue
            print(f"{step.name} {seed}: {command}", flush=True)
            if not whole(step):
                take(step)
            about = {"command": command, "commit": commit.stdout.strip()}
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            keep(
                {
                    "study": args.study,
                    "seed": seed,
                    "variant": step.name,
                    **about,
                    "date": today,
                    **measured(study, step),
                }
            )


if __name__ == "__main__":
    main()
