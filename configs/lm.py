"""A language model from scratch: a small decoder that learns the next token, on any text in any language.

python launch.py --config=configs/lm.py                                        the language reference inside Python
python launch.py --config=configs/lm.py:data=text,root=FILE,tokenizer=chars    a text, its last tenth for validation
python launch.py --config=configs/lm.py:data=text,root=DIR,tokenizer=bpe       .txt, .jsonl, .csv, .xlsx, .parquet, ...
python launch.py --mode=predict --workdir=runs/lm --input=FILE                 how probable each token of a text is

The loss is in nats per token; bits per byte compare across tokenizers. size=nano, the default, is nanoGPT's published
setting for a CPU (4 blocks, 128 wide, 64 tokens, batch 12, 2,000 steps), which reports a validation loss of 1.88 on the
characters of tiny Shakespeare. Measured on two cores of an AMD EPYC (experiments/char_lm): 1.807 in two minutes.
size=baby is nanoGPT's setting for one GPU (6 blocks, 384 wide, 256 tokens, batch 64, 5,000 steps; 1.4697); on the same
two cores, 1,500 steps of 16 without dropout reach 1.557 in 39 minutes.
"""

from typing import NamedTuple

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.presets import texts, tokenizers
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.train import TrainConfig
from bigbase_jax.wrappers.quantised import Quantised
from bigbase_jax.wrappers.sparse import Sparse


class Size(NamedTuple):
    """A model and how it is trained."""

    depth: int
    heads: int
    width: int
    dropout: float
    length: int
    batch_size: int
    steps: int


SIZES = {
    "tiny": Size(2, 2, 16, 0.0, 32, 8, 8),
    "nano": Size(4, 4, 128, 0.0, 64, 12, 2000),
    "baby": Size(6, 6, 384, 0.2, 256, 64, 5000),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: data=pydoc|text, root=FILE_OR_DIR, tokenizer=bytes|chars|bpe|unigram|wordpiece|FILE_OR_DIR, vocab=4096,
    size=nano|baby, columns=title+body, encoding=gb18030, quantize=int8|int4|..., sparsity=SHARE|N:M (of
    zeros, which grow during training), tiny.
    """
    args = parse_arg(
        arg,
        data="pydoc",
        root=None,
        tokenizer="bytes",
        vocab=4096,
        size="nano",
        columns=None,
        encoding="utf-8",
        quantize=None,
        sparsity=None,
        tiny=False,
    )
    if args.size not in SIZES:
        raise UserError(f"there is no size={args.size}.{suggest(args.size, SIZES, 'size')}")
    size = SIZES["tiny" if args.tiny else args.size]
    tokenizer = tokenizers(args.tokenizer, 300 if args.tiny else args.vocab)

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=texts(args.data, args.root, tokenizer, size.length, 1, args.columns, args.encoding),
        batch_size=size.batch_size,
        eval_batch_size=64 if args.tiny else 128,
    )
    config.task = target(
        CausalLanguageModel,
        model=target(Decoder, depth=size.depth, heads=size.heads, width=size.width, dropout=size.dropout),
    )
    if args.quantize:  # trained as it is to be quantised afterwards: docs/compress.md
        config.task = target(Quantised, task=config.task, quantize=args.quantize)
    if args.sparsity:
        config.task = target(Sparse, task=config.task, sparsity=args.sparsity)
    config.optim = target(
        Optimizer,
        learning_rate=1e-3,
        algorithm=deferred(optax.adamw, b2=0.99),
        schedule=deferred(optax.cosine_decay_schedule, alpha=0.1),
        warmup=2 if args.tiny else 100,
        weight_decay=0.1,
        decay_mask="kernel$|embedding$|position$|head$",
        clip_norm=1.0,
    )
    config.train = target(
        TrainConfig,
        steps=size.steps,
        log_every=2 if args.tiny else 50,
        eval_every=4 if args.tiny else 500,
        best_metric="loss",
        best_mode="min",
    )
    return config
