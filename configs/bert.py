"""A bidirectional encoder from scratch: BERT, which learns to guess hidden words, on any text in any language.

python launch.py --config=configs/bert.py                                      the language reference inside Python
python launch.py --config=configs/bert.py:data=text,root=DIR,vocab=8192        .txt, .jsonl, .csv, .xlsx, .parquet, ...
python launch.py --config=configs/bert.py:next_sentence     pairs of texts too: does the second follow the first?
python launch.py --mode=predict --workdir=runs/bert --input=FILE               what "[MASK]" in a text stands for
python launch.py --config=configs/text_classify.py --config.init_from=runs/bert

As RoBERTa (Liu et al. 2019): whole documents packed into rows, other words hidden at each use, no second sentence; with
next_sentence as BERT (Devlin et al. 2019): a row is two texts, and half of the second ones are of another document. The
loss is in nats per hidden token. size=nano, the default, is 2 blocks, 128 wide, 64 tokens, 700 steps of 32. Measured on
two cores of an AMD EPYC (experiments/sst2): the language reference, 36.5 % of the hidden tokens of its test documents,
in 182 core-seconds; with next_sentence, 36.8 % of the hidden tokens and 62.0 % of the 276 pairs, in 149 core-seconds
beside other jobs. On 630,000 tokens of other English it is too little to be of use. mini, small and base are 4 x 256,
4 x 512 (Turc et al. 2019) and 12 x 768 (BERT's own), not measured here.
"""

from typing import NamedTuple

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.presets import form, tokenizers
from bigbase_jax.data.sources.text.masked_text import MaskedPythonReference, MaskedTextFiles
from bigbase_jax.data.transforms.mask_tokens import MaskTokens
from bigbase_jax.models.bert import Bert
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.masked_language import MaskedLanguageModel
from bigbase_jax.train import TrainConfig


class Size(NamedTuple):
    """A model and how it is trained."""

    depth: int
    heads: int
    width: int
    length: int
    batch_size: int
    steps: int
    learning_rate: float


SIZES = {
    "tiny": Size(2, 2, 16, 32, 8, 8, 1e-3),
    "nano": Size(2, 4, 128, 64, 32, 700, 1e-3),
    "mini": Size(4, 4, 256, 128, 128, 20_000, 1e-3),
    "small": Size(4, 8, 512, 128, 256, 100_000, 5e-4),
    "base": Size(12, 12, 768, 512, 256, 1_000_000, 1e-4),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: data=pydoc|text, root=FILE_OR_DIR, tokenizer=wordpiece|bpe|unigram|chars|bytes|FILE_OR_DIR, vocab=4096,
    size=nano|mini|small|base, next_sentence, columns=title+body, encoding=gb18030, tiny.
    """
    args = parse_arg(
        arg,
        data="pydoc",
        root=None,
        tokenizer="wordpiece",
        vocab=4096,
        size="nano",
        next_sentence=False,
        columns=None,
        encoding="utf-8",
        tiny=False,
    )
    if args.size not in SIZES:
        raise UserError(f"there is no size={args.size}.{suggest(args.size, SIZES, 'size')}")
    size = SIZES["tiny" if args.tiny else args.size]
    words = {
        "tokenizer": tokenizers(args.tokenizer, 300 if args.tiny else args.vocab),
        "length": size.length,
        "next_sentence": args.next_sentence,
    }
    if args.data == "pydoc":
        dataset = target(MaskedPythonReference, **words)
    elif args.data == "text":
        if not args.root:
            raise UserError("data=text needs root=FILE or root=DIR, where the text is.")
        dataset = target(MaskedTextFiles, root=args.root, format=form(args.columns, args.encoding), **words)
    else:
        raise UserError(f"there is no data={args.data}.{suggest(args.data, ('pydoc', 'text'), 'value')}")

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=dataset,
        batch_size=size.batch_size,
        eval_batch_size=64 if args.tiny else None,
        train_transforms=(target(MaskTokens),),
        eval_transforms=(target(MaskTokens),),
    )
    config.task = target(
        MaskedLanguageModel,
        model=target(Bert, depth=size.depth, heads=size.heads, width=size.width, masked=True, dropout=0.1),
    )
    config.optim = target(
        Optimizer,
        learning_rate=size.learning_rate,
        algorithm=deferred(optax.adamw, b2=0.98, eps=1e-6),
        schedule=deferred(optax.linear_schedule, end_value=0.0),
        warmup=0.1,
        weight_decay=0.01,
        decay_mask="kernel$|embedding$|position$|type$",
        clip_norm=1.0,
    )
    config.train = target(
        TrainConfig,
        steps=size.steps,
        log_every=2 if args.tiny else 50,
        eval_every=4 if args.tiny else size.steps // 2,
    )
    return config
