"""Voice commands: which word was said, by a network small enough for a microphone's own processor.

python launch.py --config=configs/commands.py                                       whistled words made by the program
python launch.py --config=configs/commands.py:root=DIR                              CLASS/*.wav, {train,test}/CLASS/*
python launch.py --config=configs/commands.py:root=TABLE.csv                        columns path, label and split
python launch.py --config=configs/commands.py:root=DIR,rate=8000,tau=2              telephone speech, a wider network
python launch.py --config=configs/commands.py:root=DIR,names=label_speaker_take     7_jackson_32.wav, ... in one folder
python launch.py --config=configs/commands.py:root=TABLE.csv,noise=DIR,spot         and words in continuous sound
python launch.py --config=configs/commands.py:root=DIR,speed=0.2,epochs=100         more varied, and longer
python launch.py --mode=predict --workdir=runs/commands --input='*.wav'
python launch.py --mode=predict --workdir=runs/commands --input=hours.wav --answers=spotting

A recording is ``seconds`` long: what is longer is cut to its middle. WAV, FLAC, Ogg and MP3 at any rate are read with
the extra [speech]: pip install 'bigbase_jax[speech]'.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.audio.labelled import LabelledAudio
from bigbase_jax.data.sources.synthetic.sounds import WhistledWords
from bigbase_jax.data.transforms import audio as A
from bigbase_jax.evaluators.spotting import Spotting
from bigbase_jax.models.bc_resnet import BCResNet
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.audio_classification import AudioClassification
from bigbase_jax.train import TrainConfig

HOP = 0.1  # seconds from window to window in recordings that are longer, with ``spot``


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=DIR_OR_TABLE, rate=16000, seconds=1.0, tau=1.5 and stride=1 (of BC-ResNet), epochs=60, speed=0.1,
    path=COLUMN, label=COLUMN, names=label_speaker_take, held_out=COLUMN:VALUE/VALUE, group=COLUMN,
    noise=DIR, rooms=DIR, spot, tiny."""
    columns = {"path": None, "label": None, "names": None, "held_out": None, "group": None}  # of LabelledAudio
    net = {"tau": 1.5, "stride": 1}
    varied = {"speed": 0.1, "noise": None, "rooms": None}
    args = parse_arg(
        arg, root=None, rate=16_000, seconds=1.0, epochs=60.0, **net, **varied, **columns, spot=False, tiny=False
    )
    if not 0.1 <= args.seconds <= 60:
        raise UserError(f"seconds={args.seconds}; a command has 0.1 to 60.")
    few = {"rate": 4000, "num_train": 48, "num_val": 24, "num_test": 24} if args.tiny else {"rate": args.rate}
    rate = args.rate if args.root else few["rate"]
    samples = round(args.seconds * rate)
    if args.root:
        dataset = target(LabelledAudio, root=args.root, rate=rate, **{key: getattr(args, key) for key in columns})
        if args.spot:
            dataset.window, dataset.hop = args.seconds, HOP
    else:
        dataset = target(WhistledWords, **few)

    model = target(BCResNet, tau=args.tau, stride=args.stride)
    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=dataset,
        batch_size=8 if args.tiny else 64,
        eval_batch_size=24 if args.tiny else 128,
        train_transforms=(
            target(A.Speed, most=args.speed),
            target(A.PadOrCrop, samples=samples, shift=rate // 10),
            target(A.RecordedRoom, folder=args.rooms, rate=rate) if args.rooms else target(A.Room, rate=rate),
            target(A.RecordedNoise, folder=args.noise, rate=rate) if args.noise else target(A.Noise),
            target(A.Gain),
        ),
        eval_transforms=(target(A.PadOrCrop, samples=samples), target(A.Floats)),
    )
    config.task = target(
        AudioClassification,
        model=target(BCResNet, tau=0.5, depths=(1, 1, 1, 1)) if args.tiny else model,
        rate=rate,
        label_smoothing=0.1,
        time_masks=(2, 20),
        frequency_masks=(2, 5),
    )
    if args.spot:
        config.evaluators = ConfigDict({"spotting": target(Spotting, window=args.seconds, hop=HOP)})
    config.optim = target(
        Optimizer,
        learning_rate=5e-3,
        algorithm=deferred(optax.adamw),
        schedule=deferred(optax.cosine_decay_schedule),
        warmup=0.05,
        weight_decay=0.02,
    )
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4, ema_decay=0.9)
    else:
        epochs = args.epochs if args.root else 8.0
        config.train = target(TrainConfig, epochs=epochs, log_every=50, ema_decay=0.99)
    return config
