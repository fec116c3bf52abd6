"""Corpora of transcribed speech: every layout, splits, what is left out, buckets; archives, hostile lists."""

import json
import os
import zipfile

import numpy as np
import pytest
import soundfile

from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.audio.transcribed import TranscribedAudio, TranscribedCodec
from bigbase_jax.data.transforms import audio as A
from bigbase_jax.text.tokenizer import load

RATE = 8000


def sound(path, seconds=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.sin(np.arange(round(seconds * RATE)) / 7) * 0.3
    soundfile.write(path, samples, RATE)


def said(source):
    return {source.name(i): bytes(source[i]["reference"]).rstrip(b"\0").decode() for i in range(len(source))}


def read(root, **words):
    return TranscribedAudio(str(root), rate=RATE, frame_seconds=0.01, **words)


def as_table(root, names):
    rows = [f"clips/{name}.wav,{text},{split},{speaker}" for name, (text, split, speaker) in names.items()]
    (root / "list.csv").write_text("\n".join(["path,sentence,split,client_id", *rows]))
    return {name: f"clips/{name}.wav" for name in names}


def as_speechbrain(root, names):
    for wanted in ("train", "dev", "test"):
        rows = {n: {"wav": f"{{data_root}}/{n}.wav", "wrd": t} for n, (t, split, _) in names.items() if split == wanted}
        (root / f"ASR_{wanted}.json").write_text(json.dumps(rows))
    return {name: f"audio/{name}.wav" for name in names}


def as_librispeech(root, names):
    places = {}
    for name, (text, split, speaker) in names.items():
        places[name] = f"{split}-clean/{speaker}/7/{speaker}-7-{name}.wav"
        (root / split).with_name(f"{split}-clean").joinpath(speaker, "7").mkdir(parents=True, exist_ok=True)
        with open(root / f"{split}-clean/{speaker}/7/{speaker}-7.trans.txt", "a") as file:
            file.write(f"{speaker}-7-{name} {text}\n")
    return places


def as_sphinx(root, names):
    (root / "etc").mkdir()
    for name, (text, split, speaker) in names.items():
        with open(root / f"etc/x_{split}.transcription", "a") as file:
            file.write(f"<s> {text} </s> ({name})\n")
        with open(root / f"etc/x_{split}.fileids", "a") as file:
            file.write(f"set/{speaker}/{name}\n")
    return {name: f"wav/set/{speaker}/{name}.wav" for name, (_, _, speaker) in names.items()}


def as_kaldi(root, names):
    for name, (text, split, speaker) in names.items():
        (root / split).mkdir(exist_ok=True)
        for kind, line in {"text": text, "wav.scp": f"/elsewhere/wav/{name}.wav", "utt2spk": speaker}.items():
            with open(root / split / kind, "a") as file:
                file.write(f"{name} {line}\n")
    return {name: f"wav/{name}.wav" for name in names}


NAMES = {f"u{n}": (text, split, f"p{n}") for n, (text, split) in enumerate(
    [("ONE TWO", "train"), ("TWO", "train"), ("ONE", "dev"), ("TWO ONE", "test")]
)}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", [as_table, as_speechbrain, as_librispeech, as_sphinx, as_kaldi])
def test_every_layout_gives_the_same_corpus(layout, packed, tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    places = layout(root, NAMES)
    for path in places.values():
        sound(root / path)
    if packed:
        with zipfile.ZipFile(tmp_path / "corpus.zip", "w") as archive:
            for where, _, files in os.walk(root):
                for name in files:
                    path = os.path.join(where, name)
                    archive.write(path, os.path.relpath(path, root))
        root = tmp_path / "corpus.zip"
    data = read(root)
    found = {split: said(source) for split, source in data.splits.items()}
    wanted = {"train": "train", "val": "dev", "test": "test"}
    assert found == {
        ours: {places[name]: text for name, (text, split, _) in NAMES.items() if split == theirs}
        for ours, theirs in wanted.items()
    }
    example = data.splits["train"][0]
    assert example["audio"].shape == (RATE,) and example["audio"].dtype == np.int16 and example["audio_length"] == RATE
    labels = example["labels"][: example["labels_length"]]
    assert (
        load(data.dataset_info["tokenizer"]).decode(labels) == "one two" and not example["labels"][len(labels) :].any()
    )


def test_parts_of_a_file_are_read_by_offset_and_duration(tmp_path):
    sound(tmp_path / "long.wav", 4.0)
    rows = [{"audio_filepath": "/data/long.wav", "text": "one", "offset": n, "duration": 0.5} for n in range(3)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole, _ = soundfile.read(tmp_path / "long.wav", dtype="int16")
    data = read(tmp_path, val_fraction=0, test_fraction=0)
    np.testing.assert_array_equal(data.splits["train"][2]["audio"], whole[2 * RATE : 2 * RATE + RATE // 2])


def test_speakers_are_in_one_split_each_and_speeds_are_examples(tmp_path):
    rows = ["path,text,speaker"]
    for n in range(20):
        sound(tmp_path / f"{n}.wav", 0.3)
        rows.append(f"{n}.wav,one,{n // 2}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    data = read(tmp_path / "t.csv", speeds=(0.9, 1.0, 1.1))
    speakers = {
        split: {int(source.name(i)[:-4]) // 2 for i in range(len(source))} for split, source in data.splits.items()
    }
    assert sum(map(len, speakers.values())) == 10 and {len(s) for s in speakers.values()} == {7, 1, 2}
    train = data.splits["train"]
    assert len(train) == 3 * 14 and [len(train[i]["audio"]) for i in range(3)] == [2667, 2400, 2182]
    assert all(len(train[i]["audio"]) <= train.lengths[i] for i in range(3))


def test_what_ctc_cannot_learn_is_left_out_and_counted(tmp_path):
    rows = ["path,text,split"]
    for n, (seconds, text) in enumerate([(1, "aabb"), (0.055, "aabb"), (1 / RATE, "a"), (1, "..."), (9, "ab")]):
        sound(tmp_path / f"{n}.wav", seconds)
        rows.append(f"{n}.wav,{text},train")
    sound(tmp_path / "v.wav", 1)
    (tmp_path / "t.csv").write_text("\n".join([*rows, "v.wav,abc zz,val"]))
    data = read(tmp_path, seconds=5.0)
    assert said(data.splits["train"]) == {"0.wav": "aabb"}
    assert "1 without a word, 1 longer than 5 s, 2 shorter than their tokens" in data.description
    assert "1 of other splits have characters that training lacks" in data.description
    val = data.splits["val"][0]
    assert bytes(val["reference"]).rstrip(b"\0") == b"abc zz" and val["labels_length"] == 2
    with pytest.raises(UserError, match=r"v\.wav of the val split has 1\.0 seconds, and seconds=0\.9"):
        read(tmp_path, seconds=0.9)


def test_batches_are_of_about_one_length_and_deterministic(tmp_path):
    rows = ["path,text"]
    for n in range(40):
        sound(tmp_path / f"{n}.wav", 0.3 + 0.04 * n)
        rows.append(f"{n}.wav,one")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    heard = (A.Room(RATE), A.Noise(), A.Gain(), A.Padded(2 * RATE))
    data = Data(
        read(tmp_path, val_fraction=0, test_fraction=0),
        batch_size=4,
        train_transforms=heard,
        buckets=tuple(int(RATE * s) for s in (0.5, 0.7, 0.9, 1.2, 1.5)),
        cache_limit_gb=0,
    )
    batches = [[next(it) for _ in range(9)] for it in (data.prepare(lambda _: None).train_batches() for _ in range(2))]
    for one, two in zip(*batches, strict=True):
        np.testing.assert_array_equal(one["audio"], two["audio"])
        for row, length in zip(one["audio"], one["audio_length"], strict=True):
            assert not row[length:].any() and length > 0 and row.dtype == np.int16
    real = sum(int(batch["audio_length"].sum()) for batch in batches[0])
    assert real / sum(batch["audio"].size for batch in batches[0]) > 0.8
    assert len({batch["audio"].shape for batch in batches[0]}) > 2


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"t.csv": "path,text\n../secret.wav,one"}, "is not below"),
        ({"t.csv": "path,text\nnone.wav,one"}, "t.csv, line 2 names none.wav"),
        ({"t.csv": "path,words_said\na.wav,one"}, "has no column of texts \\(such as text"),
        ({"t.csv": "path,text,duration\na.wav,one,-3"}, "duration is '-3', not seconds"),
        ({"wav.scp": "a sox x.wav -t wav - |", "text": "a one"}, "is a command, and none is run"),
        ({"x_train.transcription": "<s> one </s>"}, "name of its recording in brackets"),
        ({}, "nothing that says what is said in them"),
        ({"a.txt": "..."}, "no training transcript has a word"),
    ],
)
def test_mistakes_are_said_in_one_sentence(files, said, tmp_path):
    sound(tmp_path / "secret.wav")
    sound(tmp_path / "corpus" / "a.wav")
    for name, text in files.items():
        (tmp_path / "corpus" / name).write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read(tmp_path / "corpus")
    assert "\n" not in str(error.value)


def test_the_codec_pads_and_refuses_what_is_too_long(tmp_path):
    sound(tmp_path / "a.wav", 0.5)
    codec = TranscribedCodec(RATE)
    (example,) = codec.decode((tmp_path / "a.wav").read_bytes())
    fitted = codec.fit(example, {"audio": (RATE,)})
    assert (
        fitted["audio"].shape == (RATE,)
        and fitted["audio_length"] == RATE // 2 == np.flatnonzero(fitted["audio"])[-1] + 1
    )
    with pytest.raises(UserError, match=r"0\.5 seconds, and the model takes 0\.1"):
        codec.fit(example, {"audio": (RATE // 10,)})
