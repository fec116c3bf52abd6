"""Speech recognition from scratch: what is said in a recording, by CTC.

python launch.py --config=configs/speech.py                               an alphabet of tones, made by the program
python launch.py --config=configs/speech.py:root=DIR                      LibriSpeech, AN4, Kaldi, tables, texts beside
python launch.py --config=configs/speech.py:root=TABLE.jsonl,seconds=20   columns path, text, offset, duration, split
python launch.py --config=configs/speech.py:root=DIR,rate=8000,tokenizer=unigram,vocab=200     telephone, subwords
python launch.py --config=configs/speech.py:root=DIR,encoder=conformer,chunk=16                that hears streams
python launch.py --mode=predict --workdir=runs/speech --input='*.wav'     text, words and their times
python launch.py --mode=predict --workdir=runs/speech --input='*.wav' --answers=beams      by beam search

Without a root, sentences are spelt in tones and noises, which are synthetic. With one, training utterances are heard at
three speeds, louder and softer, in rooms and under noise; batches are of about one length. The evaluator ``beams``
searches with an n-gram model of the training transcripts, whose weight it chooses on val. Recordings of WAV, FLAC, Ogg
and MP3 at any rate, and error rates, need the extra [speech]: pip install 'bigbase_jax[speech]'.

Measured on a core of an AMD EPYC (experiments/speech): AN4, seconds=7.2, 12.7 % of the words of the official test
are wrong, and 9.7 % by beam search with the n-grams of the training text, after 759 core-seconds. Published small
recipes have 10 to 13 %. yesno, with words as tokens and frames of 80 ms: 1.25 % of the words of the held-out 30, and
0.8 % by beam search, after 34 core-seconds; 0 % was the aim (JAX 0.10.2, seed 0, 2026-11-29 and 30).
"""

from typing import NamedTuple

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.presets import tokenizers
from bigbase_jax.data.sources.audio.transcribed import TranscribedAudio
from bigbase_jax.data.sources.synthetic.sounds import SpokenTones
from bigbase_jax.data.transforms import audio as A
from bigbase_jax.evaluators.transcripts import BeamSearch
from bigbase_jax.models.conformer import Conformer
from bigbase_jax.models.joint_ctc import JointCTC
from bigbase_jax.models.speech_encoder import CTC, SpeechEncoder
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.joint_recognition import JointRecognition
from bigbase_jax.tasks.recognition import Recognition
from bigbase_jax.text.tokenizer import Characters
from bigbase_jax.train import TrainConfig


class Size(NamedTuple):
    """A model and how it is trained."""

    width: int
    depth: int
    mels: int
    dropout: float
    learning_rate: float
    batch_size: int
    epochs: float


SIZES = {
    "tiny": Size(16, 1, 20, 0.0, 3e-3, 8, 1.0),
    "nano": Size(96, 4, 40, 0.05, 3e-3, 16, 12.0),
    "mini": Size(192, 8, 80, 0.1, 1.5e-3, 8, 45.0),
    "small": Size(256, 12, 80, 0.1, 1.5e-3, 32, 40.0),
    "base": Size(512, 16, 80, 0.1, 1e-3, 128, 60.0),
}
SUBSAMPLING = 4
ENCODERS = ("conv", "conformer")


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=DIR_OR_TABLE, rate=16000, seconds=16.0 (the longest utterance), vocab=200,
    tokenizer=chars|unigram|bpe|words|FILE, order=4 (of the n-gram language model), lm=FILE.arpa,
    size=nano|mini|small|base, epochs, path=COLUMN, text=COLUMN, encoder=conv|conformer, chunk=FRAMES (of 40 ms, at
    which a conformer can hear a stream), decoder=BLOCKS (trained and searched with CTC, which has a third of the say),
    tiny."""
    args = parse_arg(
        arg,
        root=None,
        rate=16_000,
        seconds=16.0,
        tokenizer="chars",
        vocab=200,
        order=4,
        lm=None,
        size=None,
        epochs=0.0,
        path=None,
        text=None,
        encoder="conv",
        chunk=0,
        decoder=0,
        tiny=False,
    )
    word = args.size or ("mini" if args.root else "nano")
    if word not in SIZES:
        raise UserError(f"there is no size={word}.{suggest(word, SIZES, 'size')}")
    if not 0.5 <= args.seconds <= 120:
        raise UserError(f"seconds={args.seconds}; an utterance has 0.5 to 120.")
    if args.encoder not in ENCODERS:
        raise UserError(f"there is no encoder={args.encoder}.{suggest(args.encoder, ENCODERS, 'encoder')}")
    if args.chunk < 0 or (args.chunk and args.encoder != "conformer"):
        raise UserError(f"chunk={args.chunk}; it is of encoder=conformer, and 0 for whole recordings.")
    if args.decoder < 0:
        raise UserError(f"decoder={args.decoder}; it has 1 block or more, and 0 is none.")
    size = SIZES["tiny" if args.tiny else word]
    rate = args.rate if args.root else 4000 if args.tiny else 8000
    seconds = args.seconds if args.root else 5.0
    shared = {"rate": rate, "frame_seconds": SUBSAMPLING / 100}
    if args.tokenizer != "chars":
        shared["tokenizer"] = tokenizers(args.tokenizer, args.vocab)
    else:
        shared["tokenizer"] = target(Characters, fallback=False)
    if args.root:
        dataset = target(
            TranscribedAudio,
            root=args.root,
            seconds=seconds,
            speeds=(0.9, 1.0, 1.1),
            order=args.order,
            language_model=args.lm,
            path=args.path,
            text=args.text,
            **shared,
        )
        heard: tuple[ConfigDict, ...] = (
            target(A.Room, rate=rate, share=0.1),
            target(A.Noise, snr=(10.0, 40.0), share=0.4),
            target(A.Gain),
        )
    else:
        few = {"num_train": 24, "num_val": 12, "num_test": 12} if args.tiny else {}
        dataset, heard = target(SpokenTones, **few, **shared), (target(A.Noise), target(A.Gain))
    buckets = [1.0]
    while buckets[-1] * 1.25 < seconds:
        buckets.append(buckets[-1] * 1.25)

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=dataset,
        batch_size=size.batch_size,
        eval_batch_size=12 if args.tiny else 32,
        train_transforms=(*heard, target(A.Padded, samples=round(seconds * rate))),
        eval_transforms=(target(A.Padded, samples=round(seconds * rate)),),
        buckets=() if args.tiny else tuple(round(length * rate) for length in buckets),
    )
    sizes = {"width": size.width, "depth": size.depth, "dropout": size.dropout}
    if args.encoder == "conformer":
        limits = {"chunk": args.chunk, "right": args.chunk // 4} if args.chunk else {}
        encoder = target(Conformer, **sizes, channels=size.width // 4, norm="layer", **limits)
    else:
        encoder = target(SpeechEncoder, **sizes, subsampling=SUBSAMPLING)
    task = Recognition, target(CTC, encoder=encoder)
    if args.decoder:
        task = JointRecognition, target(JointCTC, encoder=encoder, depth=args.decoder, dropout=size.dropout)
    config.task = target(
        task[0],
        model=task[1],
        mels=size.mels,
        whole=not args.chunk,
        floor=1e4,  # some 75 dB below full scale
        time_masks=(2, 0.05),
        frequency_masks=(2, size.mels // 5),
    )
    config.evaluators = ConfigDict()
    config.evaluators.beams = target(BeamSearch, **({"beams": 2, "weights": (0.5,)} if args.tiny else {}))
    config.optim = target(
        Optimizer,
        learning_rate=size.learning_rate,
        algorithm=deferred(optax.adamw, b2=0.98),
        schedule=deferred(optax.cosine_decay_schedule),
        warmup=0.1,
        weight_decay=0.05,
        clip_norm=1.0,
    )
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4)
    else:
        # an epoch has each utterance at three speeds
        epochs = args.epochs or size.epochs
        config.train = target(
            TrainConfig,
            epochs=epochs / 3 if args.root else epochs,
            log_every=50,
            best_metric="wer",
            best_mode="min",
            ema_decay=0.99,
        )
    return config
