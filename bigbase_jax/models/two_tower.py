"""Two towers: a user and an item become vectors whose inner product is the score of the item for the user.

Axes: B examples, L length of a history, D model width, E: D + 1, T words (0 is padding), F width of features, R rows.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.tables import Table

_init = nn.initializers.normal(0.1)


class Ids(nn.Module):
    """A vector for each id from 0 to ``count``: a row of a table, or the sum of two that the id is hashed to.

    Few ids share both rows (hash embeddings: Svenstrup et al. 2017, with equal weights), so that a table is as large as
    memory allows and not as the ids are many. Id 0 has a row of its own.

    Attributes:
      count: the largest id.
      width: D.
      hashed: R, rows to hash into where there are more ids; None: each has its own.
    """

    count: int
    width: int
    hashed: int | None = None

    @nn.compact
    def __call__(self, ids: Int[Array, "*S"]) -> Float32[Array, "*S D"]:
        if not self.hashed or self.count <= self.hashed:
            return Table(1 + self.count, self.width, _init, name="vectors")(ids)
        table = Table(1 + self.hashed, self.width, _init, name="vectors")
        rows = [jnp.where(ids > 0, 1 + _mixed(ids, seed) % self.hashed, 0).astype(jnp.int32) for seed in _SEEDS]
        return table(jnp.stack(rows, -1)).sum(-2)


_SEEDS = (0x9E3779B9, 0x85EBCA77)


def _mixed(ids: Int[Array, "*S"], seed: int) -> Array:
    """u32: the 32-bit finaliser of MurmurHash3 (Appleby)."""
    x = ids.astype(jnp.uint32) ^ jnp.uint32(seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


class TwoTower(nn.Module):
    """What candidates are retrieved with (Covington et al. 2016; Yi et al. 2019).

    The user is the sum of a vector of the id, the mean of the embedded history, whose places have weights of their own,
    and the mean of the embedded words; the item that of its id, its words and a projection of its features. Either
    sum goes through residual layers and is scaled to length 1, and an item has a bias besides: the vectors are
    ``[u / temperature, 1]`` and ``[v, b]``, so that an inner product is all of the logit
    ``u . v / temperature + b``.

    Ids count from 1. Id 0 is one that training has not seen, and has parameters too: see ``tasks.retrieval``. An item
    has one embedding on both sides.

    Attributes:
      num_users, num_items: the largest ids.
      length: L, of the longest history.
      user_words, item_words: how many words there are; None: none are read.
      item_features: F; None: none are read.
      width: D.
      hashed: rows of users, and of items, that ids are hashed into where there are more; see ``Ids``.
      hidden: widths of the hidden layers of the residual ones, of either tower.
      temperature: that scores are divided by.
      learn_temperature: whether it is a parameter, which begins there.

    Raises:
      ModelError: a size or a temperature out of range, or one that is missing.
    """

    num_users: int | None = None
    num_items: int | None = None
    length: int | None = None
    user_words: int | None = None
    item_words: int | None = None
    item_features: int | None = None
    width: int = 64
    hashed: int | None = None
    hidden: tuple[int, ...] = ()
    temperature: float = 0.1
    learn_temperature: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ModelError(f"the model's temperature is {self.temperature}; it must be above 0, for example 0.1.")
        if self.hashed is not None and self.hashed < 1:
            raise ModelError(f"the model's hashed is {self.hashed}; ids are hashed into at least one row.")
        super().__post_init__()

    def setup(self) -> None:
        for name in ("num_users", "num_items", "length"):
            if (getattr(self, name) or 0) < 1:
                raise ModelError(f"the model's {name} is {getattr(self, name)}; give it, or data that knows it.")
        self.user_id = Ids(self.num_users or 0, self.width, self.hashed)
        self.item_id = Ids(self.num_items or 0, self.width, self.hashed)
        self.bias = self.param("bias", nn.initializers.zeros, (1 + (self.num_items or 0),))
        self.recency = self.param("recency", nn.initializers.zeros, (self.length,))
        self.words = {
            side: self.param(f"{side}_words", _init, (1 + count, self.width))
            for side, count in (("user", self.user_words), ("item", self.item_words))
            if count
        }
        self.features = nn.Dense(self.width, use_bias=False)
        self.towers = {
            side: [(nn.Dense(size), nn.Dense(self.width, kernel_init=nn.initializers.zeros)) for size in self.hidden]
            for side in ("user", "item")
        }
        self.popularity = nn.Dense(1, use_bias=False, kernel_init=nn.initializers.zeros)
        start = jnp.log(self.temperature)
        self.log_temperature = (
            self.param("log_temperature", lambda _: start) if self.learn_temperature else jnp.asarray(start)
        )

    def __call__(self, user: Any, item: Any) -> tuple[Array, Array]:
        """``users`` and ``items`` of these arguments each."""
        return self.users(*user), self.items(*item)

    def users(
        self, user_B: Int[Array, " B"], history_BL: Int[Array, "B L"], words_BT: Int[Array, "B T"] | None = None
    ) -> Float32[Array, "B E"]:
        """Vectors of users, by id, items of the history (0: padding, on either side of them) and words.

        Raises:
          ModelError: the history is longer than the model's.
        """
        if history_BL.shape[1] > (self.length or 0):
            raise ModelError(f"a history of {history_BL.shape[1]} items is longer than the {self.length} of the model.")
        real_BL = history_BL > 0
        left_BL = jnp.cumsum(real_BL[:, ::-1], axis=1)[:, ::-1]  # items from here on: 1 at the last
        weight_BL = jnp.where(real_BL, jnp.exp(self.recency[jnp.maximum(left_BL, 1) - 1]), 0.0)
        x_BD = self.user_id(user_B) + _mean(self.item_id(history_BL), weight_BL)
        u_BD = self._tower("user", x_BD + self._words("user", words_BT))
        return jnp.concatenate([u_BD / jnp.exp(self.log_temperature), jnp.ones_like(u_BD[:, :1])], -1)

    def items(
        self,
        item_B: Int[Array, " B"],
        words_BT: Int[Array, "B T"] | None = None,
        features_BF: Float[Array, "B F"] | None = None,
    ) -> Float32[Array, "B E"]:
        """Vectors of items, by id, words and features such as the vector of a text."""
        x_BD = self.item_id(item_B) + self._words("item", words_BT)
        if self.item_features and features_BF is not None:
            x_BD = x_BD + self.features(features_BF.astype(jnp.float32))
        bias_B1 = self.bias[item_B][:, None] + self.popularity(x_BD)
        return jnp.concatenate([self._tower("item", x_BD), bias_B1], -1)

    def _words(self, side: str, words_BT: Array | None) -> Array:
        if side not in self.words or words_BT is None:
            return jnp.zeros(())
        return _mean(self.words[side][words_BT], (words_BT > 0).astype(jnp.float32))

    def _tower(self, side: str, x_BD: Array) -> Array:
        for up, down in self.towers[side]:
            x_BD = x_BD + down(jax.nn.relu(up(x_BD)))
        return x_BD * jax.lax.rsqrt(jnp.maximum(jnp.sum(x_BD**2, -1, keepdims=True), 1e-12))


def _mean(x_BLD: Array, weight_BL: Array) -> Array:
    """f32[B,D]: zero where nothing has weight."""
    return jnp.einsum("bld,bl->bd", x_BLD, weight_BL / jnp.maximum(jnp.sum(weight_BL, 1, keepdims=True), 1e-6))
