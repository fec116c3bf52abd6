"""A decoder that reads pictures and says what is on them (LLaVA-like), trained on captions.

python launch.py --config=configs/caption.py                           shapes that the program draws and describes
python launch.py --config=configs/caption.py:root=DIR                  captions.txt, a table, COCO's JSON, NAME.txt, ...
python launch.py --mode=predict --workdir=runs/caption --input='*.jpg'    a caption of each

picture=RUN and decoder=RUN begin with the tower of a run of configs/catdog.py and the decoder, and the tokenizer, of
one of configs/lm.py, or of published folders (GPT-2, Llama, ...); with adapt=projection only what lies between them is
trained, as LLaVA begins. A row of a table may have a ``prompt`` that the answer goes on from.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.presets import tokenizers
from bigbase_jax.data.sources.image.captions import CaptionedPictures
from bigbase_jax.data.sources.synthetic.shapes import CaptionedShapes
from bigbase_jax.data.transforms import image as T
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.picture_reader import PictureReader
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.models.transformer import Style
from bigbase_jax.models.vit import ViT
from bigbase_jax.optim import Optimizer
from bigbase_jax.pretrained import part
from bigbase_jax.tasks.captioning import Captioning
from bigbase_jax.train import TrainConfig
from bigbase_jax.wrappers.frozen import Frozen


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=DIR_OR_FILE, size=32 (96 with root), tower=vit|resnet, width=128, depth=2, picture=RUN,
    decoder=RUN, adapt=full|projection, tokenizer=wordpiece|bpe|FILE_OR_DIR, vocab=2048, length=32, batch=64, epochs=40,
    tiny."""
    args = parse_arg(
        arg,
        root=None,
        size=0,
        tower="resnet",
        width=128,
        depth=2,
        picture=None,
        decoder=None,
        adapt="full",
        tokenizer="wordpiece",
        vocab=2048,
        length=32,
        batch=64,
        epochs=40.0,
        tiny=False,
    )
    size = args.size or (96 if args.root and not args.tiny else 32)
    width = 16 if args.tiny else args.width
    stem = "patch" if args.tiny else "imagenet" if args.root else "cifar"
    pictures = {
        "vit": target(ViT, variant="Ti", patch=8, width=width, depth=args.depth, heads=4, pool="gap"),
        "resnet": target(ResNet, depth=18, width=4 if args.tiny else 32, stem=stem),
    }
    if args.tower not in pictures:
        raise UserError(f"there is no tower={args.tower}.{suggest(args.tower, pictures, 'tower')}")
    picture, tokenizer = pictures[args.tower], tokenizers(args.tokenizer, args.vocab)
    style = Style(norm="rmsnorm", activation="silu", gated=True, qkv_bias=False, out_bias=False, mlp_bias=False)
    words = {"width": width, "depth": args.depth, "heads": 4, "positions": "rope", "dropout": 0.1, "style": style}
    decoder = target(Decoder, **words)
    if args.picture:
        picture, _ = part(args.picture)
    if args.decoder:
        decoder, tokenizer = part(args.decoder)

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.init_parts = {"picture": args.picture, "decoder": args.decoder}
    if args.root:
        dataset = target(CaptionedPictures, root=args.root, tokenizer=tokenizer, length=args.length)
    else:
        dataset = target(CaptionedShapes, size=size, **({"count": 60} if args.tiny else {}))
        if args.decoder:
            dataset.tokenizer, dataset.length = tokenizer, args.length
    config.data = target(
        Data,
        dataset=dataset,
        batch_size=8 if args.tiny else args.batch,
        eval_batch_size=16 if args.tiny else 50,
        train_transforms=(
            target(T.Resize, size=size + size // 8),
            target(T.RandomResizedCrop, size=size, scale=(0.6, 1.0) if args.root else (0.9, 1.0)),
            *((target(T.RandomFlip),) if args.root else ()),  # left and right are in the other captions
            target(T.ColorJitter, brightness=0.2, contrast=0.2, saturation=0.2),
        ),
        eval_transforms=(target(T.ResizeCenterCrop, resize=size, size=size),),
    )
    config.task = target(
        Captioning,
        model=target(PictureReader, picture=picture, decoder=decoder),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    if args.adapt == "projection":
        config.task = target(Frozen, task=config.task, trainable=r"^projection")
    elif args.adapt != "full":
        raise UserError(f"there is no adapt={args.adapt}.{suggest(args.adapt, ('full', 'projection'), 'value')}")
    config.optim = target(
        Optimizer,
        learning_rate=1e-3,
        algorithm=deferred(optax.adamw),
        schedule=deferred(optax.cosine_decay_schedule),
        warmup=0.1,
        weight_decay=0.05,
        clip_norm=1.0,
    )
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4)
    else:
        epochs = args.epochs if args.root else 10.0
        config.train = target(TrainConfig, epochs=epochs, log_every=20, eval_every=100, ema_decay=0.99)
    return config
