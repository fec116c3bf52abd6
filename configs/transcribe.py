"""Whisper taught more: what is said in a recording, written token by token.

python launch.py --config=configs/transcribe.py                                    from scratch, on tones of the program
python launch.py --config=configs/transcribe.py:root=DIR --config.init_from=WHISPER               all weights of Whisper
python launch.py --config=configs/transcribe.py:root=DIR,adapt=lora,language=de --config.init_from=WHISPER
python launch.py --mode=predict --workdir=runs/transcribe --input='*.wav'                           text and its times

WHISPER is a folder of published weights, tiny to large-v3; its tokenizer comes with it. What root may be is said in
configs/speech.py. A window has 30 s, as published, however short the recordings are; from scratch it has 6.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.audio.transcribed import TranscribedAudio
from bigbase_jax.data.sources.synthetic.sounds import SpokenTones
from bigbase_jax.data.transforms import audio as A
from bigbase_jax.models.whisper import Whisper
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.transcription import RATE, Transcription
from bigbase_jax.text.tokenizer import TranscriptBytes
from bigbase_jax.train import TrainConfig
from bigbase_jax.wrappers.lora import LoRA


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=DIR_OR_TABLE, seconds=30.0 (the longest recording), language=en (of the transcripts; left out for
    models of English alone), adapt=full|lora, normalisation=none|words (of what is learned), epochs=3, batch=16,
    tiny."""
    args = parse_arg(
        arg,
        root=None,
        seconds=30.0,
        language="",
        adapt="full",
        normalisation="none",
        epochs=3.0,
        batch=16,
        tiny=False,
    )
    if args.adapt not in ("full", "lora"):
        raise UserError(f"there is no adapt={args.adapt}.{suggest(args.adapt, ('full', 'lora'), 'value')}")
    if not 0.5 <= args.seconds <= 30:
        raise UserError(f"seconds={args.seconds}; Whisper hears 0.5 to 30 at once.")
    lora, scratch = args.adapt == "lora", not args.root
    seconds = 6.0 if scratch else args.seconds
    shared = {"rate": RATE, "frame_seconds": 0.001, "tokenizer": target(TranscriptBytes)}
    if scratch:
        few = {"num_train": 16, "num_val": 8, "num_test": 8} if args.tiny else {}
        dataset = target(SpokenTones, **few, **shared)
    else:
        words = {"seconds": seconds, "normalisation": args.normalisation, "order": 0}
        dataset = target(TranscribedAudio, root=args.root, **words, **shared)
    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    padded = target(A.Padded, samples=round(seconds * RATE))
    config.data = target(
        Data,
        dataset=dataset,
        batch_size=8 if args.tiny else args.batch,
        train_transforms=(padded,),
        eval_transforms=(padded,),
    )
    model = target(
        Whisper,
        frames=600 if scratch else 3000,
        length=128 if scratch else 448,
        width=16 if args.tiny else 128,
        depth=1 if args.tiny else 3,
        heads=2 if args.tiny else 4,
    )
    task = target(
        Transcription,
        model=model,
        language=args.language or None,
        timestamps=False,
        temperatures=(0.0,),
        max_length=128 if scratch else None,
    )
    config.task = (
        target(LoRA, task=task, rank=16, alpha=32.0, targets="(query|key|value|out|up|down)$") if lora else task
    )
    config.optim = target(
        Optimizer,
        learning_rate=5e-4 if lora or scratch else 1e-5,
        algorithm=deferred(optax.adamw, b2=0.98),
        schedule=deferred(optax.cosine_decay_schedule),
        warmup=0.1,
        clip_norm=1.0,
    )
    if args.tiny:
        config.train = target(TrainConfig, steps=4, log_every=2, eval_every=4)
    else:
        config.train = target(TrainConfig, epochs=args.epochs, log_every=20, best_metric="wer", best_mode="min")
    return config
