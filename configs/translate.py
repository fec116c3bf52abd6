"""Translation from scratch: a small encoder-decoder transformer, on pairs of texts in any two languages.

python launch.py --config=configs/translate.py                                   numbers in digits to English words
python launch.py --config=configs/translate.py:root=DIR,source=en,target=de      files in lines: train.en, train.de, ...
python launch.py --config=configs/translate.py:root=FILE,source=zh,target=en     columns of .tsv, .csv, .jsonl, ...
python launch.py --config=configs/translate.py:root=FILE,source=1,target=0       columns by number, without a header
python launch.py --mode=predict --workdir=runs/translate --input=new.txt --output=new.csv    line by line
python launch.py --config=configs/translate.py:root=DIR --config.init_from=DIR   goes on from opus-mt, T5, another run

Without a root, pairs are made up: numbers and their names in English, characters as tokens. BLEU and chrF are
sacrebleu's, of translations that are written token by token at every evaluation (--config.task.generate=False: the loss
alone; --config.task.beams=4: by beam search). Texts of more than 32 tokens are cut in size=mini and small. Batches by
length, --config.data.buckets=(16,24), save 30 % of a step there (experiments/multi30k).

Measured on two cores of an AMD EPYC (experiments/multi30k), size=mini, vocab=4096, English to German on Multi30k: test
2016 31.5 BLEU, 55.5 chrF, and 33.2 and 57.2 by 4 beams, after 900 core-seconds. Published transformers have 35 to 40.
The numbers: every one of 600 unseen ones is written without a mistake after 470 core-seconds, all included.
"""

from typing import NamedTuple

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.presets import tokenizers
from bigbase_jax.data.sources.synthetic.numerals import Numerals
from bigbase_jax.data.sources.text.parallel_text import ParallelText
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.translation import Translation
from bigbase_jax.train import TrainConfig


class Size(NamedTuple):
    """A model and how it is trained."""

    depth: int
    heads: int
    width: int
    mlp_dim: int
    dropout: float
    learning_rate: float
    length: int
    batch_size: int
    steps: int


SIZES = {
    "tiny": Size(1, 2, 16, 32, 0.0, 3e-3, 48, 8, 8),
    "nano": Size(2, 4, 64, 256, 0.0, 3e-3, 80, 32, 2000),
    "mini": Size(3, 4, 128, 512, 0.0, 4e-3, 32, 64, 1500),
    "small": Size(3, 4, 256, 512, 0.1, 2e-3, 32, 64, 1800),
    "base": Size(6, 8, 512, 2048, 0.1, 7e-4, 128, 256, 100_000),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=FILE_OR_DIR, source=en, target=de, tokenizer=bpe|unigram|wordpiece|chars|bytes|FILE_OR_DIR,
    vocab=8192, size=nano|mini|small|base, encoding=gb18030, tiny. source and target: what files end in, or columns are
    called. A size that is left open is mini with a root, and nano without.
    """
    args = parse_arg(
        arg,
        root=None,
        source="en",
        target="de",
        tokenizer=None,
        vocab=8192,
        size=None,
        encoding="utf-8",
        tiny=False,
    )
    word = args.size or ("mini" if args.root else "nano")
    if word not in SIZES:
        raise UserError(f"there is no size={word}.{suggest(word, SIZES, 'size')}")
    size = SIZES["tiny" if args.tiny else word]
    tokenizer = tokenizers(args.tokenizer or ("bpe" if args.root else "chars"), 300 if args.tiny else args.vocab)
    lengths = {"source_length": size.length, "target_length": size.length}
    if args.root:
        languages = {"source_language": args.source, "target_language": args.target}
        dataset = target(
            ParallelText, root=args.root, tokenizer=tokenizer, encoding=args.encoding, **languages, **lengths
        )
    else:
        dataset = target(Numerals, tokenizer=tokenizer, largest=999 if args.tiny else 999_999, **lengths)

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data, dataset=dataset, batch_size=size.batch_size, eval_batch_size=size.batch_size if args.tiny else 128
    )
    config.task = target(
        Translation,
        model=target(
            EncoderDecoder,
            depth=size.depth,
            heads=size.heads,
            width=size.width,
            mlp_dim=size.mlp_dim,
            dropout=size.dropout,
        ),
        label_smoothing=0.1,
        max_length=size.length * 3 // 2,  # of what is written; positions go on
    )
    config.optim = target(
        Optimizer,
        learning_rate=size.learning_rate,
        algorithm=deferred(optax.adamw, b2=0.98),
        schedule=deferred(optax.cosine_decay_schedule, alpha=0.05),
        warmup=min(size.steps // 8, 4000),
        weight_decay=0.01,
        decay_mask="kernel$|embedding$|head$",
        clip_norm=1.0,
    )
    config.train = target(
        TrainConfig,
        steps=size.steps,
        log_every=2 if args.tiny else 50,
        eval_every=4 if args.tiny else size.steps // 4,
        best_metric="loss" if args.tiny else "bleu",
        best_mode="min" if args.tiny else "max",
    )
    return config
