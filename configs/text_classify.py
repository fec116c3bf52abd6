"""Sentiment, topics and the like: a classifier of texts, or of pairs of texts, from scratch or from trained weights.

python launch.py --config=configs/text_classify.py                             docstrings of Python's library by subject
python launch.py --config=configs/text_classify.py:root=DIR                    {train,dev,test}.tsv, .csv, .jsonl, ...
python launch.py --config=configs/text_classify.py:root=DIR                    or texts in CLASS/, {train,test}/CLASS/
python launch.py --config=configs/text_classify.py:root=FILE,text=title+body,label=topic       columns by their names
python launch.py --config=configs/text_classify.py:root=FILE,text=1+2,label=0,class_names=FILE or numbers, no header
python launch.py --config=configs/text_classify.py:root=DIR,model=bow          a bag of words, which others have to beat
python launch.py --config=configs/text_classify.py:root=DIR,adapt=lora --config.init_from=runs/bert
python launch.py --mode=predict --workdir=runs/text_classify --input=new.csv --output=answers.csv    of each row

``init_from`` is a run of configs/bert.py or configs/lm.py, or a folder of published weights (BERT, RoBERTa, GPT-2,
...), whose model and tokenizer take the place of the recipe's. Of it, adapt=full trains everything; lora small products
beside each block's queries and values, and the head; last the last of the blocks of ``size``, and the head; probe the
head. --config.data.buckets=(16,32) pads batches of short texts to 16 or 32 tokens in place of ``length``.

Measured on two cores of an AMD EPYC (experiments/sst2): SST-2 from scratch, 79.9 % of the test sentences (three seeds)
in 120 core-seconds, with root=DIR,length=40,vocab=8192. The docstrings, seven subjects: 72.6 % in 95 core-seconds, and
81.8 % in 15 by model=bow, which 2,700 texts suit better.
"""

from typing import NamedTuple

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.presets import tokenizers
from bigbase_jax.data.sources.synthetic.docstrings import PythonDocstrings
from bigbase_jax.data.sources.text.labelled_text import LabelledText
from bigbase_jax.models.bag_of_words import BagOfWords
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.text_classification import TextClassification
from bigbase_jax.train import TrainConfig
from bigbase_jax.wrappers.frozen import Frozen
from bigbase_jax.wrappers.lora import LoRA
from bigbase_jax.wrappers.quantised import Quantised
from bigbase_jax.wrappers.sparse import Sparse


class Size(NamedTuple):
    """A model, and the rate at which all of it is trained."""

    depth: int
    heads: int
    width: int
    learning_rate: float


SIZES = {
    "tiny": Size(2, 2, 16, 1e-3),
    "nano": Size(2, 4, 128, 1e-3),
    "mini": Size(4, 4, 256, 3e-4),
    "small": Size(4, 8, 512, 1e-4),
    "base": Size(12, 12, 768, 3e-5),
}
HEAD = r"^(head|pooler)\."


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=FILE_OR_DIR, text=COLUMN[+COLUMN...], text_pair=COLUMN, label=COLUMN, class_names=FILE (a name in
    each line, for labels that are numbers), encoding=gb18030, model=bert|decoder|bow, adapt=full|lora|last|probe,
    size=nano|mini|small|base, tokenizer=wordpiece|bpe|unigram|chars|bytes|FILE_OR_DIR, vocab=4096, length=64,
    quantize=int8|int4|..., sparsity=SHARE|N:M (of zeros, which grow during training), tiny.
    """
    args = parse_arg(
        arg,
        root=None,
        text=None,
        text_pair=None,
        label=None,
        class_names=None,
        encoding="utf-8",
        model="bert",
        adapt="full",
        size="nano",
        tokenizer="wordpiece",
        vocab=4096,
        length=64,
        quantize=None,
        sparsity=None,
        tiny=False,
    )
    if args.size not in SIZES:
        raise UserError(f"there is no size={args.size}.{suggest(args.size, SIZES, 'size')}")
    size = SIZES["tiny" if args.tiny else args.size]
    models = {
        "bert": target(Bert, depth=size.depth, heads=size.heads, width=size.width, dropout=0.1),
        "decoder": target(Decoder, depth=size.depth, heads=size.heads, width=size.width, dropout=0.1),
        "bow": target(BagOfWords, width=size.width, dropout=0.5),
    }
    if args.model not in models:
        raise UserError(f"there is no model={args.model}.{suggest(args.model, models, 'model')}")
    task = target(TextClassification, model=models[args.model])
    if args.quantize:  # trained as it is to be quantised afterwards: docs/compress.md
        task = target(Quantised, task=task, quantize=args.quantize)
    if args.sparsity:
        task = target(Sparse, task=task, sparsity=args.sparsity)
    adapted = {
        "full": task,
        "lora": target(LoRA, task=task, modules_to_save=HEAD),
        "last": target(Frozen, task=task, trainable=rf"{HEAD}|^encoder\.(norm|block_{size.depth - 1})\."),
        "probe": target(Frozen, task=task, trainable=HEAD),
    }
    if args.adapt not in adapted:
        raise UserError(f"there is no adapt={args.adapt}.{suggest(args.adapt, adapted, 'value')}")
    words = {
        "tokenizer": tokenizers(args.tokenizer, 300 if args.tiny else args.vocab),
        "length": 16 if args.tiny else args.length,
    }

    form = {name: getattr(args, name) for name in ("text", "text_pair", "label", "class_names", "encoding")}

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=target(LabelledText, root=args.root, **form, **words)
        if args.root
        else target(PythonDocstrings, **words),
        batch_size=8 if args.tiny else 32,
        eval_batch_size=64,
    )
    config.task = adapted[args.adapt]
    config.optim = target(
        Optimizer,
        learning_rate=1e-2 if args.model == "bow" else size.learning_rate if args.adapt == "full" else 1e-3,
        algorithm=deferred(optax.adamw, b2=0.98, eps=1e-6),
        schedule=deferred(optax.linear_schedule, end_value=0.0),
        warmup=0.1,
        weight_decay=0.01,
        decay_mask="kernel$|embedding$|lora_",
        clip_norm=1.0,
    )
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4, best_metric="accuracy")
    else:
        config.train = target(TrainConfig, epochs=4.0, log_every=50, best_metric="accuracy")
    return config
