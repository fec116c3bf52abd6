"""Published folders as they stand: classifiers of texts, and of pictures in the size that they ask for, and translators
answer inputs, recognisers transcribe; decoders continue texts."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from bigbase_jax import pretrained
from bigbase_jax.core import Example, Task, UserError, Variables
from bigbase_jax.data.sources.audio.transcribed import TranscribedCodec
from bigbase_jax.data.sources.image.captions import AskedPictureCodec
from bigbase_jax.data.sources.image.image import PictureCodec
from bigbase_jax.data.sources.text.labelled_text import LabelledText
from bigbase_jax.data.sources.text.parallel_text import ParallelText, pair_dataset_info
from bigbase_jax.inference.predictor import ROWS, Predictor, Reading
from bigbase_jax.inference.recogniser import Recogniser
from bigbase_jax.inference.windowed import Windowed
from bigbase_jax.inference.zero_shot import Matcher
from bigbase_jax.models.clip import CLIP
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.models.vits import Vits
from bigbase_jax.models.wav2vec2 import Wav2Vec2
from bigbase_jax.models.whisper import Whisper
from bigbase_jax.pretrained.files import CONFIG, PREPROCESSOR, read_json
from bigbase_jax.pretrained.files import GENERATION as GENERATION_FILE
from bigbase_jax.pretrained.folder import describe, generation
from bigbase_jax.pretrained.schema import FLAG, SIDE, Kind, check, either, listed, number, only, whole
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.tasks.contrastive import Contrastive
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.tasks.recognition import WaveRecognition
from bigbase_jax.tasks.text_classification import TextClassification
from bigbase_jax.tasks.transcription import RATE, Transcription
from bigbase_jax.tasks.translation import Translation
from bigbase_jax.text import chat_template
from bigbase_jax.text.tokenizer import Tokenizer, TokenizerFile, dataset_info_of, source_tokenizer

LENGTH = 512
"""Tokens of a text, of a model that reads more, where nothing says less."""
_SIDES = Kind(
    "an object of sides up to 4,096",
    lambda x, _: isinstance(x, dict) and len(x) > 0 and all(type(v) is int and 1 <= v <= 4096 for v in x.values()),
)
_SIZE = either(SIDE, _SIDES)
_PICTURES = {
    "image_mean": listed(number(-1e3, 1e3), 3, 3),
    "image_std": listed(number(1e-6, 1e6), 3, 3),
    "size": _SIZE,
    "max_size": whole(1, 4096),
    "crop_size": _SIZE,
    "crop_pct": number(0.1, 1),
    "do_resize": FLAG,
    "do_center_crop": FLAG,
    "do_normalize": FLAG,
    "resample": whole(0, 5),
}


def opened(path: str, load: Callable[..., tuple[Any, Any]] = pretrained.load) -> Predictor:
    """A published model: a classifier or a translator, which answer inputs, or one that continues texts.

    Args:
      load: what gives its model and variables; ``pretrained.shapes_of`` reads none.

    Raises:
      UserError: the folder holds another kind of model, or not all that it takes.
    """
    _, config = describe(path)
    kind = (config.get("architectures") or [""])[0]
    classifies = kind.endswith(("ForSequenceClassification", "ForImageClassification"))
    classifies = classifies and config.get("problem_type") in (None, "single_label_classification")
    refusal = UserError(
        f"{path} holds a {kind or config.get('model_type')}; of published folders, --mode=predict takes classifiers"
        " of texts or pictures, one class for each, and translators. Try --mode=generate, or a run that begins from it"
        " (--config.init_from)."
    )
    if kind.endswith("ForObjectDetection"):
        from bigbase_jax.inference.detectors import of_detector

        return of_detector(path, *load(path, fresh=False), _names(config))
    if not classifies:
        model, variables = load(path)
        if isinstance(model, EncoderDecoder):
            return _of_translator(path, model, variables)
        if isinstance(model, Vits):
            from bigbase_jax.inference.voices import of_vits

            return of_vits(path, model, variables)
        if isinstance(model, Whisper):
            return _of_whisper(path, model, variables)
        if isinstance(model, Wav2Vec2):
            return _of_wav2vec2(path, model, variables)
        if isinstance(model, CLIP):
            return _of_clip(path, model, variables)
        if not hasattr(model, "decode"):
            raise refusal
        return _of_writer(path, model, variables, refusal)
    model, variables = load(path, fresh=False)
    names = _names(config)
    dataset_info: dict[str, Any] = {"num_classes": model.num_classes}
    if len(names) == model.num_classes and len(set(names)) == len(names):
        dataset_info["class_names"] = names
    if kind.endswith("ForImageClassification"):
        return _of_pictures(path, model, variables, dataset_info)
    tokenizer = tokenizer_of(path)
    length = min(model.length, LENGTH)
    dataset_info |= {**dataset_info_of(tokenizer), "length": length, "pair": False}
    task: Any = TextClassification(model, class_names=dataset_info.get("class_names"), tokenizer=tokenizer.state())
    reading = Reading(LabelledText.codec({}, dataset_info))
    return Predictor(task, variables, dataset_info, _tokens(task, length), lambda: reading)


def _names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a ``config.json`` gives."""
    labels = config.get("id2label") or {}
    return tuple(str(labels[key]) for key in sorted(labels, key=int))


def tokenizer_of(path: str, pairs: bool = False) -> Tokenizer:
    """The tokenizer of a published folder; ``pairs``: that of two languages."""
    return TokenizerFile(path).fit(lambda: iter(()), lambda: iter(()), pairs)


def _of_writer(path: str, model: Any, variables: Variables, refusal: UserError) -> Predictor:
    """A decoder with what it takes to continue a text: its tokenizer, ends and chat template are ``dataset_info``."""
    ends: set[int] = set()
    for said in generation(path):
        found = said.get("eos_token_id")
        ends |= set(found) if isinstance(found, list) else set() if found is None else {found}
    template = chat_template.read(path)
    dataset_info = {
        **dataset_info_of(tokenizer_of(path)),
        "end_ids": tuple(sorted(ends)),
        "chat_template": None if template is None else template.state(),
    }
    task: Any = CausalLanguageModel(model)

    def refuse() -> Reading:
        raise refusal

    return Predictor(task, variables, dataset_info, _tokens(task, 1), refuse)


def _of_translator(path: str, model: EncoderDecoder, variables: Variables) -> Predictor:
    """A translator that writes as the ``generation_config.json`` says."""
    config, words = generation(path)
    words = {**config, **words}
    target = tokenizer_of(path, True)
    source = source_tokenizer(target)
    most = min(words.get("max_length", LENGTH), 1 << 14) - 1  # theirs counts the start token
    longest = (model.length or LENGTH) if model.positions == "learned" else 1 << 14
    known = pair_dataset_info(source, target, longest, 1)
    known["start_id"] = words.get("decoder_start_token_id", known["start_id"])
    largest, size = max(source.size - 1, *(known[f"{role}_id"] for role in ("start", "pad", "end"))), model.vocab_size
    if size is not None and largest >= size:
        raise UserError(
            f"{path}: the token {largest:,} of its tokenizer is none of the model's {size:,} (0 to {size - 1:,}); take"
            " the tokenizer that the model was trained with."
        )
    task: Any = Translation(
        model,
        target.state(),
        beams=words.get("num_beams") or 1,
        length_penalty=words.get("length_penalty", 1.0),
        max_length=most,
        pad_id=known["pad_id"],
        start_id=known["start_id"],
        end_id=known["end_id"],
    )
    spec = {
        name: jax.ShapeDtypeStruct((1 if name.startswith("target") else known["source_length"],), np.int32)
        for name in task.inputs
    }
    reading = Reading(ParallelText.codec({}, known))
    return Predictor(task, variables, known, spec, lambda: reading, rows=max(ROWS // 2 // task.beams, 1))


def _of_whisper(path: str, model: Whisper, variables: Variables) -> Predictor:
    """A recogniser that hears as the preprocessor's JSON says, and writes as the ``generation_config.json`` does."""
    folder = pathlib.Path(path).expanduser()
    if (folder / PREPROCESSOR).is_file():
        where = str(folder / PREPROCESSOR)
        said = check(read_json(folder / PREPROCESSOR), _SOUNDS, where)
        if said.get("feature_size", model.mels) != model.mels:
            raise UserError(f"{where} has feature_size={said['feature_size']}, and the model hears {model.mels} bands.")
    words: dict[str, Any] = {}
    for name in (CONFIG, GENERATION_FILE):
        if (folder / name).is_file():
            words |= check(read_json(folder / name), _WRITING, str(folder / name))
    tokenizer = tokenizer_of(path)
    english = not words.get("is_multilingual", model.vocab_size != 51_864)
    task: Any = Transcription(
        model,
        tokenizer.state(),
        english=english,
        first=words.get("max_initial_timestamp_index"),
        suppress=tuple(words.get("suppress_tokens", ())),
        begin_suppress=tuple(words.get("begin_suppress_tokens", ())),
        max_length=words.get("max_length"),
        inputs=("audio", "language"),
    )
    known = {**dataset_info_of(tokenizer), "rate": RATE}

    def read() -> Reading:
        raise AssertionError  # a Recogniser has its own

    return Recogniser(task, variables, known, {}, read, rows=_WINDOWS)


def _of_wav2vec2(path: str, model: Wav2Vec2, variables: Variables) -> Predictor:
    """A recogniser by CTC that hears as the ``preprocessor_config.json`` says."""
    where = pathlib.Path(path).expanduser() / PREPROCESSOR
    said = check(read_json(where), _SAMPLES, str(where)) if where.is_file() else {}
    hop = math.prod(model.strides)
    tokenizer = tokenizer_of(path)
    if tokenizer.size > (model.vocab_size or 0):
        raise UserError(f"{path}: its tokenizer has {tokenizer.size} tokens, and the model gives {model.vocab_size}.")
    task: Any = WaveRecognition(
        model,
        tokenizer.state(),
        rate=RATE,
        frame_seconds=hop / RATE,
        normalisation="none",
        centred=said.get("do_normalize", True),
    )
    spec = {
        "audio": jax.ShapeDtypeStruct((_HEARD,), np.int16),
        "audio_length": jax.ShapeDtypeStruct((), np.int32),
    }
    reading = Reading(TranscribedCodec(RATE))
    return Windowed(task, variables, {**dataset_info_of(tokenizer), "rate": RATE}, spec, lambda: reading, rows=_WINDOWS)


_HEARD = 20 * RATE  # samples that are heard at once by models that hear any number
_SAMPLES = {
    "feature_extractor_type": only("Wav2Vec2FeatureExtractor"),
    "sampling_rate": only(RATE),
    "feature_size": only(1),
    "do_normalize": FLAG,
}
_SOUNDS = {
    "feature_extractor_type": only("WhisperFeatureExtractor"),
    "sampling_rate": only(RATE),
    "feature_size": whole(1, 1024),
    "hop_length": only(160),
    "n_fft": only(400),
    "do_normalize": only(False),
}
_WRITING = {
    "is_multilingual": FLAG,
    "max_initial_timestamp_index": whole(0, 1 << 16),
    "suppress_tokens": listed(whole(-1, 1 << 24), 0, 1 << 16),
    "begin_suppress_tokens": listed(whole(-1, 1 << 24), 0, 1 << 16),
    "max_length": whole(2, (1 << 31) - 1),
}
_WINDOWS = 8  # that are heard at once


def _tokens(task: Task, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {key: jax.ShapeDtypeStruct((length,), np.int32) for key in task.inputs}


def _of_pictures(path: str, model: Any, variables: Variables, dataset_info: Mapping[str, Any]) -> Predictor:
    said, mean, std = preprocessing(path, 3 * (0.5,), 3 * (0.5,))
    resize = _Resize.of(said)
    task: Any = Classification(model, class_names=dataset_info.get("class_names"), mean=mean, std=std)
    spec = {"image": jax.ShapeDtypeStruct((*resize.shape, 3), np.uint8)}
    return Predictor(task, variables, dataset_info, spec, lambda: Reading(PictureCodec(), (resize,)))


def _of_clip(path: str, model: CLIP, variables: Variables) -> Predictor:
    """Pictures that are told apart by the labels of their rows."""
    said, mean, std = preprocessing(path, 3 * (0.5,), 3 * (0.5,))
    resize, tokenizer = _Resize.of(said), tokenizer_of(path)
    known = {**dataset_info_of(tokenizer), "length": min(getattr(model.text, "length", None) or LENGTH, LENGTH)}
    kind = "softmax" if model.bias is None else "sigmoid"
    task: Any = Contrastive(model, tokenizer.state(), known["length"], kind, mean=mean, std=std)
    spec = {"image": jax.ShapeDtypeStruct((*resize.shape, 3), np.uint8)}
    codec = AskedPictureCodec(tokenizer=tokenizer.state(), length=known["length"])
    return Matcher(task, variables, known, spec, lambda: Reading(codec, (resize,)))


def preprocessing(
    path: str, mean: tuple[float, ...], std: tuple[float, ...], normalised: bool = True
) -> tuple[dict[str, Any], tuple[float, ...], tuple[float, ...]]:
    """What the ``preprocessor_config.json`` of a folder says of pictures, and their mean and standard deviation.

    Args:
      mean, std: where it does not say.
      normalised: whether pictures are, where it does not say.

    Raises:
      UserError: there is none, or a value that does not fit.
    """
    where = pathlib.Path(path).expanduser() / PREPROCESSOR
    if not where.is_file():
        raise UserError(f"{path} has no {PREPROCESSOR}, which says what becomes of pictures before the model.")
    said = check(read_json(where), _PICTURES, str(where))
    if not said.get("do_normalize", normalised):
        return said, 3 * (0.0,), 3 * (1.0,)
    return said, tuple(said.get("image_mean", mean)), tuple(said.get("image_std", std))


class _Resize(NamedTuple):
    """As transformers' image processors with Pillow: to a size, or the short side to a length and the middle of that.

    Attributes:
      shape: height and width of the result.
      short: the short side before the middle is cut; None: stretched to ``shape``.
      resample: the number of Pillow's filter.
    """

    shape: tuple[int, int]
    short: int | None
    resample: int

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> _Resize:
        """What a ``preprocessor_config.json`` says."""
        size, resample = said.get("size", 224), said.get("resample", 2)
        shortest = size.get("shortest_edge") if isinstance(size, dict) else None
        if shortest is None:
            shape = _sides(size)
            return cls(shape, None, resample)
        if said.get("do_center_crop"):
            return cls(_sides(said.get("crop_size", 224)), shortest, resample)
        if shortest >= 384:  # as ConvNextImageProcessor has it
            return cls((shortest, shortest), None, resample)
        return cls((shortest, shortest), int(shortest / said.get("crop_pct", 224 / 256)), resample)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        picture, (height, width) = Image.fromarray(example["image"]), self.shape
        filter_ = Image.Resampling(self.resample)
        if self.short is None:
            return {**example, "image": np.asarray(picture.resize((width, height), filter_))}
        scale = self.short / min(picture.size)
        w, h = (self.short if side == min(picture.size) else int(side * scale) for side in picture.size)
        left, top = (w - width) // 2, (h - height) // 2
        cut = picture.resize((w, h), filter_).crop((left, top, left + width, top + height))
        return {**example, "image": np.asarray(cut)}


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return size.get("height", 224), size.get("width", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])
