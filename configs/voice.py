"""A voice: text to speech by a small FastSpeech 2 that learns its own alignment.

python launch.py --config=configs/voice.py                             made-up tones and noises
python launch.py --config=configs/voice.py:root=DIR                    LJSpeech's layout: metadata.csv, wavs/
python launch.py --config=configs/voice.py:root=DIR,test=arctic_b04    what comes from this name on is for testing
python launch.py --config=configs/voice.py:root=DIR,rate=8000          digits, DIGIT_SPEAKER_TAKE.wav, by all speakers
python launch.py --mode=predict --workdir=runs/voice --input=texts.txt --output=DIR       a WAV file for each line

The evaluator "synthesis" compares what is said with the recordings; recogniser=RUN_OR_FOLDER also says how much of it
is understood. vocoder=RUN takes a trained vocoder (configs/vocoder.py, at the same rate) in the place of Griffin-Lim.
A table in the place of texts.txt may have the columns speaker, rate (0.5 to 2) and pitch (semitones). Recordings are
read with the extra [speech]; English is spoken by espeak-ng's phonemes where that program is installed.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.audio.voices import RecordedVoices
from bigbase_jax.data.sources.synthetic.sounds import SpokenTexts
from bigbase_jax.evaluators.synthesis import Synthesised
from bigbase_jax.models.fastspeech import FastSpeech
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.synthesis import Synthesis
from bigbase_jax.train import TrainConfig


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=DIR, rate=16000, language=en, test=NAME, seconds=10.0, steps=4000, vocoder=RUN,
    recogniser=RUN, tiny."""
    words = {"root": None, "rate": 16_000, "language": "en", "test": None, "seconds": 10.0, "steps": 4000}
    args = parse_arg(arg, **words, vocoder=None, recogniser=None, tiny=False)
    if args.root:
        dataset = target(
            RecordedVoices,
            root=args.root,
            rate=args.rate,
            language=args.language,
            test=args.test,
            seconds=args.seconds,
        )
    else:
        dataset = target(SpokenTexts, num=60 if args.tiny else 400)

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=dataset,
        batch_size=8 if args.tiny else 16,
        eval_batch_size=8 if args.tiny else 16,
        buckets=() if args.tiny else (128, 192, 256, 320),
    )
    small = {"width": 16, "hidden": 16, "encoder_layers": 1, "decoder_layers": 1} if args.tiny else {}
    config.task = target(Synthesis, model=target(FastSpeech, **(small or {"hidden": 256})), vocoder=args.vocoder)
    listens = target(Synthesised, examples=4 if args.tiny else 32, recogniser=args.recogniser)
    config.evaluators = ConfigDict({"synthesis": listens})
    config.optim = target(
        Optimizer,
        learning_rate=2e-3,
        algorithm=deferred(optax.adamw, b2=0.98),
        schedule=deferred(optax.cosine_decay_schedule),
        warmup=0.05,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4, ema_decay=0.9)
    else:
        steps = args.steps if args.root else 600
        config.train = target(TrainConfig, steps=steps, log_every=50, eval_every=500, ema_decay=0.99)
    return config
