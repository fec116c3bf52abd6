"""Files of sound, whatever they are, and what is done to them before the device."""

import base64
import io
import json
import zipfile

import numpy as np
import pytest
import soundfile

from bigbase_jax.audio.files import decode, pcm16
from bigbase_jax.core import UserError
from bigbase_jax.data.sources.audio.audio import AudioCodec
from bigbase_jax.data.sources.audio.labelled import LabelledAudio
from bigbase_jax.data.sources.synthetic.sounds import WhistledWords
from bigbase_jax.data.transforms import audio as A


def tone(rate=16_000, seconds=0.5, hz=440.0):
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def written(x, rate=16_000, **how):
    buffer = io.BytesIO()
    soundfile.write(buffer, x, rate, **{"format": "WAV", **how})
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 96_000])
def test_every_format_and_rate_gives_the_tone(form, rate):
    if form == "MP3" and rate == 96_000:
        rate = 48_000  # the most that MP3 has
    x_T = decode(written(tone(rate), rate, format=form), 16_000)
    assert x_T.dtype == np.float32 and abs(len(x_T) - 8000) <= 3500  # MP3 adds what it needs to begin and to end
    spectrum = np.abs(np.fft.rfft(x_T[1000:7000]))
    assert spectrum.argmax() * 16_000 / 6000 == pytest.approx(440, abs=5)
    assert np.abs(x_T[1000:7000]).max() == pytest.approx(0.5, abs=0.05)


def test_channels_are_averaged_and_a_dead_one_does_not_count():
    x, silent = tone(), np.zeros(8000, np.float32)
    both = decode(written(np.stack([x, 0.5 * x], 1)), 16_000)
    np.testing.assert_allclose(both, 0.75 * x, atol=1e-4)
    np.testing.assert_allclose(decode(written(np.stack([silent, x], 1)), 16_000), x, atol=1e-4)
    assert not decode(written(np.stack([silent, silent], 1)), 16_000).any()


def test_samples_that_are_no_numbers_are_silence():
    x = tone()
    x[100:200] = np.nan
    found = decode(written(x, subtype="FLOAT"), 16_000)
    assert np.isfinite(found).all() and not found[100:200].any() and found[300:400].any()


def test_a_part_of_a_recording_is_read_alone():
    x = tone(seconds=2.0, hz=100)
    np.testing.assert_allclose(decode(written(x), 16_000, 0.5, 0.25), x[8000:12_000], atol=1e-4)
    assert decode(written(x), 16_000, offset=9.0).shape == (0,)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty|no recording"),
        (b"RIFF\0\0\0\0WAVEfmt ", "no recording"),
        (b"%PDF-1.4 nothing to hear", "no recording"),
        (written(tone())[:40], "no recording"),
        (written(tone(), rate=1000), "1000 samples a second"),
    ],
)
def test_what_is_no_recording_is_said_in_a_sentence(tmp_path, data, why):
    (tmp_path / "x.wav").write_bytes(data)
    for given in (data, tmp_path / "x.wav"):
        with pytest.raises(UserError, match=why):
            decode(given, 16_000)
    with pytest.raises(UserError, match="cannot be read"):
        decode(tmp_path / "gone.wav", 16_000)


def test_what_is_too_long_is_refused_before_it_is_decoded():
    with pytest.raises(UserError, match="2 seconds are too much at once"):
        decode(written(tone(seconds=2.0)), 16_000, seconds=1.0)
    assert len(decode(written(tone(seconds=2.0)), 16_000, duration=0.5, seconds=1.0)) == 8000


def folder(tmp_path, count=10):
    for name, hz in (("high", 900), ("low", 200)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / name / f"{i}.wav").write_bytes(written(tone(hz=hz + i)))
    return tmp_path


def test_folders_archives_and_tables_give_the_same_recordings(tmp_path):
    root = folder(tmp_path / "sounds")
    lines = ["file,word,split,note"]
    for name in ("low", "high"):
        lines += [f"{name}/{i}.wav,{name},{'train' if i < 8 else 'testing'},x" for i in range(10)]
    with zipfile.ZipFile(tmp_path / "sounds.zip", "w") as packed:
        for path in sorted(root.rglob("*.wav")):
            packed.write(path, path.relative_to(root))
    plain, zipped = LabelledAudio(str(root)), LabelledAudio(str(tmp_path / "sounds.zip"))
    (root / "list.csv").write_text("\n".join(lines))
    table = LabelledAudio(str(root))
    for data in (plain, zipped, table):
        assert data.dataset_info == {"num_classes": 2, "class_names": ("high", "low"), "rate": 16_000}
        source = data.splits["train"]
        for i in range(len(source)):
            x_T = source[i]["audio"]
            assert x_T.dtype == np.int16 and x_T.shape == (8000,)
            hz = np.abs(np.fft.rfft(x_T)).argmax() * 2
            assert source[i]["label"] == source.labels[i] == (hz < 500)
    assert {s: len(x) for s, x in plain.splits.items()} == {"train": 14, "val": 2, "test": 4}
    assert {s: len(x) for s, x in table.splits.items()} == {"train": 14, "val": 2, "test": 4}
    assert sorted(table.splits["test"].name(i) for i in range(4))[0] == "high/8.wav"
    before = table.fingerprint()
    (root / "low" / "9.wav").write_bytes(written(tone(seconds=0.7)))
    assert LabelledAudio(str(root)).fingerprint() != before


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("../outside.wav,low,train", "outside of the table's folder"),
        ("low/77.wav,low,train", "77.wav, which cannot be read"),
        ("low/1.wav,humming,test", "'humming' that train does not have"),
        ("low/1.wav,low,spare", "the split 'spare'"),
    ],
)
def test_a_row_that_cannot_be_is_named(tmp_path, line, why):
    root = folder(tmp_path / "sounds", 2)
    (tmp_path / "outside.wav").write_bytes(written(tone()))
    rows = ["path,label,split", "low/0.wav,low,train", "high/0.wav,high,train", line]
    (root / "list.csv").write_text("\n".join(rows))
    with pytest.raises(UserError, match=why):
        LabelledAudio(str(root / "list.csv"))


def named(tmp_path):
    """Two digits, three speakers, four takes: DIGIT_SPEAKER_TAKE.wav."""
    for digit in "01":
        for speaker in ("ann", "bob", "cy"):
            for take in range(4):
                (tmp_path / f"{digit}_{speaker}_{take}.wav").write_bytes(written(tone(hz=300 + 50 * take)))
    return str(tmp_path)


def names(data):
    return {split: [x.name(i) for i in range(len(x))] for split, x in data.splits.items()}


def test_names_of_files_are_columns_to_split_by(tmp_path):
    root, how = named(tmp_path), {"names": "label_speaker_take"}
    plain = LabelledAudio(root, **how)
    assert plain.dataset_info["class_names"] == ("0", "1") and sum(map(len, plain.splits.values())) == 24
    assert plain.splits["train"][0]["audio"].shape == (8000,)
    takes = names(LabelledAudio(root, **how, held_out="take:0/3"))
    assert len(takes["test"]) == 12 and all(name[-5] in "03" for name in takes["test"])
    assert all(name[-5] in "12" for name in takes["train"] + takes["val"]) and len(takes["val"]) == 2
    assert takes == names(LabelledAudio(root, **how, held_out="take:0/3"))
    parts = names(LabelledAudio(root, **how, held_out="speaker:bob", group="speaker", val_fraction=0.5))
    speakers = [{name.split("_")[1] for name in parts[split]} for split in ("train", "val", "test")]
    assert speakers[2] == {"bob"} and sorted(map(len, speakers)) == [1, 1, 1] and len(set.union(*speakers)) == 3


def test_verification_may_hold_out_classes(tmp_path):
    root, how = named(tmp_path), {"names": "digit_speaker_take", "label": "speaker", "held_out": "speaker:bob"}
    data = LabelledAudio(root, **how, open_set=True)
    assert data.dataset_info["class_names"] == ("ann", "cy")
    assert set(data.splits["train"].labels) == {0, 1} and set(data.splits["test"].labels) == {2}
    with pytest.raises(UserError, match="'bob' that train does not have"):
        LabelledAudio(root, **how)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"names": "label_take"}, "3 parts between '_', and names=label_take has 2"),
        ({"names": "digit_speaker_take"}, "no column of classes .such as label.; its columns are 'path', 'digit'"),
        ({"names": "label_speaker_take", "held_out": "speakr:bob"}, "no column 'speakr'.*speaker"),
        ({"names": "label_speaker_take", "held_out": "speaker:bobb"}, "no speaker is 'bobb'.*bob"),
        ({"held_out": "speaker:bob"}, "give a table as root, or names"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path, how, why):
    with pytest.raises(UserError, match=why):
        LabelledAudio(named(tmp_path), **how)


def test_a_table_without_such_a_column_says_what_it_has(tmp_path):
    root = folder(tmp_path / "sounds", 2)
    (root / "list.jsonl").write_text(json.dumps({"path": "low/0.wav", "kind": "low"}))
    with pytest.raises(UserError, match="no column of classes .such as label.; its columns are 'path', 'kind'"):
        LabelledAudio(str(root))


def test_a_codec_reads_files_bytes_and_rows_alike(tmp_path):
    data, codec = written(tone(8000), 8000), AudioCodec(16_000)
    (tmp_path / "x.wav").write_bytes(data)
    expected = pcm16(decode(data, 16_000))
    for given in (data, str(tmp_path / "x.wav"), {"audio": base64.b64encode(data).decode()}):
        np.testing.assert_array_equal(codec.decode(given)[0]["audio"], expected, strict=True)
    with pytest.raises(UserError, match="no sound file in base64"):
        codec.decode({"audio": "***"})


def test_padding_and_cropping_keep_the_middle():
    x_T = np.arange(1, 6, dtype=np.int16)

    def of(samples, **how):
        return A.PadOrCrop(samples, **how)({"audio": x_T}, np.random.default_rng(1))["audio"].tolist()

    assert of(3) == [2, 3, 4] and of(5) == [1, 2, 3, 4, 5]
    assert of(7) == [0, 1, 2, 3, 4, 5, 0]
    shifted = {tuple(A.PadOrCrop(7, 2)({"audio": x_T}, np.random.default_rng(i))["audio"]) for i in range(40)}
    assert len(shifted) == 5 and (1, 2, 3, 4, 5, 0, 0) in shifted and (0, 0, 0, 1, 2, 3, 4) in shifted
    assert not A.PadOrCrop(3).random and A.PadOrCrop(3, 1).random


@pytest.mark.parametrize("made", [A.Speed(), A.Gain(), A.Noise(share=1.0), A.Room(16_000, share=1.0)], ids=repr)
@pytest.mark.parametrize("x_T", [pcm16(tone()), np.zeros(3, np.int16), np.zeros(0, np.int16)], ids=["tone", "3", "0"])
def test_augmentation_depends_on_the_generator_alone(made, x_T):
    before = x_T.copy()
    one, two, three = (made({"audio": x_T}, np.random.default_rng(seed))["audio"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, two, strict=True)
    np.testing.assert_array_equal(x_T, before)
    assert one.dtype == np.float32 and np.isfinite(one).all()
    if len(x_T) > 100:
        assert len(one) != len(three) or np.abs(one - three).max() > 1e-3


def test_speed_changes_by_no_more_than_it_says():
    lengths = [
        len(A.Speed(0.2)({"audio": np.zeros(8000, np.int16)}, np.random.default_rng(i))["audio"]) for i in range(60)
    ]
    assert 6660 < min(lengths) < 7000 and 9500 < max(lengths) < 10_010
    with pytest.raises(UserError, match=r"speed changes by at most 1\.5; use a share from 0 to 0\.9"):
        A.Speed(1.5)


def test_noise_is_as_loud_as_it_says():
    x_T = pcm16(tone())
    added = A.Noise((10.0, 10.0), 1.0)({"audio": x_T}, np.random.default_rng(0))["audio"] - x_T / np.float32(32768)
    loudness = 20 * np.log10(np.sqrt(np.mean((x_T / 32768) ** 2)) / added.std())
    assert loudness == pytest.approx(10, abs=0.3)


def test_noise_and_rooms_come_from_folders_by_the_generator_alone(tmp_path):
    x_T = pcm16(tone())
    (tmp_path / "noise").mkdir()
    (tmp_path / "rooms").mkdir()
    (tmp_path / "noise" / "hum.wav").write_bytes(written(tone(seconds=0.2, hz=100)))
    (tmp_path / "noise" / "silent.wav").write_bytes(written(np.zeros(100, np.float32)))
    response = np.zeros(900, np.float32)
    response[[100, 900 - 1]] = 0.8, 0.4  # the sound, and an echo 799 samples behind it
    (tmp_path / "rooms" / "echo.wav").write_bytes(written(response))
    noise = A.RecordedNoise(folder=str(tmp_path / "noise"), rate=16_000, snr=(10.0, 10.0), share=1.0)
    one, two = (noise({"audio": x_T}, np.random.default_rng(0))["audio"] for _ in range(2))
    np.testing.assert_array_equal(one, two, strict=True)
    added = one - x_T / np.float32(32768)
    assert 20 * np.log10(np.std(x_T / 32768) / added.std()) == pytest.approx(10, abs=0.3)
    assert np.abs(np.fft.rfft(added)).argmax() * 2 == 100
    room = A.RecordedRoom(str(tmp_path / "rooms"), 16_000, 1.0)
    wet_T = room({"audio": x_T}, np.random.default_rng(0))["audio"]
    dry_T = x_T / np.float32(32768)
    expected = dry_T + 0.5 * np.pad(dry_T, (799, 0))[: len(dry_T)]
    np.testing.assert_allclose(wet_T, expected * np.std(dry_T) / np.std(expected), atol=2e-3)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no recordings"):
        A.RecordedNoise(folder=str(tmp_path / "none"), rate=16_000, share=1.0)({"audio": x_T}, np.random.default_rng(0))


def test_whistled_words_are_the_same_anywhere_and_all_different():
    one, two, other = WhistledWords(4000), WhistledWords(4000), WhistledWords(4000, seed=1)
    for split in ("train", "val", "test"):
        a, b, c = (data.splits[split][5] for data in (one, two, other))
        np.testing.assert_array_equal(a["audio"], b["audio"], strict=True)
        assert a["label"] == 5 and a["audio"].shape == (4000,) and np.abs(a["audio"] - c["audio"]).max() > 100
    assert not np.array_equal(one.splits["train"][5]["audio"], one.splits["val"][5]["audio"])
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()
