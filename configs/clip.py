"""Pictures and captions that find each other: CLIP and SigLIP, from scratch, towers of yours, or published ones.

python launch.py --config=configs/clip.py                              shapes that the program draws and describes
python launch.py --config=configs/clip.py:root=DIR                     captions.txt, a table, COCO's JSON, NAME.txt, ...
python launch.py --config=configs/clip.py:root=DIR,loss=sigmoid        SigLIP's loss
python launch.py --config=configs/clip.py:root=DIR --config.init_from=DIR_OF_CLIP_OR_SIGLIP
python launch.py --config=configs/clip.py:root=DIR,classes=DIR2        and classifies DIR2's CLASS/ folders by name
python launch.py --mode=predict --workdir=runs/clip --input='*.jpg'    the captions that fit best

picture=RUN and text=RUN begin with the towers, and the tokenizer, of runs of configs/catdog.py and configs/bert.py, or
of folders of published weights; with adapt=lit the pictures stay as they are (LiT). Retrieval among all pictures of
the test split, both ways: ``retrieval/`` in the results.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.presets import tokenizers
from bigbase_jax.data.sources.image.captions import CaptionedPictures
from bigbase_jax.data.sources.image.folder import ImageFolder
from bigbase_jax.data.sources.synthetic.shapes import CaptionedShapes
from bigbase_jax.data.transforms import image as T
from bigbase_jax.evaluators.captions import CaptionRetrieval, ZeroShot
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.clip import CLIP
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.models.vit import ViT
from bigbase_jax.optim import Optimizer
from bigbase_jax.pretrained import part
from bigbase_jax.tasks.contrastive import Contrastive
from bigbase_jax.train import TrainConfig
from bigbase_jax.wrappers.frozen import Frozen


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=DIR_OR_FILE, size=32 (96 with root), tower=resnet|vit, loss=softmax|sigmoid, width=128,
    picture=RUN, text=RUN (whose models and weights are the towers), adapt=full|lit,
    tokenizer=wordpiece|bpe|FILE_OR_DIR, vocab=4096, length=32, batch=64, epochs=60, classes=DIR, tiny."""
    args = parse_arg(
        arg,
        root=None,
        size=0,
        tower="resnet",
        loss="softmax",
        width=128,
        picture=None,
        text=None,
        adapt="full",
        tokenizer="wordpiece",
        vocab=4096,
        length=32,
        batch=64,
        epochs=60.0,
        classes=None,
        tiny=False,
    )
    size = args.size or (96 if args.root and not args.tiny else 32)
    words = 16 if args.tiny else args.width
    pictures = {
        "resnet": target(ResNet, depth=18, width=4 if args.tiny else 32, stem="patch" if args.tiny else "cifar"),
        "vit": target(
            ViT, variant="Ti", patch=8, width=16 if args.tiny else None, depth=2 if args.tiny else 6, pool="gap"
        ),
    }
    if args.root and not args.tiny:
        pictures["resnet"].stem = "imagenet"
    if args.tower not in pictures:
        raise UserError(f"there is no tower={args.tower}.{suggest(args.tower, pictures, 'tower')}")
    picture = pictures[args.tower]
    text = target(Bert, width=words, depth=2, heads=2 if args.tiny else 4, type_vocab_size=1, dropout=0.1)
    tokenizer = tokenizers(args.tokenizer, args.vocab)
    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.init_parts = {"picture": args.picture, "text": args.text}
    if args.picture:
        picture, _ = part(args.picture)
    if args.text:
        text, tokenizer = part(args.text)
    if args.root:
        dataset = target(CaptionedPictures, root=args.root, tokenizer=tokenizer, length=args.length)
    else:
        dataset = target(CaptionedShapes, size=size, **({"count": 60} if args.tiny else {}))
        if args.text:
            dataset.tokenizer, dataset.length = tokenizer, args.length

    config.data = target(
        Data,
        dataset=dataset,
        batch_size=8 if args.tiny else args.batch,
        eval_batch_size=16 if args.tiny else 100,
        train_transforms=(
            target(T.Resize, size=size + size // 8),
            target(T.RandomResizedCrop, size=size, scale=(0.5, 1.0) if args.root else (0.9, 1.0)),
            *((target(T.RandomFlip),) if args.root else ()),  # left and right are in the other captions
            target(T.ColorJitter, brightness=0.2, contrast=0.2, saturation=0.2),
        ),
        eval_transforms=(target(T.ResizeCenterCrop, resize=size, size=size),),
    )
    scores = {"temperature": 0.1, "bias": -10.0} if args.loss == "sigmoid" else {}
    config.task = target(
        Contrastive,
        model=target(CLIP, picture=picture, text=text, width=words, pool="mean", **scores),
        loss_kind=args.loss,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    if args.adapt == "lit":
        config.task = target(
            Frozen,
            task=config.task,
            trainable=r"^(text|text_projection|log_scale|score_bias)|^picture\.(head|fc|linear|dense)\b",
        )
    elif args.adapt != "full":
        raise UserError(f"there is no adapt={args.adapt}.{suggest(args.adapt, ('full', 'lit'), 'value')}")
    config.evaluators = ConfigDict(
        {
            "retrieval": target(CaptionRetrieval),
            "retrieval_val": target(CaptionRetrieval, split="val", resamples=0, final=False),
        }
    )
    if args.classes:
        config.evaluators.zero_shot = target(ZeroShot, dataset=target(ImageFolder, root=args.classes))
    config.optim = target(
        Optimizer,
        learning_rate=1e-3,
        algorithm=deferred(optax.adamw),
        schedule=deferred(optax.cosine_decay_schedule),
        warmup=0.1,
        weight_decay=0.1,
    )
    best = {"best_metric": "retrieval_val/mean_recall"}
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4, **best)
    else:
        epochs = args.epochs if args.root else 15.0
        config.train = target(TrainConfig, epochs=epochs, log_every=20, eval_every=100, ema_decay=0.99, **best)
    return config
