"""Marian's tokenizer files against transformers: the same ids and texts, through a run and back to the same files."""

import io
import itertools
import json

import jax
import numpy as np
import pytest
from test_launch import launch
from test_marian import MARIAN, made

from bigbase_jax import verbs
from bigbase_jax.core import UserError
from bigbase_jax.data.sources.synthetic.numerals import Numerals
from bigbase_jax.pretrained.start import RunTokenizer
from bigbase_jax.pretrained.tokenizers import published
from bigbase_jax.text.tokenizer import FIRST, SECOND, TokenizerFile, encode, load, source_tokenizer

EN = [f"The {a} {b} {c}." for a, b, c in itertools.product(("big", "old", "3"), ("dogs", "men"), ("run", "see it"))]
DE = [f"Die {a} {b} {c}." for a, b, c in itertools.product(("große", "alte"), ("Hunde", "Männer"), ("rennen", "da"))]
ZH = [f"{a}{b}{c}。" for a, b, c in itertools.product(("大", "老", "三只"), ("狗", "男人"), ("跑", "看见它", "问青天"))]
HARD = (
    *("The old dogs run.", "Die große Männer rennen, da!", "老男人看见它。", "大狗问青天，三只狗跑？"),
    *("", " ", "  two  spaces,\ttabs\r\nand \u3000 wide\u00a0ones\u200b \n", "\x0b\x0c\x1c.", "\u2028"),
    *("🦊🦊 fox 猫 ж", "ﬁve Ｆｏｘ ㌔ ①", "e\u0301 \u0e33", "not special: <s>", "a\u2581b"),
    *(">>fr<< The dogs", ">>fr<<The dogs", ">>xx<< The dogs", ">>fr<<", " >>fr<< The", ">>a b<< c", ">> a", "a<<b"),
)


def learned(lines, kind):
    spm, model = pytest.importorskip("sentencepiece"), io.BytesIO()
    words = {"vocab_size": 90, "model_type": kind, "character_coverage": 1.0, "hard_vocab_limit": False}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **words)
    return model.getvalue()


def write(folder, kind="unigram", target=(*DE, *ZH)):
    """A folder as opus-mt has it: two files, and a vocabulary of both without some of their pieces."""
    spm = pytest.importorskip("sentencepiece")
    folder.mkdir()
    pieces = {"</s>": None, "<unk>": None}
    for name, lines in (("source", EN), ("target", target)):
        model = learned(lines, kind)
        (folder / f"{name}.spm").write_bytes(model)
        read = spm.SentencePieceProcessor(model_proto=model)
        pieces |= {read.id_to_piece(i): None for i in range(3, read.vocab_size()) if i % 11}
    names = [*pieces, ">>fr<<", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"source_lang": "en", "target_lang": "de"}')
    return folder


def read(folder, end=True):
    return TokenizerFile(str(folder)).fit(lambda: iter(()), lambda: iter(()), end)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_same_ids_and_texts_on_either_side(hf, tmp_path, kind):
    theirs = hf.MarianTokenizer.from_pretrained(write(tmp_path / "m", kind))
    target = load(read(tmp_path / "m").state())
    source = source_tokenizer(target)
    assert (target.size, target.end, target.special["pad"]) == (len(theirs), 0, theirs.pad_token_id)
    unknown = differ = 0
    for text in (*HARD, *EN, *DE, *ZH):
        wanted = theirs(text).input_ids, theirs(text_target=text).input_ids
        found = [[*encode(side, text).tolist(), side.end] for side in (source, target)]
        assert tuple(found) == wanted, text
        for ids, side in zip(wanted, (source, target), strict=True):
            assert theirs.decode(ids, skip_special_tokens=True, use_source_tokenizer=False) == target.decode(ids)
            assert theirs.convert_ids_to_tokens(ids) == side.pieces(ids)
            tokens, counts = side.encode_batch([text])[0]
            assert len(counts) == len(tokens) and (counts.sum() == len(text.encode()) or not len(tokens))
        unknown += sum(row.count(1) for row in found)
        differ += found[0] != found[1]
    assert unknown > 5 and differ > 20


def test_languages_and_what_looks_like_a_special_token(tmp_path):
    target = read(write(tmp_path / "m"))
    source = source_tokenizer(target)
    code = json.loads((tmp_path / "m" / "vocab.json").read_text())[">>fr<<"]
    assert encode(source, ">>fr<< The dogs")[0] == code and encode(source, ">>xx<<The dogs")[0] == 1
    np.testing.assert_array_equal(encode(source, ">>fr<< The dogs")[1:], encode(source, "The dogs"))
    for side in (source, target):  # text is text
        assert not {side.end, side.special["pad"]} & set(encode(side, "</s> <pad>").tolist())
        marked, counts = side.encode_special("The</s> dogs")
        assert side.end in marked and counts.sum() == len("The</s> dogs")
    assert source.layout(False).tokens == (FIRST, 0) and target.layout(True).tokens == (FIRST, SECOND, 0)
    tokens = encode(target, "Die Hunde")
    assert b"".join(target.spelled()[t] for t in tokens) == b" Die unde"  # of which one piece is not in the vocabulary
    assert target.decode([*tokens, 0, target.special["pad"], 1, 10_000]) == "Die unde"
    assert read(tmp_path / "m", end=False).end is None
    assert source_tokenizer(source) is source and source_tokenizer(target) is source


def test_the_files_come_back(hf, tmp_path):
    folder = write(tmp_path / "m")
    (tmp_path / "out").mkdir()
    for name, content in published(load(read(folder).state())).items():
        (tmp_path / "out" / name).write_bytes(content)
    for name in ("source.spm", "target.spm"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    theirs, back = (hf.MarianTokenizer.from_pretrained(path) for path in (folder, tmp_path / "out"))
    assert type(hf.AutoTokenizer.from_pretrained(tmp_path / "out")) is hf.MarianTokenizer
    assert all(theirs(text, text_target=text) == back(text, text_target=text) for text in HARD)


def test_a_stamp_knows_all_three_files_and_one_file_stands_for_itself(tmp_path):
    folder = write(tmp_path / "m")
    before = TokenizerFile(str(folder)).file_signature()
    assert before[::3] == ("vocab.json", "source.spm", "target.spm")
    (folder / "target.spm").write_bytes(learned(DE, "unigram"))
    assert TokenizerFile(str(folder)).file_signature() != before
    alone, source = read(folder / "source.spm"), read(folder).source
    assert alone.pieces(encode(alone, "The big")) == source.pieces(encode(source, "The big"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("target.spm", None, "has source.spm but no target.spm"),
        ("vocab.json", None, "has source.spm but no vocab.json"),
        ("vocab.json", b"[", "vocab.json cannot be read as JSON"),
        ("vocab.json", b'{"a": 0, "</s>": 1}', "vocab.json has no <unk>"),
        ("target.spm", b"\xff\xff", "is not a SentencePiece model"),
        ("target_vocab.json", b"{}", "a vocabulary for each language"),
    ],
)
def test_folders_that_cannot_be_read_are_one_sentence(tmp_path, name, content, says):
    folder = write(tmp_path / "m")
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read(folder)


# ------------------------------------------------------------------------------------------------------------- a model


@pytest.fixture(scope="module")
def marian(hf, random_model, tmp_path_factory):
    """(their model, the folder with it and its tokenizer)."""
    folder = write(tmp_path_factory.mktemp("marian") / "m", target=[*DE, *(f"{n} hundred and twenty" for n in DE)])
    size = len(json.loads((folder / "vocab.json").read_text()))
    words = {**MARIAN, "vocab_size": size, "pad_token_id": size - 1, "decoder_start_token_id": size - 1}
    theirs = made(hf, random_model, {**words, "forced_eos_token_id": None, "max_position_embeddings": 64})
    with hf.torch.no_grad():
        theirs.model.shared.weight *= 3  # so that translations differ
    theirs.generation_config.update(bad_words_ids=[[size - 1]], max_length=14, num_beams=1)
    theirs.save_pretrained(folder)
    return theirs, folder


TEXTS = ["The old dogs run.", "3 men see it", "see 老 dogs", "The big men run.", "run 3"]


def translated(hf, model, folder, **words):
    """What transformers translate."""
    tokenizer = hf.MarianTokenizer.from_pretrained(folder)
    with hf.torch.no_grad():
        ids = model.generate(**tokenizer(TEXTS, padding=True, return_tensors="pt"), do_sample=False, **words)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, use_source_tokenizer=False)
    return [" ".join(text.split()) for text in texts]


def test_a_published_folder_translates(hf, marian):
    theirs, folder = marian
    for words in ({"num_beams": 1}, {"num_beams": 4}):
        config = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({**config, **words}))
        out = io.StringIO()
        with jax.default_matmul_precision("highest"):
            assert verbs.generate(str(folder), TEXTS, out=out) == 0
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        assert [line["prompt"] for line in lines] == TEXTS
        assert [line["text"] for line in lines] == translated(hf, theirs, folder, **words)
    assert len({line["text"] for line in lines}) > 1
    with pytest.raises(UserError, match="as generation_config.json says"):
        verbs.generate(str(folder), TEXTS, sample="temperature=1", out=out)


def test_from_a_folder_to_a_run_that_translates_and_to_a_folder(hf, marian, tmp_path):
    theirs, folder = marian
    root = tmp_path / "data"
    root.mkdir()
    for split, count in (("train", 8), ("val", 4)):
        (root / f"{split}.en").write_text("\n".join(EN[:count]))
        (root / f"{split}.de").write_text("\n".join(DE[:count]), encoding="utf-8")
    recipe = [f"--config=configs/translate.py:tiny,root={root}", f"--workdir={tmp_path / 'run'}"]
    still = ["--config.optim.learning_rate=0.0", "--config.optim.weight_decay=0.0", "--config.task.max_length=13"]
    _, _, said = launch(*recipe, *still, f"--config.init_from={folder}")
    assert "init_from" in said and f"a vocabulary of {theirs.config.vocab_size}" in said
    dataset_info = json.loads((tmp_path / "run" / "data.json").read_text())["dataset_info"]
    pad = theirs.config.pad_token_id
    assert (dataset_info["start_id"], dataset_info["pad_id"], dataset_info["end_id"], dataset_info["shared"]) == (
        pad,
        pad,
        0,
        True,
    )
    assert load(dataset_info["source_tokenizer"]).pieces([5]) == load(dataset_info["tokenizer"]).pieces([5])

    out = io.StringIO()
    with jax.default_matmul_precision("highest"):
        verbs.generate(str(tmp_path / "run"), TEXTS, out=out)
    texts = [json.loads(line)["text"] for line in out.getvalue().splitlines()]
    assert texts == translated(hf, theirs, folder, num_beams=1)  # nothing moved

    done, _, _ = launch("--mode=export", f"--workdir={tmp_path / 'run'}")
    files = {"vocab.json", "source.spm", "target.spm", "tokenizer_config.json", "generation_config.json"}
    assert files <= set(done["files"]) and "tokenizer.json" not in done["files"]
    back = hf.MarianMTModel.from_pretrained(done["export"]).eval()
    assert translated(hf, back, done["export"], num_beams=1) == texts

    again = RunTokenizer(str(tmp_path / "run")).fit(None, None, True)  # a run that begins from this one has both sides
    assert [side.state() for side in (source_tokenizer(again), again)] == [
        dataset_info["source_tokenizer"],
        dataset_info["tokenizer"],
    ]


def test_numbers_are_read_and_written_by_the_two_sides(tmp_path):
    node = TokenizerFile(str(write(tmp_path / "m", target=["three hundred and two", "forty-nine"])))
    data = Numerals(tokenizer=node, largest=99, count=30).prepare(tmp_path, 0, print)
    example = data.splits["train"][0]
    source, target = load(data.dataset_info["source_tokenizer"]), load(data.dataset_info["tokenizer"])
    name = bytes(example["reference"]).rstrip(b"\0").decode()
    wanted = encode(target, name)
    np.testing.assert_array_equal(example["target_in"][1 : len(wanted) + 1], wanted)
    assert (example["target_in"][0], example["source"][example["source_segments"].sum() - 1]) == (target.size - 1, 0)
    assert source.state() != target.state()
