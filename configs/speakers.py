"""Whose voice it is: vectors by which any two recordings are compared, of people that the training never heard too.

python launch.py --config=configs/speakers.py                                        words made by the program
python launch.py --config=configs/speakers.py:root=DIR                               one folder for each speaker
python launch.py --config=configs/speakers.py:root=TABLE.csv,label=speaker           columns path, speaker and split
python launch.py --config=configs/speakers.py:root=DIR,names=digit_speaker_take,label=speaker,held_out=speaker:ann/bob
python launch.py --mode=predict --workdir=runs/speakers --input='*.wav' --output=vectors.jsonl

ECAPA-TDNN (Desplanques et al. 2020) with an angular margin (AAM-softmax; Deng et al. 2019). The cosine of two vectors
is their score; ``verification`` in the results has the equal error rate over the pairs of the test split.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.audio.labelled import LabelledAudio
from bigbase_jax.data.sources.synthetic.sounds import WhistledWords
from bigbase_jax.data.transforms import audio as A
from bigbase_jax.evaluators.verification import Verification
from bigbase_jax.models.ecapa import ECAPA
from bigbase_jax.models.margin import CosineHead
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.verification import SpeakerVerification
from bigbase_jax.train import TrainConfig


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=DIR_OR_TABLE, rate=16000, seconds=1.0, channels=128 (512 as published), dim=192, epochs=20,
    path=COLUMN, label=COLUMN, names=digit_speaker_take, held_out=COLUMN:VALUE/VALUE, group=COLUMN, tiny."""
    columns = {"path": None, "label": None, "names": None, "held_out": None, "group": None}  # of LabelledAudio
    args = parse_arg(
        arg, root=None, rate=16_000, seconds=1.0, channels=128, dim=192, epochs=20.0, **columns, tiny=False
    )
    few = {"rate": 4000, "num_train": 48, "num_val": 24, "num_test": 24} if args.tiny else {"rate": args.rate}
    rate = args.rate if args.root else few["rate"]
    samples = round(args.seconds * rate)
    if args.root:
        given = {key: getattr(args, key) for key in columns}
        dataset = target(LabelledAudio, root=args.root, rate=rate, **given, open_set=bool(args.names))
    else:
        dataset = target(WhistledWords, **few)

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=dataset,
        batch_size=8 if args.tiny else 64,
        eval_batch_size=24 if args.tiny else 128,
        train_transforms=(
            target(A.PadOrCrop, samples=samples, shift=rate // 10),
            target(A.Room, rate=rate),
            target(A.Noise),
            target(A.Gain),
        ),
        eval_transforms=(target(A.PadOrCrop, samples=samples), target(A.Floats)),
    )
    sizes = {"channels": 16, "dim": 16, "squeeze": 8, "parts": 4} if args.tiny else {"squeeze": args.channels // 4}
    body = target(ECAPA, **{"channels": args.channels, "dim": args.dim, **sizes})
    config.task = target(
        SpeakerVerification,
        model=target(CosineHead, body=body),
        rate=rate,
        time_masks=(1, 10),
        frequency_masks=(1, 5),
    )
    config.evaluators = ConfigDict({"verification": target(Verification)})
    config.optim = target(
        Optimizer,
        learning_rate=2e-3,
        algorithm=deferred(optax.adamw),
        schedule=deferred(optax.cosine_decay_schedule),
        warmup=0.1,
        weight_decay=0.02,
    )
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4, ema_decay=0.9)
    else:
        config.train = target(TrainConfig, epochs=args.epochs if args.root else 8.0, log_every=50, ema_decay=0.99)
    return config
