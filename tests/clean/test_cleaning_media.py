"""Pictures, sounds and rows of tables: what is broken, poor, or there twice."""

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
from bigbase_jax.clean.duplicates import ExactDuplicates, NearDuplicates
from bigbase_jax.clean.media import Files, NearPictures, PictureChecks, SoundChecks, perceptual_hash
from bigbase_jax.clean.tables import RowChecks, Rows
from bigbase_jax.core import UserError
from bigbase_jax.data.columns import read_columns, table_files


def cleaned(root, out, read, *steps):
    node = target(Clean, root=str(root), out=str(out), read=read, steps=steps, workers=0)
    said = clean(ConfigDict({"clean": node}))
    return said, [row for path in out.glob("*.parquet") for row in pq.read_table(path).to_pylist()]


def ids(rows):
    return {row["id"] for row in rows}


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
    read = target(Files, of="pictures")
    said, rows = cleaned(root, tmp_path / "out", read, target(PictureChecks), target(NearPictures))
    checks = said["dropped"]["picture_checks"]
    assert checks == {"small": 1, "blurred": 1, "narrow": 1, "broken": 1}
    assert said["dropped"]["near_pictures"] == {"near duplicate": 2}
    assert len(ids(rows) & {"00.png", "again.jpg"}) == len(ids(rows) & {"01.png", "mirrored.jpg"}) == 1
    assert len(rows) == 12


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
    said, rows = cleaned(root, tmp_path / "out", target(Files, of="sounds"), target(SoundChecks), near)
    assert said["dropped"]["sound_checks"] == {"silent": 1, "clipped": 1, "short": 1, "broken": 1}
    assert said["dropped"]["near_duplicates"] == {"near duplicate": 1}
    assert len(ids(rows) & {"0.wav", "softer.flac"}) == 1 and len(rows) == 5


def test_rows_of_tables_that_are_empty_infinite_unanswered_or_there_twice_go(tmp_path):
    tables = {
        "train/a.csv": "age,income,class\n31,1e3,yes\n31,1e3,yes\n40,?,no\n,,no\n22,-inf,no\n50,2,\n61,10,yes\n"
        "1,12,no\n11,2,no\n",
        "test/b.csv": "age,income,class\n61,10,yes\n70,5,no\n",
        "train/c.csv": "age,class\n1,2\n",
    }
    for name, text in tables.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    columns = ("age", "income", "class")
    steps = target(RowChecks, columns=columns, answer="class"), target(ExactDuplicates)
    said, rows = cleaned(tmp_path / "in", tmp_path / "out", target(Rows, columns=columns), *steps)
    assert said["dropped"]["row_checks"] == {"empty": 1, "infinite": 1, "no answer": 1} and said["set_aside"] == 1
    assert said["dropped"]["exact_duplicates"] == {"exact duplicate": 2}  # "1,12" and "11,2" are none
    kept = sorted((row["age"], row["income"], row["id"].split("/")[0]) for row in rows)
    assert [k[:2] for k in kept] == [("1", "12"), ("11", "2"), ("31", "1e3"), ("40", "?"), ("61", "10"), ("70", "5")]
    assert kept[4][2] == "test"  # what is tested on stays there

    read = read_columns([file for file in table_files(str(tmp_path / "out"), "utf-8") if "train" in file.name])
    assert [read[name].kind for name in columns] == ["number", "number", "category"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"columns": ()}, "need their columns"),
        ({"columns": ("a", "digest")}, "uses itself"),
    ],
)
def test_columns_that_no_rows_can_have_are_refused(given, says):
    with pytest.raises(UserError, match=says):
        Rows(**given)
    with pytest.raises(UserError, match="no column is the answer"):
        RowChecks(columns=("a",), answer="b")


def test_a_row_without_its_id_sets_its_table_aside(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("id,x,y\nr1,1,2\nr2,3,4\n")
    (tmp_path / "in" / "b.csv").write_text("id,x,y\nr3,5,6\n,7,8\n")
    columns = ("x", "y")
    read, steps = target(Rows, columns=columns, id="id"), target(RowChecks, columns=columns)
    said, rows = cleaned(tmp_path / "in", tmp_path / "out", read, steps)
    assert ids(rows) == {"r1", "r2"} and said["set_aside"] == 1 and "has no 'id'" in capsys.readouterr().err
