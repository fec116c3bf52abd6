"""What texts are read as: a table of cases, what is dropped, and what cannot be spoken."""

import shutil

import pytest

from bigbase_jax.core import UserError
from bigbase_jax.text import phonemes
from bigbase_jax.text.phonemes import front_end
from bigbase_jax.text.spoken import chinese, english

ENGLISH = {
    "Dr. Ruth paid $5.20 on 3/5/2024.": "doctor Ruth paid five dollars and twenty cents"
    " on March fifth, twenty twenty-four.",
    "Author of the danger trail, Philip Steels, etc.": "Author of the danger trail, Philip Steels, et cetera.",
    "On March 5th, at 10:05 a.m.": "On March fifth, at ten oh five a m",
    "12,345 people; 3.14 and 007": "twelve thousand three hundred and forty-five people; three point one four and"
    " zero zero seven",
    "2024-01-31 and 5 March 1999": "January thirty-first, twenty twenty-four and the fifth of March, nineteen"
    " ninety-nine",
    "99/99/2024": "ninety-nine ninety-nine two thousand and twenty-four",
    "St. John lives on Main St. in the U.S.": "Saint John lives on Main street in the U S",
    "the 1990s, in 1905, -5 °C, 20% & 3 km": "the nineteen nineties, in nineteen oh-five, minus five degrees Celsius,"
    " twenty percent and three kilometers",
    "$3.5 million, £1.01, ¥100, €1": "three point five million dollars, one pound and one penny, one hundred yen,"
    " one euro",
    "10:00 or 23:59": "ten o'clock or twenty-three fifty-nine",
    "e.g. No. 5, vs. Mr. Brown's co-op": "for example number five, versus mister Brown's co-op",
    "1st 22nd 103rd": "first twenty-second one hundred and third",
    "he may 5 — or not…": "he may five, or not.",
    "9" * 20: " ".join(["nine"] * 20),
}
CHINESE = {
    "2024年3月5日，¥10.5": "二零二四年三月五日,十点五元",
    "1998-01-02 10:30": "一九九八年一月二日 十点三十分",
    "电话13812345678，1,234人，100%": "电话一三八一二三四五六七八,一千二百三十四人,百分之一百",
    "10 12 20 101 110 1010 10010": "十 十二 二十 一百零一 一百一十 一千零一十 一万零一十",
    "100010000 123456789 007": "一亿零一万 一亿二千三百四十五万六千七百八十九 零零七",
}


@pytest.mark.parametrize(("given", "said"), [*ENGLISH.items()])
def test_english_is_spelt_out(given, said):
    assert english(given) == said


@pytest.mark.parametrize(("given", "said"), [*CHINESE.items()])
def test_chinese_is_spelt_out(given, said):
    assert chinese(given) == said


def test_characters_with_one_pause_between_words():
    front = front_end("en-characters")
    assert "".join(front('"Café", she -- (really)  said: no!! 5')) == "cafe,she,really said:no!five"
    assert front.read_all(["mit 漢字 und 😀"])[0][1] == "漢字😀"
    assert "".join(front_end("characters")("Größe, 5 Öfen")) == "größe,5 öfen"


def test_chinese_has_initials_finals_and_tones():
    front = front_end("zh")
    found = front("你好，银行行长有2个女儿AI。")
    syllables = "n i 2 h ao 3 , in 2 h ang 2 h ang 2 zh ang 3 iou 3 er 4 g e 4 n ü 3 er 2 A I ."
    assert found == syllables.split()
    assert front.read_all(["嗯呣好"])[0][0] == ["en", "1", "h", "ao", "3"]
    assert front.read_all(["嗯呣好"])[0][1] == "呣"
    assert set(found) <= set(front.symbols)


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_english_has_phonemes():
    front = front_end("en")
    assert front.name == "en-phonemes"
    assert "".join(front("Hello, world!! It's 3 o'clock.")) == "həlˈoʊ,wˈɜːld!ɪts θɹˈiː əklˈɑːk."
    assert front("[[f i S]] --help")[:2] == front("f i s, help")[:2]  # its own notation and flags are texts
    ((symbols, unknown),) = front.read_all(["— 漢字, well-known 😀 naïve <b>"])
    assert ("".join(symbols), unknown) == ("wˈɛlnˈoʊn naɪˈiːv bˈiː", "漢字😀")
    texts = ["One, two.", "Three?", "a " * 600]
    assert front.read_all(texts) == [front.read_all([text])[0] for text in texts]


@pytest.mark.parametrize("name", ["en", "zh", "characters", "en-characters"])
@pytest.mark.parametrize("text", ["", " \n", "...!?", "😀 — 🎉"])
def test_what_has_no_sound_is_refused(name, text):
    with pytest.raises(UserError, match="nothing in"):
        front_end(name)(text)


def test_without_espeak(monkeypatch, capfd):
    monkeypatch.setattr(phonemes, "PROGRAM", "no-such-espeak")
    assert front_end("en").name == "en-characters"
    assert "no-such-espeak is not installed: English is read by its letters" in capfd.readouterr().err
    with pytest.raises(UserError, match="trained on the phonemes"):
        front_end("en-phonemes")
    with pytest.raises(UserError, match="no text front end 'fr'"):
        front_end("fr")
    with pytest.raises(UserError, match="cut it into sentences"):
        front_end("en")("a" * 30_000)


def test_a_program_that_hangs_or_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(phonemes, "SECONDS", 0.2)
    for script, said in (("sleep 5", "did not answer"), ("echo broken >&2; exit 3", "failed: broken")):
        program = tmp_path / "espeak"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(phonemes, "PROGRAM", str(program))
        with pytest.raises(UserError, match=said):
            front_end("en-phonemes")("hello")
