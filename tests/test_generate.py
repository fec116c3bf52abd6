"""Prompts continued: batches, padding, chunks, ends, stop texts and characters; the verb."""

import contextlib
import functools
import io
import itertools
import json
import os
import pathlib
import pty
import runpy

import jax
import numpy as np
import pytest
from toys import styled

from bigbase_jax import verbs
from bigbase_jax.core import UserError
from bigbase_jax.decoding.sampling import SamplingParams
from bigbase_jax.inference.generation import Engine, parse_sampling, read_prompts
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.transformer import stack_blocks
from bigbase_jax.text.detokenizer import IncrementalDetokenizer
from bigbase_jax.text.tokenizer import Bytes, Characters, Subwords, Symbols

ROOT = pathlib.Path(__file__).parents[1]
LLAMA = {"positions": "rope", "norm": "rmsnorm", "gated": True, "activation": "silu", "kv_heads": 2, "tied": False}
PROMPTS = [np.array(p, np.int32) for p in ([3, 1, 4, 1, 5, 9, 2, 6], [9], [2, 6, 5])]
DRAWN = SamplingParams(
    max_new_tokens=12, temperature=1.2, top_k=9, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=7
)


@functools.cache
def ready(vocab_size=64, length=64, **more):
    """A tiny Llama with large random parameters."""
    size = {"vocab_size": vocab_size, "length": length, "width": 16, "depth": 1, "heads": 4}
    model = styled(Decoder, **size, **{**LLAMA, **more})
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    random = np.random.default_rng(0)

    def draw(path, x):
        return np.float32((path[-1].key == "scale") + 0.5 * random.normal(size=x.shape))

    return model, {"params": jax.tree.map_with_path(draw, shapes)}


@functools.cache
def recomputed(count=12):
    """What follows each prompt greedily, with all logits anew for every token."""
    model, variables = ready()
    apply, found = jax.jit(model.apply), []
    for prompt in PROMPTS:
        tokens = prompt.tolist()
        for _ in range(count):
            logits = apply(variables, np.array([tokens + [0] * (24 - len(tokens))], np.int32))
            tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
        found.append(tokens[len(prompt) :])
    return found


# -------------------------------------------------------------------------------------------------------------- tokens


def generate(model, variables, prompts, params=None, end=None):
    return Engine(model, variables, end).generate(prompts, params or SamplingParams())


def lists(found):
    return [x.tolist() for x in found]


def test_greedy_equals_recomputing_without_a_cache():
    found = generate(*ready(), PROMPTS, SamplingParams(max_new_tokens=12))
    assert lists(found) == recomputed()
    assert len(set(itertools.chain(*recomputed()))) > 9


@pytest.mark.parametrize("params", [SamplingParams(max_new_tokens=12), DRAWN], ids=["greedy", "drawn"])
def test_neither_the_batch_nor_the_chunks_nor_the_padding_matter(params):
    model, variables = ready()
    together = lists(generate(model, variables, PROMPTS, params))
    assert [lists(generate(model, variables, [p], params))[0] for p in PROMPTS] == together
    longer = np.arange(20, dtype=np.int32)  # so that the others have more padding, and other sizes
    assert lists(generate(model, variables, [longer, *PROMPTS, *PROMPTS], params))[1:4] == together
    for every in (1, 5):
        parts = list(Engine(model, variables).stream(PROMPTS, params, every))
        assert lists(np.concatenate(some) for some in zip(*parts, strict=True)) == together
        assert max(len(x) for some in parts for x in some) == every


def test_every_prompt_may_have_its_own_params():
    model, variables = ready()
    params = [SamplingParams(max_new_tokens=5), DRAWN, SamplingParams(max_new_tokens=9, temperature=1.0, seed=3)]
    together = lists(generate(model, variables, PROMPTS, params))
    alone = [lists(generate(model, variables, [p], s))[0] for p, s in zip(PROMPTS, params, strict=True)]
    assert together == alone and [len(x) for x in together] == [5, 12, 9]


def test_seeds():
    model, variables = ready()
    one, same, other = (lists(generate(model, variables, PROMPTS, SamplingParams(12, 1.0, seed=s))) for s in (1, 1, 2))
    assert one == same and all(a != b for a, b in zip(one, other, strict=True))


def test_a_text_ends_at_the_end_token_which_is_not_part_of_it():
    model, variables = ready()
    wanted = recomputed()
    end = wanted[0][4], wanted[2][2]
    cut = [list(itertools.takewhile(lambda t: t not in end, row)) for row in wanted]
    assert lists(generate(model, variables, PROMPTS, SamplingParams(max_new_tokens=12), end=end)) == cut
    assert len(set(map(len, cut))) > 1
    parts = list(Engine(model, variables, end).stream(PROMPTS, SamplingParams(max_new_tokens=12), 2))
    assert lists(np.concatenate(some) for some in zip(*parts, strict=True)) == cut


def test_stacked_blocks_and_half_precision():
    model, variables = ready()
    stacked = {"params": stack_blocks(variables["params"])}
    assert lists(generate(model.clone(scan=True), stacked, PROMPTS, SamplingParams(max_new_tokens=12))) == recomputed()
    half = model.clone(dtype="bfloat16")
    engine = Engine(half, variables)
    assert {x.dtype.name for x in jax.tree.leaves(engine.variables)} == {"float32", "bfloat16"}
    tokens = np.arange(12, dtype=np.int32)[None]
    np.testing.assert_array_equal(jax.jit(half.apply)(engine.variables, tokens), jax.jit(half.apply)(variables, tokens))


def test_a_long_prompt_is_read_in_parts():
    model, variables = ready(length=1024, window=40)
    prompt = np.random.default_rng(0).integers(0, 64, 300, np.int32)
    found = generate(model, variables, [prompt, PROMPTS[0]], SamplingParams(max_new_tokens=4))
    whole = np.concatenate([prompt, found[0][:3]])
    wanted = jax.jit(model.apply)(variables, whole[None])[0, len(prompt) - 1 :]
    assert found[0].tolist() == np.argmax(wanted, -1).tolist()
    assert lists(generate(model, variables, PROMPTS[:1], SamplingParams(max_new_tokens=4))) == lists(found[1:])


def test_few_programs_are_compiled():
    from bigbase_jax.inference import generation as module

    model, variables = ready()
    generate(model, variables, [np.arange(5, dtype=np.int32)] * 2, SamplingParams(max_new_tokens=10))
    before = module._decode._cache_size(), module._prefill._cache_size()
    for length, count in ((3, 16), (9, 12), (16, 1)):
        generate(model, variables, [np.arange(length, dtype=np.int32)] * 2, SamplingParams(max_new_tokens=count))
    assert (module._decode._cache_size(), module._prefill._cache_size()) == before


def test_beams_are_at_least_as_probable_as_greedy_text():
    model, variables = ready()
    found = generate(model, variables, PROMPTS, SamplingParams(max_new_tokens=6, beams=4))
    greedy = generate(model, variables, PROMPTS, SamplingParams(max_new_tokens=6))
    apply = jax.jit(model.apply)

    def score(prompt, new):
        tokens = np.concatenate([prompt, new, np.zeros(24 - len(prompt) - len(new), np.int32)]).astype(np.int32)
        logp = jax.nn.log_softmax(apply(variables, tokens[None])[0])
        return sum(float(logp[len(prompt) + i - 1, t]) for i, t in enumerate(new))

    more = [score(p, a) - score(p, b) for p, a, b in zip(PROMPTS, found, greedy, strict=True)]
    assert min(more) > -1e-4 and max(more) > 1e-3


@pytest.mark.parametrize(
    ("prompt", "more", "says"),
    [
        ([], {}, "the prompt is empty"),
        (range(10), {"max_new_tokens": 7}, "10 tokens leaves room for 6 of the model's 16; max_new_tokens is 7"),
        (range(16), {}, "has 16 tokens, and the model reads 16 in all; shorten it to at most 15"),
    ],
)
def test_what_does_not_fit_is_one_sentence(prompt, more, says):
    model, variables = ready(length=16, positions="learned")
    with pytest.raises(UserError, match=says):
        generate(model, variables, [np.array(prompt, np.int32)], SamplingParams(**more))


def test_as_many_tokens_as_fit_unless_told_otherwise():
    model, variables = ready(length=16, positions="learned")
    assert [len(x) for x in generate(model, variables, PROMPTS)] == [8, 15, 13]
    turned = ready(length=16)
    assert len(generate(*turned, PROMPTS[:1], SamplingParams(max_new_tokens=12))[0]) == 12  # rotary positions go on


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("temperture=1", "--sample has no argument 'temperture'. Did you mean 'temperature'"),
        ("temperature=hot", "temperature='hot' is not of type float"),
        ("temperature=-1", "temperature is -1.0; it must be at least 0"),
        ("top_p=0.5", "set temperature"),
        ("temperature=1,top_p=1.5", "top_p is 1.5; it must be between 0 and 1"),
        ("max_new_tokens=0", "max_new_tokens is 0"),
        ("beams=2,temperature=1", "a beam search takes no temperature"),
    ],
)
def test_mistaken_samplings(text, says):
    with pytest.raises(UserError) as error:
        parse_sampling(text)
    assert says in str(error.value)


def test_samplings_are_read():
    assert parse_sampling("temperature=0.8,top_k=50,seed=3", ["\\n", "END"]) == SamplingParams(
        temperature=0.8, top_k=50, seed=3, stop=("\n", "END")
    )
    assert parse_sampling(None) == SamplingParams() and parse_sampling("max_new_tokens=7").max_new_tokens == 7


# ---------------------------------------------------------------------------------------------------------------- text

TEXT = "Grüße, 世界! 👩‍🚀 naïve — naïve; καλημέρα κόσμε, 世界 und die Welt. " * 3


@functools.cache
def tokenizers():
    texts = functools.partial(iter, [TEXT * 5])
    fit = {"texts": texts, "others": lambda: iter(()), "end": True}
    return {
        "bytes": Bytes().fit(**fit),
        "characters": Characters(fallback=True).fit(texts=lambda: iter(["abc de"]), others=fit["others"], end=True),
        **{name: Subwords(name, 320).fit(**fit) for name in ("bpe", "unigram", "wordpiece")},
    }


@pytest.mark.parametrize("name", ["bytes", "characters", "bpe", "unigram", "wordpiece"])
def test_text_comes_in_whole_characters(name):
    tokenizer = tokenizers()[name]
    tokens = tokenizer.encode_batch([TEXT])[0][0].tolist()
    for cut in (0, 3, 11):
        detokenizer = IncrementalDetokenizer(tokenizer, tokens[:cut])
        pieces = [detokenizer.push(t) for t in tokens[cut:]]
        assert not any("\ufffd" in piece for piece in pieces)
        pieces.append(detokenizer.finish())
        whole, before = tokenizer.decode(tokens), tokenizer.decode(tokens[:cut])
        if "\ufffd" not in before:  # else the prompt ends within a character
            assert "".join(pieces) == detokenizer.text == whole[len(before) :]
    assert len([p for p in pieces if p]) > 20


def test_what_is_not_utf8_is_shown_as_such():
    tokenizer = Symbols()
    for raw in (b"\xff\xfe a", b"a\xe4\xb8", b"\xe4\xb8a\x80\x80\x80\x80\x80"):
        detokenizer = IncrementalDetokenizer(tokenizer)
        pieces = [detokenizer.push(b) for b in raw] + [detokenizer.finish()]
        assert "".join(pieces) == raw.decode(errors="replace")


def test_a_token_that_only_the_model_has_has_no_text_in_a_prompt_either():
    for tokenizer in (Symbols(), tokenizers()["bpe"]):
        beyond, (letter,) = tokenizer.size + 5, tokenizer.encode_batch(["a"])[0][0].tolist()
        detokenizer = IncrementalDetokenizer(tokenizer, [letter, beyond])
        pieces = [detokenizer.push(token) for token in (beyond, letter)]
        assert "".join(pieces) + detokenizer.finish() == "a"


@pytest.mark.parametrize("stop", [("</s>",), ("界! ",), ("x", "Welt", "die W")])
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_stop_texts_span_tokens_and_never_show(stop, name):
    tokenizer = tokenizers()[name]
    text = "Grüße, </ 世界 </s> 世界! </s> und die Welt"
    tokens = tokenizer.encode_batch([text])[0][0].tolist()
    detokenizer, pieces = IncrementalDetokenizer(tokenizer, stop=stop), []
    for token in tokens:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    cut = min(text.index(s) for s in stop if s in text)
    assert "".join(pieces) + detokenizer.finish() == text[:cut] == detokenizer.text
    assert detokenizer.stopped and len(pieces) <= len(tokens)


def test_what_only_begins_like_a_stop_text_is_shown_in_the_end():
    detokenizer = IncrementalDetokenizer(Symbols(), stop=("</s>",))
    assert "".join(detokenizer.push(b) for b in b"a </") == "a " and detokenizer.finish() == "</"
    assert not detokenizer.stopped and detokenizer.text == "a </"


def byte_engine(**more):
    model, variables = ready(vocab_size=257, positions="rope", **more)
    return Engine(model, variables, 256, Symbols(end=True))


def test_texts_are_continued_and_streamed():
    engine = byte_engine()
    prompts = ["Once upon", "a", "time ü"]
    whole = engine.complete(prompts, DRAWN)
    assert [c.finish_reason for c in whole] == ["length"] * 3 and [len(c.tokens) for c in whole] == [12] * 3
    for prompt, completion in zip(prompts, whole, strict=True):
        assert completion.text == bytes(completion.tokens.tolist()).decode(errors="replace")
        steps = [step[0] for step in engine.write([prompt], DRAWN)]
        assert "".join(piece for piece, _ in steps) == completion.text
        assert steps[-1][1].text == completion.text and all(c is None for _, c in steps[:-1])
    text = bytes(whole[0].tokens.tolist()).decode(errors="replace")
    stop = text[5:7]
    cut = engine.complete(prompts, [SamplingParams(**{**vars(DRAWN), "stop": (stop,)}), DRAWN, DRAWN])
    assert cut[0].text == text[: text.index(stop)] and cut[0].finish_reason == "stop" and len(cut[0].tokens) < 12
    assert cut[1].text == whole[1].text


def test_an_end_is_told_from_a_full_length():
    engine = byte_engine()
    free = engine.complete(["Once"], SamplingParams(max_new_tokens=9))[0]
    ended = Engine(engine.model, engine.variables, int(free.tokens[4]), engine.tokenizer)
    found = ended.complete(["Once"], SamplingParams(max_new_tokens=9))[0]
    assert (
        found.finish_reason == "end"
        and found.tokens.tolist() == free.tokens[: free.tokens.tolist().index(free.tokens[4])].tolist()
    )
    assert ended.complete(["Once"], SamplingParams(max_new_tokens=9, beams=2))[0].finish_reason in ("end", "length")


def test_an_empty_prompt_begins_after_the_end_token():
    engine = byte_engine()
    assert engine.tokens_of([""])[0].tolist() == [256]
    without = Engine(engine.model, engine.variables, None, Symbols())
    with pytest.raises(UserError, match="the prompt is empty"):
        without.complete([""], DRAWN)


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo words\n")
    assert read_prompts(str(tmp_path / "a.txt")) == ["one", "two words"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\\ntwo", "more": 1}\n')
    assert read_prompts(str(tmp_path / "a.jsonl")) == ["one\ntwo"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')
    for name, says in (("b.jsonl", "line 2 of"), ("none.txt", "cannot be read")):
        with pytest.raises(UserError, match=says):
            read_prompts(str(tmp_path / name))
    with pytest.raises(UserError, match="needs --prompt"):
        read_prompts(None)


# ------------------------------------------------------------------------------------------------------------ the verb


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of the recipe for language models, after a step."""
    workdir = str(tmp_path_factory.mktemp("runs") / "lm")
    config = runpy.run_path(str(ROOT / "configs" / "lm.py"))["get_config"]("tiny")
    config.train.steps = 2
    verbs.train(config, workdir)
    return workdir


def said(workdir, prompts, **more):
    """The lines of JSON that the verb prints."""
    out = io.StringIO()
    assert verbs.generate(workdir, prompts, out=out, **more) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_the_verb_continues_prompts(finished, tmp_path):
    sample = "temperature=1,max_new_tokens=9,seed=4"
    lines = said(finished, ["def ", "ü"], sample=sample)
    assert [line["prompt"] for line in lines] == ["def ", "ü"]
    for line in lines:
        assert line["tokens"] == 9 and line["finish_reason"] == "length" and line["tokens_per_second"] > 0
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ü"}\n')
    (line,) = said(finished, None, pattern=str(tmp_path / "prompts.jsonl"), sample=sample)
    assert line["text"] == lines[1]["text"]


def test_a_terminal_sees_the_text_as_it_comes(finished):
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        assert verbs.generate(finished, ["def "], sample="max_new_tokens=12", out=terminal) == 0
    shown = b""
    with (
        contextlib.suppress(OSError),
        os.fdopen(leader, "rb", buffering=0) as screen,
    ):  # what reading past the end gives
        while part := screen.read(65536):
            shown += part
    text, _, line = shown.decode().rstrip("\r\n").rpartition("\r\n")
    assert text.replace("\r\n", "\n") == json.loads(line)["text"]


@pytest.mark.parametrize(
    ("prompt", "more", "says"),
    [
        ("a", {"sample": "tempo=1"}, "--sample has no argument 'tempo'"),
        (None, {}, "needs --prompt"),
        ("a" * 99, {}, "the prompt has 99 tokens, and the model reads 32 in all"),
        ("\udcff", {}, "not valid UTF-8"),
        ("a", {"chat": True}, "has no chat template"),
    ],
)
def test_mistakes_are_one_sentence(finished, prompt, more, says):
    with pytest.raises(UserError, match=says):
        verbs.generate(finished, prompt and [prompt], **more)
