"""Mixup and CutMix as a task around a classification task.

Axes: B examples, P = B / 2 pairs, H height, W width, C channels, K classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Batch, Loss, Task, UserError, Variables


@dataclasses.dataclass(frozen=True)
class Mix:
    """Trains ``task`` on mixtures of two pictures and of their labels; everything but the loss is the task's own.

    Rows 2 i and 2 i + 1 of a batch are mixed with each other, each keeping the same share: the batch is shuffled, so
    that this pairs at random, and where every device has an even number of rows nothing moves between devices. The
    share is drawn once per batch (under ``shard_map`` and accumulation: per slice, whose rows pair among themselves).
    A row whose partner is padding stays as it is.

    Attributes:
      task: a task with ``normalise(image)`` and ``one_hot(label)``, such as ``Classification``.
      mixup_alpha: mixup (Zhang et al. 2018) with a share from Beta(alpha, alpha); 0: none.
      cutmix_alpha: CutMix (Yun et al. 2019): a box whose area is drawn likewise comes from the partner, and labels mix
        by the exact area; 0: none. Where both are on, each batch takes one of them at even odds.
      prob: probability that a batch is mixed at all.

    Raises:
      UserError: a value out of range, or a task that cannot be mixed.
    """

    task: Task
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0

    def __post_init__(self) -> None:
        if not (hasattr(self.task, "normalise") and hasattr(self.task, "one_hot")):
            raise UserError(f"Mix wraps a classification task, not {type(self.task).__name__}.")
        if hasattr(self.task, "given"):
            raise UserError("Mix goes inside, so that the teacher sees the same mixtures: Distil(Mix(task)).")
        if min(self.mixup_alpha, self.cutmix_alpha) < 0 or not max(self.mixup_alpha, self.cutmix_alpha) > 0:
            raise UserError(
                f"mixup_alpha is {self.mixup_alpha} and cutmix_alpha {self.cutmix_alpha}; "
                "give at least one of them a positive value, such as 0.2 or 1.0."
            )
        if not 0 <= self.prob <= 1:
            raise UserError(f"prob is {self.prob}; it is a probability from 0 to 1.")

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """
        Raises:
          UserError: see ``mixed``.
        """
        mix_key, task_key = jax.random.split(key)
        return self.task.loss(variables, self.mixed(batch, mix_key), task_key)

    def mixed(self, batch: Batch, key: jax.Array) -> Batch:
        """The batch with its pictures, f32[B,H,W,C], and labels, f32[B,K], mixed.

        Raises:
          UserError: an odd number of rows, which leaves one without a partner.
        """
        task: Any = self.task
        image_BHWC, label_BK = task.normalise(batch["image"]), task.one_hot(batch["label"])
        if len(label_BK) % 2:
            raise UserError(f"mixup and cutmix need an even number of examples in each slice, not {len(label_BK)}.")
        keep_HW = self.keep(key, *image_BHWC.shape[1:3])
        real_B = _partner(batch["mask"])
        keep_BHW1 = 1 - real_B[:, None, None, None] * (1 - keep_HW[..., None])
        share_B1 = keep_BHW1.mean((1, 2))
        mixed = {
            "image": keep_BHW1 * image_BHWC + (1 - keep_BHW1) * _partner(image_BHWC),
            "label": share_B1 * label_BK + (1 - share_B1) * _partner(label_BK),
        }
        return {**batch, **mixed}

    def keep(self, key: jax.Array, H: int, W: int) -> jax.Array:
        """f32[H,W]: how much of each pixel is a picture's own: constant for mixup, 1 outside a box for CutMix."""
        which_key, share_key, box_key, prob_key = jax.random.split(key, 4)
        both = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        cut = jax.random.bernoulli(which_key) if both else jnp.bool_(self.cutmix_alpha > 0)
        alpha = jnp.where(cut, self.cutmix_alpha, self.mixup_alpha)
        share = jax.random.beta(share_key, alpha, alpha)
        side = jnp.sqrt(1 - share) / 2
        y, x = jax.random.uniform(box_key, (2,))
        inside_H = jnp.abs((jnp.arange(H) + 0.5) / H - y) < side
        inside_W = jnp.abs((jnp.arange(W) + 0.5) / W - x) < side
        box_HW = inside_H[:, None] & inside_W
        keep_HW = jnp.where(cut, 1.0 - box_HW, share)
        return jnp.where(jax.random.bernoulli(prob_key, self.prob), keep_HW, 1.0)

    def __getattr__(self, name: str) -> Any:
        """All else is the task's own, ``batch_coupled`` too: every slice of an even size holds whole pairs."""
        if name == "task" or name.startswith("__"):  # of an object that is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.task, name)


def _partner(x: jax.Array | np.ndarray) -> jax.Array:
    """Rows 2 i and 2 i + 1 exchanged."""
    pairs = jnp.reshape(x, (-1, 2, *x.shape[1:]))
    return jnp.flip(pairs, 1).reshape(x.shape)
