"""A small model that learns from a large one: a task around a task, which trains its model against a teacher's outputs.

Axes: B examples, L positions, l positions of one of several chunks, S positions attended to, V classes or entries of
the vocabulary, H heads, K head width, D and E model width of the student and the teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigbase_jax.build import suggest
from bigbase_jax.core import Array, Batch, Given, Loss, Metric, Sum, UserError, Variables
from bigbase_jax.models.transformer import Attention, Block, Transformer
from bigbase_jax.parallel import GIVEN
from bigbase_jax.runtime.log import say
from bigbase_jax.tasks.chunked_loss import over_chunks
from bigbase_jax.wrappers.wrapper import Around

OWN = "distil"
"""Of the parameters, those of the projections."""
DIVERGENCES = ("forward", "reverse")


@dataclasses.dataclass(frozen=True)
class Distil(Around):
    """Trains ``task`` by its own loss and by what a frozen teacher makes of the same batch; everything else is the
    task's own, and needs no teacher.

    The loss is ``(1 - weight) hard + weight T^2 soft + hidden_weight hidden + attention_weight attention``, of which
    each term is logged by its name, and ``agreement``, the share of examples or tokens where both find the same the
    likeliest. ``hard`` is the task's own loss. ``soft`` is the divergence between both distributions at temperature T
    (Hinton, Vinyals & Dean 2015, section 2: by T^2, so that the share of either does not depend on T). ``hidden`` and
    ``attention`` are those of TinyBERT (Jiao et al. 2020, equations 7 and 8): mean squared errors of the outputs of
    blocks, through a learned matrix for each, and of the scores of attention before the softmax.

    A teacher predicts as it does in evaluation, without dropout, from the very pictures that the student sees: the same
    crop and, with ``Mix`` inside, the same mixture (Beyer et al. 2022, "function matching": weight=1, and patience).
    Its own normalisation and size of pictures come after that.

    Wrappers go inside: ``Distil(LoRA(Mix(Classification(...))), teacher)``.

    Attributes:
      task: one of classification, tagging or masked tokens, or of the next token (``CausalLanguageModel``,
        ``Translation``).
      teacher: a ``Given`` with ``task``, ``spec``, ``path`` and ``there`` (``inference.teacher.Teacher``).
      temperature: T.
      weight: of the teacher's distribution; the rest is that of the labels. 1: labels are not read.
      divergence: "forward", KL(teacher || student), or "reverse", KL(student || teacher), which leaves out what the
        student cannot have (Gu et al. 2024).
      hidden_weight, attention_weight: of these terms, which are for transformers of one stack of blocks, one by one
        (no scan, no remat); attention also for as many heads, without rotary positions or norms of queries and keys.
      layers: (block of the student, block of the teacher) each, from 0; None: each block of the student and the one
        after the same share of the teacher's.

    Raises:
      UserError: a value out of range, or a task that has nothing to compare; or (from ``loss``) a teacher that does not
        fit.
    """

    teacher: Any
    temperature: float = 2.0
    weight: float = 0.9
    divergence: str = "forward"
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    layers: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}; it is above 0, for example 2.")
        if not 0 <= self.weight <= 1:
            raise UserError(f"weight is {self.weight}; it is the teacher's share of the loss, from 0 to 1.")
        if self.divergence not in DIVERGENCES:
            raise UserError(
                f"there is no divergence {self.divergence!r}.{suggest(str(self.divergence), DIVERGENCES, 'divergence')}"
            )
        for name in ("hidden_weight", "attention_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it is not negative.")
        inner = _innermost(self.task)
        if not (hasattr(inner, "loss_from") or hasattr(inner, "cross_entropy")):
            raise UserError(
                f"Distil wraps classification, tagging, language models and translation, not {type(inner).__name__}."
            )
        if getattr(inner, "next_sentence", False):
            raise UserError("Distil compares hidden tokens alone; set next_sentence to False.")
        if getattr(inner, "loss_kind", "softmax") != "softmax":
            raise UserError(f"Distil compares distributions; loss_kind is {inner.loss_kind!r}, set it to 'softmax'.")
        if hasattr(self.task, "given"):
            raise UserError("Distil is around a task that has a teacher already; a student has one.")

    @property
    def given(self) -> Given:
        """See ``core.Task``."""
        found: Given = self.teacher
        return found

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The task's own, and what is logged of the teacher."""
        return {**self.task.metrics, "agreement": Metric("max", "%", "Agreement with the teacher")}

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """The task's own at the same key, and where there are hidden states to compare, the matrices of ``OWN``.

        What only evaluates and predicts may do so when the teacher is gone, and then without these.
        """
        variables = self.task.init(key, batch)
        if not self.hidden_weight or not self.teacher.there:
            return variables
        (_, D, _), (_, E, _) = self._stacks()
        keys = jax.random.split(jax.random.fold_in(key, 1), len(self._pairs()))
        make = nn.initializers.lecun_normal()
        own = {f"layer_{i}": {"kernel": make(k, (D, E))} for (i, _), k in zip(self._pairs(), keys, strict=True)}
        return {**variables, "params": {**variables["params"], OWN: own}}

    def unwrap(self, variables: Variables) -> Variables:
        """The variables of the task inside."""
        params = {name: x for name, x in variables["params"].items() if name != OWN}
        return {**{name: x for name, x in variables.items() if name != GIVEN}, "params": params}

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """
        Raises:
          UserError: the teacher is of another kind, or has other classes or another tokenizer.
        """
        if GIVEN not in variables:
            raise UserError("a student is trained by the ordinary loop, and not in a population: there is no teacher.")
        student: Any = self.task
        wrappers: list[Any] = []
        while (inner := vars(student).get("task")) is not None:
            wrappers.append(student)
            student = inner
        self._check(student)
        seen = batch
        for mix in wrappers:
            if hasattr(type(mix), "mixed"):
                mix_key, key = jax.random.split(key)
                batch = mix.mixed(batch, mix_key)
        theirs = self._of_teacher(variables[GIVEN], student, seen, batch)
        task: Any = _Compared(self, student, theirs, variables["params"].get(OWN, {}))
        for wrapper in reversed(wrappers):
            if not hasattr(type(wrapper), "mixed"):
                task = dataclasses.replace(wrapper, task=task)
        found: tuple[Loss, Variables] = task.loss(self.unwrap(variables), batch, key)
        return found

    def _of_teacher(self, variables: Variables, student: Any, seen: Batch, batch: Batch) -> _Theirs:
        """What the teacher makes of a batch; ``seen`` is what that was before it was mixed."""
        teacher, taps = self.teacher.task, _Taps(self)
        batch = {**batch, **_pictures(self.teacher, student, seen, batch)}
        with nn.intercept_methods(taps):
            if hasattr(student, "loss_from"):
                logits = jax.lax.stop_gradient(teacher.logits(variables, batch))
                return _Theirs(logits, lambda logits: logits, taps)
            y_BLE = jax.lax.stop_gradient(teacher.hidden(variables, batch))
        return _Theirs(y_BLE, lambda y_BlE: jax.lax.stop_gradient(teacher.logits(variables, y_BlE)), taps)

    def divergence_of(self, logits: Array, theirs: Array) -> jax.Array:
        """f32[...]: of the distributions of logits [..., V], in nats, at the temperature."""
        ours = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32) / self.temperature)
        wanted = jax.nn.log_softmax(jnp.asarray(theirs, jnp.float32) / self.temperature)
        p, q = (wanted, ours) if self.divergence == "forward" else (ours, wanted)
        return jnp.sum(jnp.exp(p) * (p - q), -1)

    # -- what fits ---------------------------------------------------------------------------------------------------

    def _check(self, student: Any) -> None:
        teacher, path = _innermost(self.teacher.task), self.teacher.path
        if not (isinstance(teacher, type(student)) or isinstance(student, type(teacher))):
            kinds = type(student).__name__, type(teacher).__name__
            raise UserError(f"a {kinds[0]} learns from another one, and the teacher {path} is a {kinds[1]}.")
        ours: Any
        theirs: Any
        ours, theirs = (getattr(task, "tokenizer", None) for task in (student, teacher))
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(
                f"the teacher {path} reads by another tokenizer than this data; leave the recipe's open to take the"
                " teacher's, or take a teacher with this one."
            )
        names = "tag_names" if hasattr(student, "tag_names") else "class_names"
        ours, theirs = (getattr(task, names, None) for task in (student, teacher))
        if None not in (ours, theirs) and ours != theirs and len(ours) == len(theirs):
            told = f"the teacher {path} calls its classes {', '.join(theirs)}, and this data {', '.join(ours)}"
            if sorted(ours) == sorted(theirs):
                raise UserError(f"{told}; bring them into the same order.")
            say(f"{told}: they are taken for each other, in this order")

    def check_widths(self, ours: int, theirs: int, of: str) -> None:
        """Raises UserError where the student has more classes or tokens than the teacher, or other classes."""
        if ours > theirs or (of != "tokens" and ours != theirs):
            raise UserError(
                f"the teacher {self.teacher.path} has {theirs} {of}, and the student {ours}; take a teacher of the same"
                f" {of}."
            )

    def _stacks(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Depth, width and heads of the student and of the teacher."""
        models = [_innermost(task).model for task in (self.task, self.teacher.task)]
        for model, whose in zip(models, ("the student", f"the teacher {self.teacher.path}"), strict=True):
            if not isinstance(model, Transformer) or hasattr(model, "decoder_depth"):
                raise UserError(
                    "hidden_weight and attention_weight are for transformers of one stack of blocks, and "
                    f"{whose} is a {type(model).__name__}; set them to 0."
                )
            if model.scan:
                hint = "--mode=export --to=safetensors writes it with its blocks one by one"
                raise UserError(
                    f"the blocks of {whose} are in one stack, inside of which nothing is seen; set scan=False"
                    + (f" ({hint})." if whose != "the student" else ".")
                )
            if model.remat:
                raise UserError(f"{whose} computes its blocks again, inside of which nothing is seen; set remat=False.")
            styled = getattr(model, "positions", "") == "rope" or model.style.qk_norm or model.style.kv_heads
            if self.attention_weight and styled:
                raise UserError(
                    f"attention_weight is for plain heads without rotary positions; {whose} has others (rope,"
                    " qk_norm or kv_heads); set it to 0."
                )
        sizes = [getattr(model, "size", model) for model in models]
        ours, theirs = ((size.depth, size.width, size.heads) for size in sizes)
        if self.attention_weight and vars(self.teacher.task).get("task") is not None:
            raise UserError(f"attention_weight compares scores, and {self.teacher.path} is quantised; set it to 0.")
        if self.attention_weight and ours[2] != theirs[2]:
            raise UserError(
                f"attention_weight compares head by head; the student has {ours[2]} heads, and the teacher {theirs[2]}."
            )
        return ours, theirs

    def _pairs(self) -> tuple[tuple[int, int], ...]:
        (depth, *_), (theirs, *_) = self._stacks()
        if self.layers is None:
            return tuple((i, max((i + 1) * theirs // depth - 1, 0)) for i in range(depth))
        pairs = tuple((int(i), int(j)) for i, j in self.layers)
        if not pairs or not all(0 <= i < depth and 0 <= j < theirs for i, j in pairs):
            raise UserError(
                f"layers is {self.layers}; the student has blocks 0 to {depth - 1}, the teacher {theirs - 1}."
            )
        return pairs

    def compared(self, ours: _Taps, theirs: _Taps, own: Mapping[str, Any], batch: Batch) -> dict[str, Sum]:
        """The terms ``hidden`` and ``attention``, where they are wanted."""
        if not (self.hidden_weight or self.attention_weight):
            return {}
        pairs, terms = self._pairs(), {}
        L, other = (taps.hidden[0].shape[1] for taps in (ours, theirs))
        if other != L:
            raise UserError(
                f"the student's blocks see {L} positions, and the teacher's {other}; give both the same patch and"
                " size of pictures, or set hidden_weight and attention_weight to 0."
            )
        segment_BL = jnp.asarray(batch.get("segment_ids", jnp.ones((1, L), jnp.int32)))
        real_BL = (segment_BL > 0) * batch["mask"][:, None]
        if self.hidden_weight:
            errors = [
                jnp.mean((ours.hidden[i] @ own[f"layer_{i}"]["kernel"] - theirs.hidden[j]) ** 2, -1) for i, j in pairs
            ]
            terms["hidden"] = Sum(jnp.sum(real_BL * sum(errors)) / len(pairs), jnp.sum(real_BL))
        if self.attention_weight:
            seen_BLS = real_BL[:, :, None] * (segment_BL[:, :, None] == segment_BL[:, None])
            if getattr(_innermost(self.task).model, "causal", False):
                seen_BLS = jnp.tril(seen_BLS)
            errors = [jnp.mean((ours.scores(i) - theirs.scores(j)) ** 2, 1) for i, j in pairs]
            terms["attention"] = Sum(jnp.sum(seen_BLS * sum(errors)) / len(pairs), jnp.sum(seen_BLS))
        return terms


@dataclasses.dataclass(frozen=True, eq=False)
class _Theirs:
    """What a teacher makes of a batch: ``logits_of(y)`` of all or some positions, and what its blocks give."""

    y: jax.Array
    logits_of: Callable[[jax.Array], jax.Array]
    taps: _Taps


@dataclasses.dataclass(frozen=True, eq=False)
class _Compared:
    """The innermost task in training: its wrappers take it for that task."""

    distil: Distil
    task: Any
    theirs: _Theirs
    own: Mapping[str, Any]

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        distil, task, theirs, taps = self.distil, self.task, self.theirs, _Taps(self.distil)
        T, weight = distil.temperature, distil.weight
        hard: dict[str, Sum] = {}
        if hasattr(task, "loss_from"):
            with nn.intercept_methods(taps):
                logits_BV, state = task.train_logits(variables, batch, key)
            V = logits_BV.shape[-1]
            distil.check_widths(V, theirs.y.shape[-1], getattr(task, "chosen", "classes"))
            theirs_BV = theirs.y[..., :V]
            if weight < 1:
                hard = {"hard": task.loss_from(logits_BV, batch).terms["loss"]}
            counts = task.counts(batch)
            soft = distil.divergence_of(logits_BV, theirs_BV)
            same = jnp.argmax(logits_BV, -1) == jnp.argmax(theirs_BV, -1)
        else:
            with nn.intercept_methods(taps):
                y_BLD = task.hidden(variables, batch, True, key)
            state = {name: x for name, x in variables.items() if name != "params"}
            target_BL, counts = task.targets(batch)

            def of_chunk(both: Any, target_Bl: Any) -> Any:
                ours_BlV, theirs_BlV = task.logits(variables, both[0]), theirs.logits_of(both[1])
                V = ours_BlV.shape[-1]
                distil.check_widths(V, theirs_BlV.shape[-1], "tokens")
                theirs_BlV = theirs_BlV[..., :V]  # what more it has room for stands for no token
                same_Bl = jnp.argmax(ours_BlV, -1) == jnp.argmax(theirs_BlV, -1)
                hard_Bl = task.cross_entropy(ours_BlV, target_Bl)
                return hard_Bl, distil.divergence_of(ours_BlV, theirs_BlV), same_Bl

            found = over_chunks(of_chunk, (y_BLD, theirs.y), target_BL, task.chunks(y_BLD.shape[1]))
            hard_BL, soft, same = found
            if weight < 1:
                hard = {"hard": Sum(jnp.sum(counts * hard_BL), jnp.sum(counts))}
        terms = {**hard, "soft": Sum(jnp.sum(counts * soft), jnp.sum(counts))}
        terms |= distil.compared(taps, theirs.taps, self.own, batch)
        scale = {"hard": 1 - weight, "soft": weight * T**2}
        scale |= {"hidden": distil.hidden_weight, "attention": distil.attention_weight}
        aux = {"agreement": Sum(jnp.sum(counts * same), jnp.sum(counts))}
        return Loss(terms, aux, {name: scale[name] for name in terms}), state


class _Taps:
    """An interceptor that keeps what the blocks of a transformer give, in order, and their queries and keys."""

    def __init__(self, distil: Distil):
        self._attention = distil.attention_weight > 0
        self._wanted = self._attention or distil.hidden_weight > 0
        self.hidden: list[jax.Array] = []
        self._heads: list[dict[str, jax.Array]] = []

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not self._wanted or context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, Block):
            self._heads.append({})
        y = call(*args, **kwargs)
        if isinstance(module, Block):
            self.hidden.append(y.astype(jnp.float32))
        elif self._attention and module.name in ("query", "key") and isinstance(module.parent, Attention):
            scale = module.parent.style.scale or y.shape[-1] ** -0.5
            self._heads[-1][module.name] = y.astype(jnp.float32) * (scale if module.name == "query" else 1)
        return y

    def scores(self, i: int) -> jax.Array:
        """f32[B,H,L,S]: of the attention of block i, before the softmax and without a mask."""
        return jnp.einsum("blhk,bshk->bhls", self._heads[i]["query"], self._heads[i]["key"])


def _innermost(task: Any) -> Any:
    while (inner := vars(task).get("task")) is not None:
        task = inner
    return task


def _pictures(teacher: Any, student: Any, seen: Batch, batch: Batch) -> dict[str, Any]:
    """The pictures of a batch as the teacher takes them: normalised by its own numbers, in the size that it knows."""
    task = _innermost(teacher.task)
    if not (hasattr(task, "normalise") and hasattr(student, "normalise")):
        return {}
    x_BHWC, shape = batch["image"], tuple(teacher.spec["image"].shape)
    if x_BHWC.shape[-1] != shape[-1]:
        raise UserError(
            f"the teacher {teacher.path} takes pictures of {shape[-1]} channel(s), and these have {x_BHWC.shape[-1]}."
        )
    mixed = seen["image"].dtype == jnp.uint8 and x_BHWC.dtype != jnp.uint8  # then as the student normalises
    if mixed and (task.mean, task.std) != (student.mean, student.std):
        raw_BHWC = x_BHWC * jnp.float32(student.std) + jnp.float32(student.mean)
        x_BHWC = (raw_BHWC - jnp.float32(task.mean)) / jnp.float32(task.std)
    if x_BHWC.shape[1:] != shape:
        x_BHWC = jax.image.resize(task.normalise(x_BHWC), (len(x_BHWC), *shape), "linear")
    return {"image": x_BHWC}
