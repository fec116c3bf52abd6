"""A vocoder: sound from mel bands by a small Vocos, trained on recordings alone.

python launch.py --config=configs/vocoder.py                             whistled words made by the program
python launch.py --config=configs/vocoder.py:root=DIR                    every recording below DIR
python launch.py --config=configs/vocoder.py:root=DIR,test=arctic_b04    files from this name on are for testing
python launch.py --config=configs/vocoder.py:root=DIR,judges=true        adversarial training, about twice the time

A voice (configs/voice.py) speaks through it where its mel bands are of the same rate. Griffin-Lim's algorithm needs no
training and sounds worse. Recordings are read with the extra [speech]: pip install 'bigbase_jax[speech]'.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.audio.features import vocoder_mel
from bigbase_jax.build import deferred, parse_arg, target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.audio.plain import PlainAudio
from bigbase_jax.data.sources.synthetic.sounds import WhistledWords
from bigbase_jax.data.transforms import audio as A
from bigbase_jax.models.vocos import Judges, Vocos
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.vocoding import Vocoding
from bigbase_jax.train import TrainConfig


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=DIR, rate=16000, test=NAME, steps=4000, judges=false, tiny."""
    args = parse_arg(arg, root=None, rate=16_000, test=None, steps=4000, judges=False, tiny=False)
    rate = 4000 if args.tiny and not args.root else args.rate
    features = vocoder_mel(rate)
    samples = rate // features.hop * features.hop  # one second
    if args.root:
        dataset = target(PlainAudio, root=args.root, rate=rate, test=args.test)
    elif args.tiny:
        dataset = target(WhistledWords, rate=rate, num_train=32, num_val=16, num_test=16)
    else:
        dataset = target(WhistledWords, rate=rate)

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=dataset,
        batch_size=8,
        eval_batch_size=8 if args.tiny else 16,
        train_transforms=(target(A.Piece, samples=samples), target(A.Gain, most=6.0)),
        eval_transforms=(target(A.PadOrCrop, samples=samples),),
    )
    small = {"width": 16, "depth": 2, "hidden": 32} if args.tiny else {}
    ffts = tuple(features.fft * n // 4 for n in (1, 2, 4, 8))
    config.task = target(
        Vocoding,
        model=target(Vocos, fft=features.fft, hop=features.hop, **small),
        rate=rate,
        ffts=ffts,
    )
    if args.judges:
        config.task.judges = target(Judges, ffts=ffts[1:3], width=16 if args.tiny else 128)
    config.optim = target(
        Optimizer,
        learning_rate=1e-3,
        algorithm=deferred(optax.adamw, b1=0.8, b2=0.9 if args.judges else 0.99),
        schedule=deferred(optax.cosine_decay_schedule),
        warmup=0.02,
        weight_decay=0.01,
    )
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4, ema_decay=0.9)
    else:
        steps = args.steps if args.root else 600
        config.train = target(TrainConfig, steps=steps, log_every=50, eval_every=500, ema_decay=0.995)
    return config
