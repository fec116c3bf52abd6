"""Clean data before training: duplicates, boilerplate, other languages, personal data; from files to Parquet.

python launch.py --config=configs/clean.py --mode=clean                       a folder that is dirty on purpose
python launch.py --mode=clean --config=configs/clean.py:root=DIR,out=DIR2     .txt, .jsonl, .csv, .parquet, .html, ...
python launch.py --mode=clean --config=configs/clean.py:root=DIR,out=DIR2 --engine=ray --address=HOST:PORT
python launch.py --mode=clean --config=configs/clean.py:root=DIR,out=DIR2 --forget=ID,FILE_OF_IDS
python launch.py --mode=clean --config=configs/clean.py:root=DIR,out=DIR2,rows=age+income+class,target=class     tables
python launch.py --config=configs/lm.py:data=text,root=DIR2                   train on it

DIR2 has the files to train on, card.md and clean.html: what was dropped, why, with examples. Steps run on Daft; killed
at any of them, the same command goes on. Measured in experiments/clean: megabytes per second and core of each step,
memory, planted duplicates found, and what cleaning gives back to a language model.
"""

from ml_collections import ConfigDict

from bigbase_jax.build import parse_arg, target
from bigbase_jax.clean.command import Clean
from bigbase_jax.clean.duplicates import Decontaminate, ExactDuplicates, Mix, NearDuplicates
from bigbase_jax.clean.pii import PII
from bigbase_jax.clean.read import Read
from bigbase_jax.clean.tables import RowChecks, Rows
from bigbase_jax.clean.text import Language, Normalise, Quality, Rules


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=DIR, out=DIR2, columns=title+body, id=COLUMN, keep=source+license+url, unit=file|line|paragraph,
    languages=en+zh, words=50 (that a document has at least), quality=RUN, good=CLASS (of that run), against=TEST_SET,
    pii=mask|replace|drop|none, mix=wiki:2+reviews:1, rows=COLUMN+COLUMN (of tables, in the place of texts) and
    target=COLUMN, workers=2 (0: none), tiny (a document has 10 words).
    """
    args = parse_arg(
        arg,
        root="docs/examples/dirty",
        out="runs/clean",
        columns=None,
        id=None,
        keep="source+license+url",
        unit="file",
        languages="",
        words=50,
        quality=None,
        good="1",
        against=None,
        pii="mask",
        mix=None,
        rows=None,
        target=None,
        workers=-1,
        tiny=False,
    )

    def several(text: str | None) -> tuple[str, ...]:
        return tuple(filter(None, (text or "").split("+")))

    steps = [
        target(Normalise),
        target(ExactDuplicates),  # before what is slow
        target(Language, only=several(args.languages)),
        target(Rules, thresholds={"all": {"words_min": 10 if args.tiny else args.words}}),
    ]
    if args.quality:
        steps.append(target(Quality, workdir=args.quality, label=args.good))
    steps += [target(NearDuplicates), target(Decontaminate, against=args.against)]
    if args.pii != "none":
        steps.append(target(PII, action=args.pii))
    if args.mix:
        weights = dict(part.rsplit(":", 1) for part in several(args.mix))
        steps.append(target(Mix, weights={name: float(weight) for name, weight in weights.items()}))

    read = target(Read, columns=several(args.columns), id=args.id, keep=several(args.keep), unit=args.unit)
    if columns := several(args.rows):
        read = target(Rows, columns=columns, id=args.id)
        steps = [target(RowChecks, columns=columns, answer=args.target), target(ExactDuplicates)]

    config = ConfigDict()
    config.clean = target(
        Clean,
        root=args.root,
        out=args.out,
        read=read,
        steps=tuple(steps),
        workers=None if args.workers < 0 else args.workers,
    )
    return config
