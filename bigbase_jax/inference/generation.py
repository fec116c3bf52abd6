"""Generation: a language model continues prompts, token by token, with a cache.

``Engine.generate`` and ``stream`` take and give tokens; ``complete`` and ``write`` take and give text. Prompts of
several lengths make one batch, padded on the right. One compiled program reads prompts (prefill) and another writes any
number of tokens (decode); the sizes of batches, prompts and caches are rounded up to a few, so that few programs are
compiled.

Axes: B sequences, L length of the prompts, l a part of it, S places of the cache, T new tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import freeze

from bigbase_jax.build import parse_arg
from bigbase_jax.core import PyTree, UserError, Variables
from bigbase_jax.decoding import beams, sampling
from bigbase_jax.decoding.sampling import SamplingArrays, SamplingParams
from bigbase_jax.inference.inputs import Input
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models.transformer import unstack_blocks
from bigbase_jax.pretrained.start import model_of, runnable
from bigbase_jax.text import chat_template
from bigbase_jax.text.detokenizer import IncrementalDetokenizer
from bigbase_jax.text.tokenizer import Tokenizer, encode, load

Params = SamplingParams | Sequence[SamplingParams]
"""For all prompts, or for each."""
GREEDY = SamplingParams()
ROWS = 16
"""Prompts that are continued at once."""
_CHUNK = 256  # tokens of each prompt that are read at once
_EVERY = 8  # tokens that are written between two looks at them
_MOST = 1 << 14  # tokens that are written where nobody says how many, whatever length a model claims


class Completion(NamedTuple):
    """How a prompt was continued.

    Attributes:
      tokens: i32[T], without the end token.
      text: theirs, up to a stop text.
      finish_reason: why it ends: "end" (the model's end token), "stop" (a stop text) or "length".
    """

    tokens: np.ndarray
    text: str
    finish_reason: str


class Engine:
    """A model that continues prompts. Programs are compiled once for each model and size.

    Args:
      model: see ``decoding.sampling``; blocks that are stacked are unstacked.
      variables: the model's own.
      end: the token, or tokens, that end a sequence.
      tokenizer: for text.

    Attributes:
      ends: the tokens that end a sequence.
      see: what a model that reads pictures makes of one, u8[1,H,W,3], as ``sampling.prefill`` takes it for its source;
        None: it reads none.

    Raises:
      UserError: the model has no cache to write with.
    """

    see: Callable[[np.ndarray], jax.Array] | None = None

    def __init__(
        self,
        model: Any,
        variables: Variables,
        end: int | Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        if not all(hasattr(model, name) for name in ("decode", "cache", "logits")):
            raise UserError(f"a {type(model).__name__} does not continue texts: it has no cache to write with.")
        params = variables["params"]
        tables = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
        frozen = {name: freeze(dict(x)) for name, x in tables.items() if isinstance(x, Mapping)}
        if frozen:  # such as rope_scaling; programs are kept by the model, which must have a hash
            model = model.clone(**frozen)
        if getattr(model, "scan", False):
            model = model.clone(scan=False)
            params = jax.jit(unstack_blocks)(params)
        if getattr(model, "dtype", None) == "bfloat16":  # what the model does with them at every use
            params = jax.jit(_halve)(params)
        self.model, self.variables, self.tokenizer = model, {**variables, "params": params}, tokenizer
        self.ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)

    @classmethod
    def of(cls, predictor: Predictor) -> Engine:
        """That of a run or of a published folder.

        Raises:
          UserError: its model writes no text.
        """
        (task, model), known = model_of(predictor.task), predictor.dataset_info
        if "tokenizer" not in known or not hasattr(model, "decode") or hasattr(task, "translate"):
            raise UserError(f"a {type(task).__name__} writes no text; --mode=predict shows what it does.")
        tokenizer = load(known["tokenizer"])
        ends = known.get("end_ids", {tokenizer.end, known.get("stop_id"), getattr(task, "end", None)} - {None})
        model, variables = runnable(predictor.task, predictor.variables)
        see = None
        if hasattr(model, "see"):
            see = functools.partial(jax.jit(task.see), variables)
            image = predictor.spec["image"]
            seen = jax.eval_shape(see, jax.ShapeDtypeStruct((1, *image.shape), image.dtype))
            model = model.clone(places=seen.shape[1])
        engine = cls(model, variables, sorted(ends), tokenizer)
        engine.see = see
        return engine

    def generate(self, prompts: Sequence[np.ndarray], params: Params = GREEDY) -> list[np.ndarray]:
        """The tokens i32[T] that follow each prompt, without the end token; many prompts make batches of like length.

        Args:
          prompts: tokens i32[L] each, at least one.
          params: ``stop`` needs text (see ``complete``).

        Raises:
          UserError: a prompt is empty, or does not fit with what is to follow.
        """
        params = _for_each(params, prompts)
        found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
        for some in _alike(prompts, params):
            for new in self.stream([prompts[i] for i in some], [params[i] for i in some], every=2**30):
                for i, tokens_T in zip(some, new, strict=True):
                    found[i] = np.concatenate([found[i], tokens_T])
        return found

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        params: Params = GREEDY,
        every: int = _EVERY,
        stopped: np.ndarray | None = None,
    ) -> Iterator[list[np.ndarray]]:
        """``generate`` bit by bit: after at most ``every`` tokens, the new ones of each prompt; all are one batch.

        Args:
          stopped: bool[B], which the caller may set in between: sequences to be continued no further.
        """
        params = _for_each(params, prompts)
        limits = [self.room(len(prompt), p.max_new_tokens) for prompt, p in zip(prompts, params, strict=True)]
        refuse_unknown(prompts, self.model)
        if any(p.beams > 1 for p in params):
            yield self._beams(prompts, params, limits)
            return
        n, longest = len(prompts), max(map(len, prompts))
        B, L = _rounded(n, 1), _rounded(longest, 16)
        S = _rounded(L + max(limits), 32)
        tokens_BL, length_B = np.zeros((B, L), np.int32), np.ones(B, np.int32)
        for b, prompt in enumerate(prompts):
            length_B[b] = len(prompt)
            tokens_BL[b, : len(prompt)] = prompt
        limit_B = np.array(limits + [0] * (B - n), np.int32)
        arrays, ends_E = SamplingArrays.of(params, B), sampling.end_tokens(self.ends)

        cache, logits_BV = empty(self.model, B, S), None
        other = hasattr(self.model, "prefill")  # another engine, which reads prompts at once and is no program's part
        width = L if L <= _CHUNK or other else _CHUNK if L % _CHUNK == 0 else _CHUNK * 3 // 4
        for at in range(0, longest, width):
            last_B = length_B - 1 - at
            part_Bl, here_B = tokens_BL[:, at : at + width], (last_B >= 0) & (last_B < width)
            start_B, last_B = np.full(B, at, np.int32), np.clip(last_B, 0, width - 1)
            new_BV, cache = read(self.model, self.variables, cache, part_Bl, start_B, last_B)
            logits_BV = new_BV if logits_BV is None else jnp.where(here_B[:, None], new_BV, logits_BV)
        state = _init(logits_BV, None, tokens_BL, length_B, limit_B, S, arrays, ends_E)._replace(cache=cache)
        seen_B = np.zeros(n, np.int32)
        while True:
            tokens_BS, done_B, written_B = map(np.array, (state.tokens_BS, state.done_B, state.position_B - length_B))
            yield [self._new(tokens_BS[b, length_B[b] : length_B[b] + written_B[b]], seen_B[b]) for b in range(n)]
            seen_B = written_B
            if stopped is not None:
                done_B[:n] |= stopped
            if done_B.all():
                return
            state = state._replace(done_B=jnp.asarray(done_B))
            decode = sampling.decode if other else _decode
            state = decode(self.model, self.variables, state, arrays, ends_E, jnp.int32(min(every, S)))

    def _new(self, tokens_T: np.ndarray, seen: int) -> np.ndarray:
        """What is new after the first ``seen`` tokens, up to the end token."""
        ends = np.flatnonzero(np.isin(tokens_T, self.ends))
        return tokens_T[seen : ends[0] if len(ends) else None]

    def _beams(
        self, prompts: Sequence[np.ndarray], params: list[SamplingParams], limits: list[int]
    ) -> list[np.ndarray]:
        if len(self.ends) > 1:
            raise UserError("a beam search ends with one token; this model has several that end a text.")
        found = []
        for prompt, p, limit in zip(prompts, params, limits, strict=True):
            tokens_1L = np.zeros((1, _rounded(len(prompt), 16)), np.int32)
            tokens_1L[0, : len(prompt)] = prompt
            tokens_BNT, _ = _beam_search(
                self.model,
                self.variables,
                tokens_1L,
                np.array([len(prompt)], np.int32),
                max_new_tokens=limit,
                beams=p.beams,
                end=self.ends[0] if self.ends else None,
                length_penalty=p.length_penalty,
            )
            found.append(self._new(np.asarray(tokens_BNT)[0, 0], 0))
        return found

    def room(self, prompt: int, wanted: int | None) -> int:
        """How many tokens may follow a prompt of so many.

        Raises:
          UserError: none, or fewer than are wanted.
        """
        if not prompt:
            raise UserError("the prompt is empty, and this model has no token to begin a text with; give it a prompt.")
        length = getattr(self.model, "length", None) or 2**30
        room = length - prompt
        if wanted is not None and (wanted <= room or getattr(self.model, "positions", None) == "rope"):
            return wanted
        if room < 1:
            raise UserError(
                f"the prompt has {prompt:,} tokens, and the model reads {length:,} in all; shorten it to at most"
                f" {length - 1:,}."
            )
        if wanted is not None:
            raise UserError(
                f"a prompt of {prompt:,} tokens leaves room for {room:,} of the model's {length:,}; max_new_tokens is"
                f" {wanted:,}."
            )
        return min(room, _MOST)

    # -- text ------------------------------------------------------------------------------------------------------

    def write(
        self,
        prompts: Sequence[str | np.ndarray],
        params: Params = GREEDY,
        every: int = 1,
    ) -> Iterator[list[tuple[str, Completion | None]]]:
        """Continues texts (or their tokens), as one batch.

        Yields:
          For each prompt: what is new of its text, without incomplete characters or what may become a stop text; and
          once it has ended, all of it.
        """
        if self.tokenizer is None:
            raise UserError("without a tokenizer there is no text; give tokens to stream or generate.")
        params = _for_each(params, prompts)
        tokens = self.tokens_of(prompts)
        detokenizers = [
            IncrementalDetokenizer(self.tokenizer, t.tolist(), p.stop) for t, p in zip(tokens, params, strict=True)
        ]
        limits = [self.room(len(t), p.max_new_tokens) for t, p in zip(tokens, params, strict=True)]
        stopped = np.zeros(len(prompts), bool)
        completions: list[Completion | None] = [None] * len(prompts)
        written: list[list[int]] = [[] for _ in prompts]

        def end(b: int, reason: str) -> str:
            rest = detokenizers[b].finish()
            completions[b] = Completion(np.array(written[b], np.int32), detokenizers[b].text, reason)
            stopped[b] = True
            return rest

        for new in self.stream(tokens, params, every, stopped):
            pieces = [""] * len(prompts)
            for b, tokens_T in enumerate(new):
                for token in tokens_T.tolist():
                    if completions[b] is None:
                        written[b].append(token)
                        pieces[b] += detokenizers[b].push(token)
                        if detokenizers[b].stopped:
                            pieces[b] += end(b, "stop")
                        elif len(written[b]) >= limits[b]:
                            pieces[b] += end(b, "length")
            yield list(zip(pieces, completions, strict=True))
        if not all(completions):  # those that the model has ended
            pieces = [end(b, "end") if completions[b] is None else "" for b in range(len(prompts))]
            yield list(zip(pieces, completions, strict=True))

    def complete(
        self,
        prompts: Sequence[str | np.ndarray],
        params: Params = GREEDY,
    ) -> list[Completion]:
        """How texts are continued; many are taken in batches of similar length."""
        params = _for_each(params, prompts)
        found: list[Any] = [None] * len(prompts)
        for some in _alike(prompts, params):
            every = _EVERY if any(params[i].stop for i in some) else 2**30
            for out in self.write([prompts[i] for i in some], [params[i] for i in some], every):
                last = out
            for i, (_, completion) in zip(some, last, strict=True):
                found[i] = completion
        return found

    def tokens_of(self, prompts: Sequence[str | np.ndarray]) -> list[np.ndarray]:
        """The tokens of texts; those that are tokens stay as they are."""
        return [self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    def encode(self, prompt: str) -> np.ndarray:
        """The tokens of a prompt; of an empty one, the end token, after which a text begins."""
        assert self.tokenizer is not None
        tokens_T = encode(self.tokenizer, prompt)
        if not len(tokens_T) and self.tokenizer.end is not None:
            return np.array([self.tokenizer.end], np.int32)
        return tokens_T


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty(model: Any, B: int, S: int) -> PyTree:
    """A cache of so many rows and places."""
    return model.cache(B, S)


def read(model: Any, *args: Any) -> tuple[jax.Array, PyTree]:
    """``sampling.prefill``, compiled; of another engine, which reads in no program, as it is."""
    found: tuple[jax.Array, PyTree] = (sampling.prefill if hasattr(model, "prefill") else _prefill)(model, *args)
    return found


_prefill = jax.jit(sampling.prefill, static_argnums=0, donate_argnums=2)
_init = jax.jit(sampling.init, static_argnums=5)
_decode = jax.jit(sampling.decode, static_argnums=0, donate_argnums=2)
_beam_search = jax.jit(
    beams.beam_tokens, static_argnums=0, static_argnames=("max_new_tokens", "beams", "end", "length_penalty")
)


def _halve(params: Any) -> Any:
    def cast(path: Any, x: Any) -> Any:
        matrix = path[-1].key in ("kernel", "embedding", "position", "head")
        return x.astype(jnp.bfloat16) if matrix else x

    return jax.tree.map_with_path(cast, params)


def _alike(prompts: Sequence[Any], params: list[SamplingParams]) -> list[list[int]]:
    """Batches of prompts of like length: their places."""
    order = sorted(range(len(prompts)), key=lambda i: (params[i].beams, len(prompts[i])))
    return [order[i : i + ROWS] for i in range(0, len(order), ROWS)]


def _for_each(params: Params, prompts: Sequence[Any]) -> list[SamplingParams]:
    every = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(every) != len(prompts):
        raise ValueError(f"there are {len(every)} SamplingParams for {len(prompts)} prompts")
    return every


def refuse_unknown(prompts: Sequence[Any], model: Any) -> None:
    """Raises UserError for a token that the model has no embedding for; it would be taken for another."""
    known = getattr(model, "vocab_size", None) or 2**31
    token = max((int(np.max(prompt)) for prompt in prompts if len(prompt)), default=0)
    if token >= known:
        raise UserError(
            f"the token {token:,} of a prompt is none of the model's {known:,} (0 to {known - 1:,}): the tokenizer is"
            " another model's, or was given tokens that this one was not; take the one that the model was trained with."
        )


def _rounded(n: int, least: int) -> int:
    """The smallest of ``least`` x 1, 1.5 (if that is whole), 2, 3, 4, 6, 8, ... that is not below n."""
    size = least
    while size < n:
        if size % 2 == 0 and size * 3 // 2 >= n:
            return size * 3 // 2
        size *= 2
    return size


# -------------------------------------------------------------------------------------------------------------- answers


def answers(
    predictor: Predictor,
    prompts: Sequence[str],
    params: SamplingParams | None = None,
    chat: bool = False,
    show: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """How prompts are continued, in their order: ``{"prompt", "text", "seconds", ...}``; or their translations, by a
    model that translates.

    ``seconds`` leave out compilation; where several prompts make a batch, they are the batch's, and
    ``tokens_per_second`` all its tokens'. Those of a translation are all that have passed.

    Args:
      params: None: greedily.
      chat: take a prompt for what a user says, and write the answer, by the model's chat template.
      show: takes the text as it comes, for a single prompt.

    Raises:
      UserError: the model does not write, or a prompt does not fit.
    """
    if any(_broken(prompt) for prompt in prompts):
        raise UserError("a prompt is not valid UTF-8 text.")
    if hasattr(model_of(predictor.task)[0], "translate"):
        if params is not None or chat:
            where = "generation_config.json says" if predictor.run is None else "config.task says (beams, max_length)"
            raise UserError(f"a translation is written as {where}; leave out --sample.")
        yield from _translations(predictor, prompts)
        return
    engine, params = Engine.of(predictor), params or GREEDY
    asked: list[Any] = list(prompts)
    if chat:
        template = predictor.dataset_info.get("chat_template")
        if template is None or engine.tokenizer is None:
            raise UserError("the model has no chat template; leave out --chat to continue the prompt as it stands.")
        loaded, words = chat_template.load(template), [[{"role": "user", "content": prompt}] for prompt in prompts]
        asked = [chat_template.prompt_tokens(loaded, engine.tokenizer, messages) for messages in words]
    for first in range(0, len(prompts), ROWS):
        some = asked[first : first + ROWS]
        for _, _ in zip(range(2), engine.stream(engine.tokens_of(some), params, 1), strict=False):
            pass  # compiles
        began = time.monotonic()
        for parts in engine.write(some, params, _EVERY if show is None else 1):
            if show is not None:
                show(parts[0][0])
        seconds = time.monotonic() - began
        if show is not None:
            show("\n")
        completions = [completion for _, completion in parts if completion is not None]
        rate = sum(len(completion.tokens) for completion in completions) / max(seconds, 1e-9)
        for prompt, completion in zip(prompts[first:], completions, strict=False):
            yield {
                "prompt": prompt,
                "text": completion.text,
                "tokens": len(completion.tokens),
                "finish_reason": completion.finish_reason,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(rate, 1),
            }


def _translations(predictor: Predictor, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    began = time.monotonic()
    given = [Input({"source": " ".join(prompt.split()) or "."}, "") for prompt in prompts]
    for prompt, (_, answer) in zip(prompts, predictor.answers(given), strict=True):
        if "error" in answer:
            raise UserError(f"the prompt {prompt[:40]!r}: {answer['error']}")
        yield {"prompt": prompt, "text": answer["translation"], "seconds": round(time.monotonic() - began, 3)}


def parse_sampling(text: str | None, stop: Sequence[str] = ()) -> SamplingParams:
    """``SamplingParams`` from ``temperature=0.8,top_k=50``.

    Raises:
      UserError: an unknown word (with the nearest one), or a value that does not fit.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(SamplingParams) if f.name != "stop"}
    words = vars(parse_arg(text, "--sample", **{**defaults, "max_new_tokens": 0}))
    given = words.pop("max_new_tokens")
    given = given if "max_new_tokens" in (text or "") else None
    stops = tuple(s.replace("\\n", "\n").replace("\\t", "\t") for s in stop)
    return SamplingParams(**words, max_new_tokens=given, stop=stops)


def read_prompts(pattern: str | None) -> list[str]:
    """The prompts in the lines of a file that are not empty.

    Raises:
      UserError: there is no such file, or no prompt in it.
    """
    if pattern is None:
        raise UserError('--mode=generate needs --prompt="..." or --input=FILE, a prompt in each line.')
    try:
        lines = pathlib.Path(pattern).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input={pattern} cannot be read as text ({error}).") from error
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--input={pattern} has no prompt in it.")
    if not pattern.endswith((".jsonl", ".json")):
        return [line for _, line in numbered]
    prompts = []
    for n, line in numbered:
        try:
            found = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, str):
            raise UserError(f'line {n} of {pattern} is no JSON object with a text "prompt".')
        prompts.append(found)
    return prompts


def _broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
