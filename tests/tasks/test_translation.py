"""Translation: torch's loss, exact sums over padding, what is written, BLEU of a perfect one, made-up pairs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import loss_of, measured

from bigbase_jax import parallel
from bigbase_jax.core import Evaluated, Task, UserError, add
from bigbase_jax.data.sources.synthetic.numerals import Numerals, in_words
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.tasks.metrics import bleu
from bigbase_jax.tasks.translation import PADDING, Translation
from bigbase_jax.text.tokenizer import Symbols

S, T, V = 7, 6, 11
TINY = {"vocab_size": V, "length": 9, "width": 16, "depth": 1, "heads": 2, "pad_id": 10}
END, START, PAD = 8, 9, 10
IDS = {"end_id": END, "start_id": START, "pad_id": PAD}


def batch_of(size, seed=0, masked=0):
    """Sources of 4 to 7 tokens, targets of 3 to 6, the end included."""
    rng = np.random.default_rng(seed)
    segment_ids = (np.arange(S) < rng.integers(4, S + 1, (size, 1))).astype(np.int32)
    real = np.arange(T) < rng.integers(3, T + 1, (size, 1))
    last = real & ~np.roll(real, -1, 1) | (np.arange(T) == T - 1) & real
    target_out = np.where(last, END, np.where(real, rng.integers(0, 8, (size, T)), PADDING)).astype(np.int32)
    before = np.concatenate([np.full((size, 1), START), target_out[:, :-1]], 1)
    mask = (np.arange(size) < size - masked).astype(np.float32)
    arrays = {
        "source": np.where(segment_ids > 0, rng.integers(0, 8, (size, S)), PAD).astype(np.int32),
        "source_segments": segment_ids,
        "target_in": np.where(real, before, PAD).astype(np.int32),
        "target_out": target_out,
        "reference": np.zeros((size, 4), np.uint8),
        "mask": mask,
    }
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def ready(model=None, **more):
    task = Translation(model or EncoderDecoder(**TINY), **{**IDS, **more})
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch_of(2))
    random = np.random.default_rng(0)
    return task, jax.tree.map(lambda x: jnp.float32(0.3 * random.normal(size=x.shape)), shapes)


@functools.cache
def compiled(task):
    def loss(params, batch):
        total, _ = loss_of(task, {"params": params}, batch, jax.random.key(0))
        return total.total / total.weight, total

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def value_and_grad(task, variables, batch):
    (_, total), grads = compiled(task)(variables["params"], batch)
    return total, grads


def same(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), a, b)


@functools.cache
def logits_of(model):
    return jax.jit(model.apply)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_torchs_mean_over_real_targets(smoothing):
    torch = pytest.importorskip("torch")
    task, variables = ready(label_smoothing=smoothing)
    batch = batch_of(4, masked=1)
    (total, weight), _ = value_and_grad(task, variables, batch)
    logits = logits_of(task.model)(variables, batch["source"], batch["target_in"], batch["source_segments"])
    targets = np.where(np.asarray(batch["mask"])[:, None] > 0, batch["target_out"], PADDING)
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(np.asarray(logits)).flatten(0, 1),
        torch.tensor(targets).flatten().long(),
        ignore_index=PADDING,
        label_smoothing=smoothing,
    )
    assert weight == (targets != PADDING).sum()
    np.testing.assert_allclose(total / weight, float(theirs), rtol=1e-5)
    assert all(hasattr(task, name) for name in [*Task.__annotations__, *vars(Task)] if not name.startswith("_"))


def test_the_loss_in_chunks_is_the_loss():
    plain, variables = ready(label_smoothing=0.1)
    chunked, _ = ready(label_smoothing=0.1, logit_chunks=3)
    batch = batch_of(3, masked=1)
    same(value_and_grad(chunked, variables, batch), value_and_grad(plain, variables, batch))
    outputs = [jax.jit(task.predict)(variables, batch) for task in (plain, chunked)]
    same(*outputs)


def test_padded_examples_and_positions_change_nothing():
    task, variables = ready()
    batch = batch_of(4, masked=2)
    noise = jax.random.randint(jax.random.key(3), (4, 7), 0, 8)
    noisy = {**batch, "source": jnp.where(batch["source_segments"] > 0, batch["source"], noise)}
    noisy["target_in"] = jnp.where(batch["target_out"] == PADDING, noise[:, :T], batch["target_in"])
    noisy["target_out"] = batch["target_out"].at[2:].set(7)
    expected = value_and_grad(task, variables, batch)
    same(value_and_grad(task, variables, {name: x[:2] for name, x in batch.items()}), expected)
    same(value_and_grad(task, variables, noisy), expected)
    evaluate = jax.jit(task.evaluate)
    (found, *sums), (other, *others) = evaluate(variables, batch), evaluate(variables, noisy)
    np.testing.assert_array_equal(found["tokens"], other["tokens"])
    sums += others
    same(*sums)
    assert float(sums[0]["loss"].weight) == (np.asarray(batch["target_out"])[:2] != PADDING).sum()


def test_microbatches_add_up():
    task, variables = ready(label_smoothing=0.1)
    batch = batch_of(4, masked=1)
    loss = jax.jit(functools.partial(loss_of, task))
    whole, _ = loss(variables, batch, jax.random.key(0))
    parts = [loss(variables, {k: x[i : i + 2] for k, x in batch.items()}, jax.random.key(0))[0] for i in (0, 2)]
    same(add(*parts), whole)


def test_what_is_written_is_the_most_probable_token_again_and_again():
    task = Translation(EncoderDecoder(**TINY, tied=False), max_length=8, **IDS)
    batch = batch_of(3)
    variables = jax.jit(task.init)(jax.random.key(2), batch)
    written = np.asarray(jax.jit(task.predict)(variables, batch)["tokens"])
    assert written.shape == (3, 1, 8)
    apply = logits_of(task.model)
    target = np.full((3, 8), PAD)
    target[:, 0] = START
    for t in range(8):
        logits = np.array(apply(variables, batch["source"], jnp.asarray(target), batch["source_segments"]))
        logits[..., [START, PAD]] = -np.inf
        best = logits[:, t].argmax(-1)
        for b in range(3):
            ended = END in written[b, 0, :t]
            assert written[b, 0, t] == (END if ended else best[b])
        if t < 7:
            target[:, t + 1] = best
    assert len({tuple(row) for row in written[:, 0]}) == 3  # the sources do matter
    assert (written == END).any() and not np.isin(written, [START, PAD]).any()


@pytest.mark.slow
def test_what_is_written_by_stacks_beams_and_many_devices():
    """A stack of blocks writes what its blocks do; a beam search finds what is as probable at least."""
    task, variables = ready()
    batch = batch_of(8)
    greedy = jax.jit(task.translate)(variables, batch)
    stacked, _ = ready(EncoderDecoder(**TINY, scan=True))
    from bigbase_jax.models.transformer import stack_blocks

    stack = {"params": stack_blocks(variables["params"])}
    np.testing.assert_array_equal(jax.jit(stacked.translate)(stack, batch), greedy)
    mesh = parallel.make_mesh(4, parallel.MeshShape(data=2, fsdp=2))
    spread, _ = parallel.eval_step(task, mesh)(variables, parallel.put(batch, mesh))
    np.testing.assert_array_equal(spread["tokens"][:, 0], greedy)

    def probability(tokens):
        target_in = jnp.concatenate([jnp.full((8, 1), START), tokens[:, :-1]], 1)
        first = jnp.cumsum(jnp.cumsum(tokens == END, axis=1), axis=1) <= 1
        given = {**batch, "target_in": target_in, "target_out": jnp.where(first, tokens, PADDING)}
        return np.asarray(task.predict(variables, given)["log_probability"].sum(1))

    beams, _ = ready(beams=V, length_penalty=0.0)
    found = jax.jit(beams.translate)(variables, batch)
    assert found.shape == greedy.shape
    assert (probability(found) >= probability(greedy) - 1e-5).mean() > 0.7
    assert probability(found).mean() > probability(greedy).mean()


LETTERS = Symbols("abcdefgh", fallback=False, end=True, special=("start", "pad"))


def examples_of(texts, references, letters="abcdefgh"):
    """What an evaluation keeps of these."""
    rows = np.full((len(texts), 1, 8), END)
    bytes_NR = np.zeros((len(texts), 30), np.uint8)
    for n, (text, reference) in enumerate(zip(texts, references, strict=True)):
        rows[n, 0, : len(text)] = [letters.index(c) for c in text]
        bytes_NR[n, : len(reference.encode())] = np.frombuffer(reference.encode(), np.uint8)
    target = np.array([[1, 2, END, PADDING], [3, END, PADDING, PADDING]])[: len(texts)]
    logp = np.where(target == PADDING, 0, np.log(0.5))
    return {"tokens": rows, "reference": bytes_NR, "target": target, "log_probability": logp}


def test_bleu_and_chrf_compare_text():
    task, _ = ready(tokenizer=LETTERS.state(), target_language="zh")
    perfect = measured(task, examples_of(["abcdef", "hgfedc"], ["abcdef", "hgfedc"]))
    assert perfect["perplexity"] == pytest.approx(2)
    assert perfect["chrf"] == pytest.approx(100)
    assert "|tok:13a|" in perfect["bleu_signature"]
    half = measured(task, examples_of(["abcdef", "hgfedc"], ["abcdef", "aaaaaa"]))
    assert 0 < half["chrf"] < 90
    letters = "好电影很长不坏人"
    words = ready(
        tokenizer=Symbols(letters, fallback=False, end=True, special=("start", "pad")).state(), target_language="fr"
    )[0]
    found = measured(words, examples_of([letters[:6]], [letters[:5] + letters[6]], letters))
    assert found["bleu"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)  # precisions of characters
    assert "|tok:zh|" in found["bleu_signature"]
    numbers, _ = ready()
    assert measured(numbers, examples_of(["abcdef"], ["abcdef"])) == {"perplexity": pytest.approx(2)}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["Two dogs, one cat.", "Zwei große Hunde"], "13a"),
        (["Он читает книгу.", "Αυτό είναι"], "13a"),
        (["一部好电影。", "We 看 PyTorch 电影，2024 年的"], "zh"),
        (["A film called 好 in English", "and so on"], "13a"),
        (["これは良い映画です。", "東京都知事"], "ja-mecab"),
        (["이 영화는 정말 좋다.", "好 영화"], "ko-mecab"),
        (["หนังดีมาก"], "char"),
        (["", "..."], "13a"),
    ],
)
def test_words_follow_the_script_of_the_references(monkeypatch, texts, words):
    installed = []
    monkeypatch.setattr(bleu.importlib.util, "find_spec", lambda name: name in installed or None)
    assert bleu.bleu_words(texts) == ("char" if "mecab" in words else words)
    installed += ["MeCab", "mecab_ko"]
    assert bleu.bleu_words(texts) == words


def test_what_a_user_reads():
    task, _ = ready(tokenizer=LETTERS.state())
    kept = examples_of(["abc", "hg"], ["abc", "hh"])
    one = {name: x[0] for name, x in kept.items()}
    assert task.postprocess(one, {}) == {"translation": "abc"}
    joined = {name: np.concatenate([x[0], x[1]]) for name, x in kept.items()}  # two lines of one file
    assert task.postprocess(joined, {}) == {"translation": "abc\nhg"}
    title, pieces = next(task.figures(Evaluated("test", {}, kept))).texts[1]
    assert title == "0.693 nats per token; written: hg" and [p for p, _ in pieces] == ["d", "<|endoftext|>"]
    silent, _ = ready(tokenizer=LETTERS.state(), generate=False)
    assert "tokens" not in jax.eval_shape(silent.predict, ready()[1], batch_of(2))
    with pytest.raises(UserError, match="generate is false"):
        silent.postprocess({"target": kept["target"][0]}, {})


@pytest.mark.slow
def test_it_learns_to_read_backwards():
    rng = np.random.default_rng(0)
    word = rng.integers(0, 8, (512, 5)).astype(np.int32)
    batch = batch_of(512)
    batch |= {
        "source": jnp.asarray(np.pad(word, ((0, 0), (0, 2)), constant_values=PAD)),
        "source_segments": jnp.asarray(np.tile([1] * 5 + [0] * 2, (512, 1)), jnp.int32),
        "target_in": jnp.asarray(np.concatenate([np.full((512, 1), START), word[:, ::-1]], 1), jnp.int32),
        "target_out": jnp.asarray(np.concatenate([word[:, ::-1], np.full((512, 1), END)], 1), jnp.int32),
    }
    task = Translation(EncoderDecoder(**{**TINY, "width": 32, "depth": 2}), **IDS)
    variables = jax.jit(task.init)(jax.random.key(0), batch)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        key = jax.random.key(0)
        loss, grads = jax.value_and_grad(lambda p: loss_of(task, {"params": p}, batch, key)[0].mean())(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    params, state = variables["params"], tx.init(variables["params"])
    losses = []
    for _ in range(150):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(math.log(V), rel=0.3) and losses[-1] < 0.05
    written = jax.jit(task.translate)({"params": params}, batch)
    assert (np.asarray(written)[:, :5] == word[:, ::-1]).all(1).mean() > 0.95


@pytest.mark.slow
def test_where_a_step_is_computed_changes_nothing():
    def train(model, devices=1, mesh=None, **how):
        task = Translation(model, label_smoothing=0.1, **IDS)
        spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch_of(8).items()}
        program = parallel.program(task, optax.sgd(0.3), spec, made := parallel.make_mesh(devices, mesh), seed=1, **how)
        state = program.init(parallel.put(batch_of(8), made))
        start = jax.device_get(state.params)
        for seed in range(2):
            state, sums = program.step(state, parallel.put(batch_of(8, seed, masked=3), made))
        after = jax.device_get(state.params)
        assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (start, after)), strict=True)) > 1e-2
        return float(sums["loss"].mean()), after

    plain = EncoderDecoder(**TINY)
    expected = train(plain)
    pieces = {"microbatches": 2, "sharding": ("fsdp:16", "tensor")}
    same(train(plain, 4, parallel.MeshShape(fsdp=2, tensor=2), **pieces), expected)
    same(train(plain, 4, mode="shard_map"), expected)
    stack = EncoderDecoder(**{**TINY, "depth": 2}, scan=True, pipeline_microbatches=2)
    same(train(stack, 4, parallel.MeshShape(pipeline=2)), train(stack))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ready(label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: ready(beams=0), "beams is 0"),
        (lambda: ready(logit_chunks=4), "logit_chunks 4 does not divide a length of 6"),
        (lambda: ready(shared=False), "two tokenizers; leave target_tokenizer open"),
        (lambda: ready(tokenizer=Symbols().state()), "vocab_size is 11, but the tokenizer has 256"),
        (lambda: ready(EncoderDecoder(**{**TINY, "length": 5, "positions": "learned"})), "longer than the model's 5"),
    ],
)
def test_mistakes_are_one_sentence(make, says):
    with pytest.raises(UserError, match=says):
        make()


@pytest.mark.parametrize(
    ("n", "name"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (105, "one hundred and five"),
        (1000, "one thousand"),
        (20_017, "twenty thousand and seventeen"),
        (300_300, "three hundred thousand three hundred"),
        (1_000_001, "one million and one"),
        (999_999, "nine hundred and ninety-nine thousand nine hundred and ninety-nine"),
    ],
)
def test_numbers_have_names(n, name):
    assert in_words(n) == name


def test_made_up_pairs(tmp_path):
    data = Numerals(largest=9999, count=200).prepare(tmp_path, 0, print)
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 180, "val": 10, "test": 10}
    from bigbase_jax.data.sources.text.parallel_text import reference_of
    from bigbase_jax.text.tokenizer import load

    tokenizer, numbers = load(data.dataset_info["tokenizer"]), []
    for source in data.splits.values():
        for i in range(len(source)):
            example = source[i]
            numbers.append(int(tokenizer.decode(example["source"][example["source_segments"] > 0])))
            assert reference_of(example["reference"]) == in_words(numbers[-1])
            assert tokenizer.decode(example["target_out"][example["target_out"] >= 0]) == in_words(numbers[-1])
    assert len(set(numbers)) == 200 and min(numbers) < 10 and max(numbers) > 1000
    again = Numerals(largest=9999, count=200).prepare(tmp_path, 0, print)
    assert again.fingerprint() == data.fingerprint()
    assert Numerals(largest=9999, count=200, seed=1).prepare(tmp_path, 0, print).fingerprint() != data.fingerprint()
    few = Numerals(largest=9999, count=200, target_length=12).prepare(tmp_path, 0, print)
    assert 0 < len(few.splits["train"]) < 180 and few.splits["train"][0]["target_out"].shape == (12,)
    path = tmp_path / "numbers.txt"
    path.write_text("12\n\n7\n")
    examples = Numerals.codec({}, data.dataset_info).decode(str(path))
    assert [e["source_segments"].sum() for e in examples] == [3, 2]
    few = Numerals(largest=9999, count=200, target_length=28).prepare(tmp_path, 0, print)
    assert (
        len(few.splits["val"]) < 10
        and few.splits["val"][0]["reference"].shape == data.splits["val"][0]["reference"].shape
    )
