"""Tagging of words, such as names of people, places and organisations, by an encoder.

python launch.py --config=configs/tag.py                                    sentences made up by the program
python launch.py --config=configs/tag.py:root=DIR                           {train,dev,test}.conll: a word, a tag a line
python launch.py --config=configs/tag.py:root=FILE,word=1,tag=3             columns by number, from 0; -1: the last
python launch.py --config=configs/tag.py:root=DIR,length=128 --config.init_from=HF_FOLDER_OR_RUN
python launch.py --mode=predict --workdir=runs/tag --input=FILE             the words of each line, and what they name

The score is the F1 of whole names, as ``seqeval`` and the CoNLL shared tasks count it. Many a name of the made-up
sentences may be of any kind, so that the words around it have to be read. On two cores of an AMD EPYC:
83.4 % on the 1,000 sentences made up, in 47 core-seconds.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.presets import tokenizers
from bigbase_jax.data.sources.synthetic.names import MadeUpNames
from bigbase_jax.data.sources.text.tagged_text import ConllFiles
from bigbase_jax.models.bert import Bert
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.tagging import Tagging
from bigbase_jax.train import TrainConfig


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=FILE_OR_DIR, word=0, tag=-1, encoding=gb18030, tokenizer=wordpiece|bpe|unigram|chars|bytes|
    FILE_OR_DIR, vocab=4096, length=64, tiny.
    """
    args = parse_arg(
        arg,
        root=None,
        word=0,
        tag=-1,
        encoding="utf-8",
        tokenizer="wordpiece",
        vocab=4096,
        length=64,
        tiny=False,
    )
    words = {
        "tokenizer": tokenizers(args.tokenizer, 300 if args.tiny else args.vocab),
        "length": 32 if args.tiny else args.length,
    }
    count = {"count": 60} if args.tiny else {}

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=target(ConllFiles, root=args.root, word=args.word, tag=args.tag, encoding=args.encoding, **words)
        if args.root
        else target(MadeUpNames, **count, **words),
        batch_size=8 if args.tiny else 32,
        eval_batch_size=16 if args.tiny else 64,
    )
    model = target(Bert, depth=2, heads=2 if args.tiny else 4, width=16 if args.tiny else 128, dropout=0.1)
    config.task = target(Tagging, model=model)
    config.optim = target(
        Optimizer,
        learning_rate=1e-3,
        algorithm=deferred(optax.adamw, b2=0.98, eps=1e-6),
        schedule=deferred(optax.linear_schedule, end_value=0.0),
        warmup=0.1,
        weight_decay=0.01,
        decay_mask="kernel$|embedding$",
        clip_norm=1.0,
    )
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4, best_metric="overall_f1")
    else:
        config.train = target(TrainConfig, epochs=4.0, log_every=50, best_metric="overall_f1")
    return config
