"""Imported models continue prompts as transformers' own do: greedily, with a repetition penalty, by beam search."""

import io
import json

import jax
import numpy as np
import pytest
from marks import some_slow

from bigbase_jax import verbs
from bigbase_jax.decoding.beams import beam_tokens
from bigbase_jax.decoding.sampling import SamplingParams
from bigbase_jax.inference.generation import Engine
from bigbase_jax.pretrained import load
from bigbase_jax.pretrained.tokenizers import published
from bigbase_jax.text.tokenizer import Symbols

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
CASES = {
    "GPT2LMHeadModel": {"vocab_size": 61, "n_positions": 64, "n_embd": 12, "n_layer": 2, "n_head": 3},
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": {**LLAMA, "sliding_window": 5},
    "Qwen2ForCausalLM": {
        **LLAMA,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "Qwen3ForCausalLM": {**LLAMA, "head_dim": 8},
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [18, 28, 18]]


@pytest.fixture(scope="module", params=CASES)
def pair(request, hf, random_model, tmp_path_factory):
    """(theirs, our model, its variables, a token at which some texts end)."""
    theirs = random_model(request.param, **CASES[request.param], eos_token_id=None, bos_token_id=0, pad_token_id=0)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    free = greedily(hf.torch, theirs, PROMPTS[2])
    return theirs, *load(folder), free[5]


def greedily(torch, model, prompt, **words):
    """How they continue."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, **words)
    return found[0, len(prompt) :].tolist()


def padded(torch):
    """Their batch: tokens and the mask of what is real."""
    L = max(map(len, PROMPTS))
    tokens = [[0] * (L - len(p)) + p for p in PROMPTS]
    mask = [[0] * (L - len(p)) + [1] * len(p) for p in PROMPTS]
    return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("penalty", some_slow([1.0, 1.6], 1.0))
def test_greedy(hf, pair, penalty):
    theirs, model, variables, end = pair
    words = {"do_sample": False, "repetition_penalty": penalty, "eos_token_id": end}
    wanted = [greedily(hf.torch, theirs, p, **words) for p in PROMPTS]
    wanted = [row[: row.index(end)] if end in row else row for row in wanted]
    params = SamplingParams(max_new_tokens=20, repetition_penalty=penalty)
    found = Engine(model, variables, end).generate([np.array(p, np.int32) for p in PROMPTS], params)
    assert [row.tolist() for row in found] == wanted
    assert len({t for row in wanted for t in row}) > 2


@pytest.mark.parametrize("form", some_slow([(1.0, False), (0.0, True), (-1.0, "never")], (0.0, True)), ids=str)
def test_beams(hf, pair, form):
    length_penalty, early_stopping = form
    theirs, model, variables, end = pair
    words = {"max_new_tokens": 9, "length_penalty": length_penalty, "early_stopping": early_stopping}
    with hf.torch.no_grad():
        wanted = theirs.generate(
            **padded(hf.torch),
            eos_token_id=end,
            num_beams=4,
            num_return_sequences=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **words,
        )
    L = max(map(len, PROMPTS))
    tokens = np.array([p + [0] * (L - len(p)) for p in PROMPTS], np.int32)
    lengths = np.array([len(p) for p in PROMPTS], np.int32)
    compiled = jax.jit(lambda v, t, n: beam_tokens(model, v, t, n, beams=4, end=end, **words))
    found, scores = compiled(variables, tokens, lengths)
    np.testing.assert_allclose(np.asarray(scores).reshape(-1), wanted.sequences_scores.numpy(), rtol=1e-4, atol=1e-5)
    rows = wanted.sequences[:, L:].tolist()
    for ours, row in zip(np.asarray(found).reshape(12, 9).tolist(), rows, strict=True):
        row = row[: row.index(end)] if end in row else row  # what follows is padding
        assert ours[: len(row)] == row and set(ours[len(row) :]) <= {end}
    assert length_penalty > 0 or any(end in row for row in rows)


def test_the_verb_takes_a_published_folder(hf, random_model, tmp_path):
    theirs = random_model("LlamaForCausalLM", **{**LLAMA, "vocab_size": 257}, eos_token_id=256, bos_token_id=None)
    theirs.save_pretrained(tmp_path)
    for name, content in published(Symbols(end=True)).items():
        (tmp_path / name).write_bytes(content)
    out = io.StringIO()
    assert verbs.generate(str(tmp_path), ["Once upon"], sample="max_new_tokens=12", out=out) == 0
    line = json.loads(out.getvalue())
    tokens = hf.torch.tensor([list(b"Once upon")])
    with hf.torch.no_grad():
        wanted = theirs.generate(tokens, attention_mask=hf.torch.ones_like(tokens), max_new_tokens=12, do_sample=False)
    new = wanted[0, 9:].tolist()
    new = new[: new.index(256)] if 256 in new else new
    assert line["prompt"] == "Once upon" and line["tokens"] == len(new) > 2
    assert line["text"] == bytes(new).decode(errors="replace")
