"""OpenAI's API, asked by OpenAI's own client over a socket: what is written is what generate writes."""

import base64
import dataclasses
import functools
import io
import json
import time
import urllib.request

import jax
import numpy as np
import openai
import pytest
import toy
from PIL import Image
from toys import styled
from waiting import until

from bigbase_jax.core import UserError
from bigbase_jax.data.files import Limits
from bigbase_jax.data.sources.image.captions import AskedPictureCodec
from bigbase_jax.data.sources.text.labelled_text import LabelledText
from bigbase_jax.decoding.sampling import SamplingParams
from bigbase_jax.inference import slots as module
from bigbase_jax.inference.embedding import Embedding
from bigbase_jax.inference.generation import Engine
from bigbase_jax.inference.predictor import Predictor, Reading
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.picture_reader import PictureReader
from bigbase_jax.models.vit import ViT
from bigbase_jax.parallel import FROZEN
from bigbase_jax.serve.app import Settings, create
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served
from bigbase_jax.tasks.captioning import Captioning
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.tasks.textual import headless
from bigbase_jax.text import chat_template
from bigbase_jax.text.chat_template import ChatTemplate
from bigbase_jax.text.tokenizer import Bytes, dataset_info_of
from bigbase_jax.wrappers.lora import LoRA

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def png(picture):
    """A data URL, and the file in it."""
    made = io.BytesIO()
    Image.fromarray(picture).save(made, "PNG")
    return "data:image/png;base64," + base64.b64encode(made.getvalue()).decode(), made.getvalue()


HUGE, _ = png(np.zeros((40, 40), np.uint8))


def seen(*urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": parts}]


def drawn(model, *inputs, scale=0.4):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    random = np.random.default_rng(0)

    def draw(path, x):
        return np.float32((path[-1].key == "scale") + scale * random.normal(size=x.shape))

    return {"params": jax.tree.map_with_path(draw, shapes)}


def tokenizer():
    return Bytes().fit(lambda: iter(()), lambda: iter(()), end=True, special=("turn", "stop", "pad", "cls", "sep"))


def no_inputs():
    raise UserError("it answers no inputs.")


@functools.cache
def writer():
    """A tiny decoder of bytes."""
    tokens = tokenizer()
    size = {"vocab_size": tokens.size, "length": 512, "width": 16, "depth": 2, "heads": 4}
    model = styled(Decoder, **size, positions="rope", tied=False)
    known = {**dataset_info_of(tokens), "chat_template": ChatTemplate().state(), "end_ids": (7, tokens.end)}
    variables = drawn(model, np.zeros((1, 4), np.int32))
    return Predictor(CausalLanguageModel(model), variables, known, {}, no_inputs)


@functools.cache
def tuned():
    """The same with an adapter."""
    task, random = LoRA(writer().task, rank=2), np.random.default_rng(1)
    batch = dict.fromkeys(("inputs", "segment_ids", "positions"), np.zeros((1, 8), np.int32))
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch)["params"]
    params = jax.tree.map(lambda x: np.float32(0.4 * random.normal(size=x.shape)), shapes)
    variables = {"params": params, FROZEN: writer().variables["params"]}
    return dataclasses.replace(writer(), task=task, variables=variables)


def embedding():
    """A tiny encoder of bytes."""
    tokens = tokenizer()
    known = {**dataset_info_of(tokens), "length": 32, "pair": False}
    model = Bert(vocab_size=tokens.size, length=32, width=16, depth=1, heads=2)
    task = Embedding(headless(model), ("mean_tokens",), normalize=True)
    spec = dict.fromkeys(task.inputs, jax.ShapeDtypeStruct((32,), np.int32))
    batch = {name: np.zeros((1, *x.shape), x.dtype) for name, x in spec.items()}
    variables = drawn(task.model, *batch.values())
    return Predictor(task, variables, known, spec, lambda: Reading(LabelledText.codec({}, known)))


@functools.cache
def reader():
    """A tiny reader of pictures."""
    tokens = tokenizer()
    words = styled(Decoder, vocab_size=tokens.size, length=40, width=16, depth=1, heads=2, positions="rope")
    model = PictureReader(ViT(width=8, depth=1, heads=2, patch=4, pool="gap"), words)
    task = Captioning(model, tokens.state(), 16, end_id=tokens.end, max_length=6)
    known = {**dataset_info_of(tokens), "length": 16}
    spec = {"image": jax.ShapeDtypeStruct((8, 8, 3), np.uint8), "prompt": jax.ShapeDtypeStruct((16,), np.int32)}
    variables = drawn(model, np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 4), np.int32))
    table = variables["params"]["decoder"]["embedding"]
    table[:33], table[127:] = 0, 0  # characters that can be seen are likelier
    codec = AskedPictureCodec(Limits(pixels=1000), tokenizer=tokens.state(), length=16)
    return Predictor(task, variables, known, spec, lambda: Reading(codec))


@pytest.fixture(scope="module")
def served():
    metrics, options = Metrics(), Options(max_batch=2, slots=2, places=128, max_queue=4)
    narrow = dataclasses.replace(options, places=16)
    beside = {"writer": {"poet": tuned()}}
    openers = {
        name: lambda name=name, model=model, options=narrow if name == "reader" else options: Served(
            name, model, options, metrics=metrics, adapters=beside.get(name)
        )
        for name, model in {
            "writer": writer(),
            "vectors": embedding(),
            "toy": toy.predictor(),
            "reader": reader(),
        }.items()
    }
    models = Models(openers)
    models.load()
    yield models, create(models, Settings(timeout_s=300), metrics)
    models.close(5)


@pytest.fixture(scope="module")
def client(served):
    with (
        toy.live(served[1]) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300) as found,
    ):
        yield found


@functools.cache
def engine():
    return Engine.of(writer())


def alone(prompt, **words):
    """What ``--mode=generate`` writes."""
    return engine().complete([prompt], SamplingParams(**words))[0]


def slots(served):
    return served[0]._current["writer"].slots


REASON = {"end": "stop", "stop": "stop", "length": "length"}


def test_completions_are_what_generate_writes(client):
    prompts = ["once upon", "the end of the"]
    found = client.completions.create(model="writer", prompt=prompts, temperature=0, max_tokens=24)
    wanted = [alone(prompt, max_new_tokens=24) for prompt in prompts]
    assert [c.text for c in found.choices] == [c.text for c in wanted] and len({c.text for c in wanted}) == 2
    assert [c.finish_reason for c in found.choices] == [REASON[c.finish_reason] for c in wanted]
    assert found.usage.prompt_tokens == sum(map(len, prompts))
    assert found.usage.completion_tokens == sum(len(c.tokens) for c in wanted)
    tokens = client.completions.create(model="writer", prompt=list(b"once upon"), temperature=0)
    assert tokens.choices[0].text == alone("once upon", max_new_tokens=16).text


def test_an_adapter_is_asked_by_its_name(client):
    words = {"prompt": "once upon", "temperature": 0, "max_tokens": 12}
    base, poet = (client.completions.create(model=name, **words) for name in ("writer", "poet"))
    assert poet.choices[0].text == Engine.of(tuned()).complete(["once upon"], SamplingParams(12))[0].text
    assert poet.choices[0].text != base.choices[0].text and poet.model == "poet"


def test_n_texts_are_drawn_from_a_seed(client):
    asked = {"model": "writer", "prompt": "a", "max_tokens": 8, "seed": 5, "top_p": 0.9, "temperature": 0.8}
    found = client.completions.create(**asked, n=3, extra_body={"top_k": 50})
    words = {"max_new_tokens": 8, "temperature": 0.8, "top_p": 0.9, "top_k": 50}
    assert [c.text for c in found.choices] == [alone("a", seed=5 + i, **words).text for i in range(3)]
    assert len({c.text for c in found.choices}) == 3
    assert (
        client.completions.create(**asked).choices[0].text
        != client.completions.create(**{**asked, "seed": 6}).choices[0].text
    )


def test_chat_streams_what_it_writes_at_once(client):
    prompt = chat_template.prompt_tokens(ChatTemplate(), engine().tokenizer, MESSAGES)
    wanted = alone(prompt, max_new_tokens=30)
    asked = {"model": "writer", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 30}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == wanted.text and whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == wanted.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == REASON[wanted.finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage and len(chunks) > 5
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    assert client.chat.completions.create(**{**asked, "messages": parts}).choices[0].message.content == wanted.text


def test_a_chat_about_a_picture_is_what_predict_says_of_it(client):
    said = []
    for seed in range(2):
        url, file = png(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))
        parts = [{"type": "text", "text": "ab"}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [*MESSAGES, {"role": "user", "content": parts}]
        asked = {"model": "reader", "messages": messages, "temperature": 0, "max_tokens": 6}
        found = client.chat.completions.create(**asked)
        said.append(found.choices[0].message.content)
        assert said[-1].strip() == reader().answer({"image": file, "prompt": "ab"})[0]["caption"]
        assert found.usage.prompt_tokens == 3 + 4
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said[-1] and len(chunks) > 2
    assert said[0] != said[1]


def test_stop_texts(client):
    plain = alone("once upon", max_new_tokens=40).text
    stop = next(plain[i : i + 2] for i in range(4, 30) if plain.find(plain[i : i + 2]) == i)
    found = client.completions.create(
        model="writer", prompt="once upon", temperature=0, max_tokens=40, stop=[stop, "~"]
    )
    assert found.choices[0].text == plain[: plain.index(stop)] != plain and found.choices[0].finish_reason == "stop"


def test_logprobs_in_both_forms(client):
    asked = {"model": "writer", "temperature": 0, "max_tokens": 6}
    found = client.completions.create(**asked, prompt="once", logprobs=2).choices[0].logprobs
    wanted = alone("once", max_new_tokens=6).tokens
    sequence = np.concatenate([engine().encode("once"), wanted])[None].astype(np.int32)
    logits = jax.jit(engine().model.apply)(engine().variables, sequence)[0, 3:-1]
    logp = np.asarray(jax.nn.log_softmax(logits))[range(len(wanted)), wanted]
    np.testing.assert_allclose(found.token_logprobs, logp, atol=1e-4)
    assert len(found.tokens) == len(found.text_offset) == len(wanted) and len(set(found.token_logprobs)) > 1
    chat = client.chat.completions.create(**asked, messages=MESSAGES, logprobs=True, top_logprobs=3)
    content = chat.choices[0].logprobs.content
    assert (
        bytes(b for token in content for b in token.bytes)
        .decode("utf-8", "replace")
        .startswith(chat.choices[0].message.content[:1])
    )
    assert all(len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob == t.logprob for t in content)
    stream = client.chat.completions.create(**asked, messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True)
    parts = [t for c in stream if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.logprob for t in parts] == pytest.approx([t.logprob for t in content], abs=1e-5)


def test_embeddings_in_both_forms(client):
    texts = ["a text", "another text, which is cut because it is long"]
    found = client.embeddings.create(model="vectors", input=texts, encoding_format="float")
    wanted = [a["vector"] for text in texts for a in embedding().answer({"text": text})]
    np.testing.assert_allclose([x.embedding for x in found.data], wanted, atol=1e-6)
    assert np.abs(np.subtract(*wanted)).max() > 0.01 and found.usage.prompt_tokens > 32
    packed = client.post(
        "/embeddings", body={"model": "vectors", "input": texts[0], "encoding_format": "base64"}, cast_to=dict
    )
    vector = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, wanted[0], atol=1e-6)
    np.testing.assert_allclose(client.embeddings.create(model="vectors", input=texts[0]).data[0].embedding, vector)


def test_cards_and_metrics_say_what_models_do(client):
    with urllib.request.urlopen(f"http://127.0.0.1:{client.base_url.port}/metrics") as response:
        assert b'bigbase_slots{model="writer",what="slots"} 2.0' in response.read()
    does = {card.id: card.model_extra["does"] for card in client.models.list()}
    assert does == {
        "writer": ["complete", "chat"],
        "poet": ["complete", "chat"],
        "vectors": ["predict", "embed"],
        "toy": ["predict"],
        "reader": ["predict", "complete", "chat", "see"],
    }


@pytest.mark.parametrize(
    ("call", "words", "error", "says"),
    [
        ("completions", {"model": "writr", "prompt": "a"}, openai.NotFoundError, "Did you mean 'writer'"),
        ("completions", {"model": "toy", "prompt": "a"}, openai.NotFoundError, "writes no text"),
        (
            "completions",
            {"prompt": "a", "max_tokens": 500},
            openai.BadRequestError,
            "the 128 places of a sequence here",
        ),
        ("completions", {"prompt": [999_999]}, openai.BadRequestError, "none of the model's"),
        ("completions", {"prompt": [-1]}, openai.BadRequestError, "tokens are none"),
        ("completions", {"prompt": []}, openai.BadRequestError, "from 1 to 64 texts"),
        (
            "completions",
            {"prompt": "a", "n": 0},
            openai.BadRequestError,
            "n: Input should be greater than or equal to 1",
        ),
        ("completions", {"prompt": "a", "temperature": "hot"}, openai.BadRequestError, "temperature: "),
        ("completions", {"prompt": "a", "logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias is not supported"),
        ("completions", {"prompt": "a", "stop": ["x"] * 17}, openai.BadRequestError, "at most 16 texts"),
        ("completions", {"prompt": "a", "stop": ""}, openai.BadRequestError, "stop"),
        ("chat.completions", {"messages": [{"role": "tool", "content": "a"}]}, openai.BadRequestError, "messages.0"),
        ("chat.completions", {"messages": MESSAGES, "tools": [{}]}, openai.BadRequestError, "tools is not supported"),
        ("chat.completions", {"messages": seen(HUGE)}, openai.BadRequestError, "reads texts, and no pictures"),
        ("chat.completions", {"model": "reader", "messages": seen(HUGE)}, openai.BadRequestError, "pixels"),
        ("chat.completions", {"model": "reader", "messages": MESSAGES}, openai.BadRequestError, "has none"),
        *(
            ("chat.completions", {"messages": seen(url)}, openai.BadRequestError, "messages.0 has a picture that is no")
            for url in ("http://127.0.0.1/a.png", "data:image/png;base64,a", "data:image/png;base64,\u00e9", "data:,a")
        ),
        ("chat.completions", {"messages": seen(HUGE, HUGE)}, openai.BadRequestError, "one is read at a time"),
        ("embeddings", {"model": "writer", "input": "a"}, openai.NotFoundError, "gives no vectors"),
        ("embeddings", {"model": "vectors", "input": []}, openai.BadRequestError, "0 texts"),
    ],
)
def test_a_mistake_is_one_sentence_in_openais_form(client, call, words, error, says):
    create = functools.reduce(getattr, call.split("."), client).create
    with pytest.raises(error) as found:
        create(**{"model": "writer", **words})
    assert says in found.value.body["message"] and found.value.body["type"] == "invalid_request_error"


def slow(monkeypatch, seconds=0.02):
    real = module.read

    def read(*args):
        time.sleep(seconds)
        return real(*args)

    monkeypatch.setattr(module, "read", read)


def test_who_leaves_in_the_middle_frees_the_slot(client, served, monkeypatch):
    slow(monkeypatch)
    before = slots(served).stats()["cancelled"]
    asked = {"model": "writer", "messages": MESSAGES, "max_tokens": 80, "seed": 3, "extra_body": {"top_k": 1000}}
    for _ in range(2):
        stream = client.chat.completions.create(**asked, stream=True)
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(**asked)
    until(lambda: slots(served).stats()["used"] == 0)
    assert slots(served).stats()["cancelled"] >= before + 2
    assert served[0]._current["writer"]._users == 0


def test_too_many_are_told_to_come_back(client, served, monkeypatch):
    slow(monkeypatch, 0.05)
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model="writer", prompt="a", n=12, max_tokens=60)
    assert error.value.response.headers["retry-after"] == "1"
    until(lambda: slots(served).stats()["used"] == 0)


def test_a_failure_ends_the_stream_with_an_error(client, served, monkeypatch):
    def fails(*args):
        raise RuntimeError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(module, "read", fails)
        with pytest.raises(openai.InternalServerError, match="the model has failed"):
            client.completions.create(model="writer", prompt="a")
        with pytest.raises(openai.APIError, match="the model has failed") as error:
            list(client.completions.create(model="writer", prompt="a", stream=True))
        assert "secret" not in json.dumps(error.value.body)
    assert client.completions.create(model="writer", prompt="a", temperature=0, max_tokens=4).choices[0].text
