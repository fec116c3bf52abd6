"""How much of a voice is understood: word error rates of recordings, and of what the voice says of the same texts.

python experiments/voice/understood.py TEXTS.csv RECORDINGS SPOKEN --recogniser=FOLDER

TEXTS.csv has the columns name and text; RECORDINGS holds NAME.* of each; SPOKEN is what ``--mode=predict`` has written
of it. The recogniser is a run or a published folder; with --transcripts=FILE (lines PATH<TAB>TEXT) another program has
listened already.
"""

import argparse
import csv
import json
import pathlib

from bigbase_jax.tasks.metrics import transcripts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("texts", "recordings", "spoken"):
        parser.add_argument(name, type=pathlib.Path)
    parser.add_argument("--recogniser")
    parser.add_argument("--transcripts", type=pathlib.Path)
    args = parser.parse_args()
    rows = list(csv.DictReader(args.texts.open(encoding="utf-8")))
    answers = [json.loads(line) for line in (args.spoken / "answers.jsonl").read_text().splitlines()]
    recordings = {path.stem: path for path in sorted(args.recordings.iterdir())}
    paths = {
        "recordings": [recordings[row["name"]] for row in rows],
        "voice": [args.spoken / answer["file"] for answer in answers],
    }
    if args.transcripts:
        lines = (line.split("\t") for line in args.transcripts.read_text().splitlines())
        heard = {pathlib.Path(path).name: text for path, text in lines}
        texts = {what: [heard[path.name] for path in some] for what, some in paths.items()}
    else:
        from bigbase_jax.inference.predictor import Predictor

        predictor = Predictor.open(args.recogniser)
        texts = {what: [predictor.answer(str(path))[0] for path in some] for what, some in paths.items()}
        texts = {what: [str(a.get("text", a.get("label", ""))) for a in some] for what, some in texts.items()}
    for what, some in texts.items():
        scores = transcripts.scores(transcripts.errors(some, [row["text"] for row in rows]))
        print(json.dumps({"what": what, "utterances": len(some), **{k: round(v, 4) for k, v in scores.items()}}))


if __name__ == "__main__":
    main()
