"""Pictures and sounds as tables of files: what is broken, poor, or there twice."""

import numpy as np
import pytest

pytest.importorskip("daft")
pytest.importorskip("soundfile")

import pyarrow.parquet as pq
import soundfile
from ml_collections import ConfigDict
from PIL import Image, ImageFilter

from bigbase_jax.build import target
from bigbase_jax.clean.command import Clean, clean
from bigbase_jax.clean.duplicates import NearDuplicates
from bigbase_jax.clean.media import Files, NearPictures, PictureChecks, SoundChecks, perceptual_hash
from bigbase_jax.core import UserError


def cleaned(root, out, of, *steps):
    node = target(Clean, root=str(root), out=str(out), read=target(Files, of=of), steps=steps, workers=0)
    said = clean(ConfigDict({"clean": node}))
    return said, {row["id"] for path in out.glob("*.parquet") for row in pq.read_table(path).to_pylist()}


def picture(seed):
    """Blobs of colour with some noise, as photos have both."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (9, 12, 3), np.uint8))
    x = np.asarray(small.resize((320, 240), Image.Resampling.BICUBIC), np.int16) + draw.integers(-12, 13, (240, 320, 1))
    return Image.fromarray(np.clip(x, 0, 255).astype(np.uint8))


def test_pictures_there_twice_mirrored_small_blurred_narrow_or_broken_go(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for i in range(12):
        picture(i).save(root / f"{i:02}.png")
    picture(0).save(root / "again.jpg", quality=70)
    picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((200, 150)).save(root / "mirrored.jpg", quality=80)
    picture(20).resize((60, 45)).save(root / "small.png")
    picture(21).filter(ImageFilter.GaussianBlur(12)).save(root / "blurred.png")
    picture(22).resize((900, 100)).save(root / "narrow.png")
    (root / "broken.png").write_bytes((root / "03.png").read_bytes()[:3000])
    said, ids = cleaned(root, tmp_path / "out", "pictures", target(PictureChecks), target(NearPictures))
    checks = said["dropped"]["picture_checks"]
    assert checks == {"small": 1, "blurred": 1, "narrow": 1, "broken": 1}
    assert said["dropped"]["near_pictures"] == {"near duplicate": 2}
    assert len(ids & {"00.png", "again.jpg"}) == 1 and len(ids & {"01.png", "mirrored.jpg"}) == 1 and len(ids) == 12


def test_hashes_of_one_picture_are_near_and_those_of_others_are_not():
    one, other = (picture(i).convert("L") for i in range(2))
    near = perceptual_hash(one) ^ perceptual_hash(one.resize((100, 75)))
    far = perceptual_hash(one) ^ perceptual_hash(other)
    assert near.bit_count() <= 3 < 16 < far.bit_count()
    with pytest.raises(UserError, match="between 0 and 3"):
        NearPictures(bits=4)
    with pytest.raises(UserError, match="pictures or sounds"):
        Files(of="films")


def test_recordings_there_twice_silent_clipped_or_short_go(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    draw = np.random.default_rng(0)

    def tune(seed, seconds=3.0, rate=16000):
        notes = np.random.default_rng(seed).integers(0, 30, int(seconds * 8))
        t = np.arange(rate // 8) / rate
        return 0.3 * np.concatenate([np.sin(2 * np.pi * 300 * 2 ** (n / 12) * t) for n in notes])

    for i in range(5):
        soundfile.write(root / f"{i}.wav", tune(i), 16000)
    soundfile.write(root / "softer.flac", 0.6 * tune(0) + 1e-4 * draw.standard_normal(48000), 16000)
    soundfile.write(root / "silent.wav", np.zeros(48000), 16000)
    soundfile.write(root / "clipped.wav", np.clip(8 * tune(9), -1, 1), 16000)
    soundfile.write(root / "short.wav", tune(8)[:1000], 16000)
    (root / "broken.wav").write_bytes((root / "1.wav").read_bytes()[:20])
    near = target(NearDuplicates, column="fingerprint", ngram=1, threshold=0.5, bands=50, rows=2)
    said, ids = cleaned(root, tmp_path / "out", "sounds", target(SoundChecks), near)
    assert said["dropped"]["sound_checks"] == {"silent": 1, "clipped": 1, "short": 1, "broken": 1}
    assert said["dropped"]["near_duplicates"] == {"near duplicate": 1}
    assert len(ids & {"0.wav", "softer.flac"}) == 1 and len(ids) == 5
