"""Losses that compare each example of a batch with all of it: what retrieval and contrastive training share.

The batch is the global one, whatever devices hold it: under jit the compiler gathers the vectors, and where the scores
would be too many, ``sigmoid`` passes them around.

Axes: B examples, D width of the vectors.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32

from bigbase_jax.models.attention import pass_on
from bigbase_jax.models.layers import mesh_axes, mesh_size


def softmax(
    score_BB: Float[Array, "B B"], other_BB: Bool[Array, "B B"], drawn_B: Float[Array, " B"] | None = None
) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
    """Of each row, the score on the diagonal and the logarithm of the sum of exponential scores: of that one and of the
    ``other`` columns, from which ``drawn_B`` is taken before. The loss is their difference."""
    others_BB = jnp.where(other_BB, score_BB if drawn_B is None else score_BB - drawn_B, -jnp.inf)
    chosen_B = jnp.diagonal(score_BB)
    return chosen_B, jax.nn.logsumexp(jnp.concatenate([chosen_B[:, None], others_BB], 1), 1)


def clip(u_BD: Float[Array, "B D"], v_BD: Float[Array, "B D"], scale: Array, real_B: Array) -> Float32[Array, " B"]:
    """The softmax loss of pairs (Radford et al. 2021, figure 3) in nats: each ``u`` is to find its ``v`` among all of
    the batch, and each ``v`` its ``u``; the mean of both ways. Examples that are not ``real_B`` are no negatives."""
    score_BB = scale * u_BD @ v_BD.T
    other_BB = ~jnp.eye(len(u_BD), dtype=bool) & (jnp.asarray(real_B) > 0)
    ways = [softmax(x_BB, other_BB) for x_BB in (score_BB, score_BB.T)]
    return sum((partition_B - chosen_B) / 2 for chosen_B, partition_B in ways)  # type: ignore[return-value]


def sigmoid(
    u_BD: Float[Array, "B D"], v_BD: Float[Array, "B D"], scale: Array, bias: Array, real_B: Array
) -> Float32[Array, " B"]:
    """The sigmoid loss (Zhai et al. 2023, algorithm 1) in nats: whether ``u`` and ``v`` are a pair, of each with each.

    Where devices share the batch, each of them holds its ``u``, and the ``v`` of one device come by after another
    (ibid., section 3.1): it never holds more than (B / devices)^2 scores, also for the gradient, which computes them
    anew.
    """
    u_BD, real_B = scale * u_BD, jnp.asarray(real_B, jnp.float32)
    bias_B = jnp.broadcast_to(bias, real_B.shape)
    axes = mesh_axes("batch")
    if not axes or len(u_BD) % mesh_size("batch"):
        return _pairs(u_BD, v_BD, bias_B, real_B, True)

    def ring(u_bD: Array, v_bD: Array, bias_b: Array, real_b: Array) -> Array:
        def step(carry: tuple[Array, tuple[Array, Array]], i: Array) -> tuple[tuple[Array, tuple[Array, Array]], None]:
            loss_b, (v_bD, seen_b) = carry
            loss_b = loss_b + jax.checkpoint(_pairs)(u_bD, v_bD, bias_b, seen_b, i == 0)
            return (loss_b, pass_on((v_bD, seen_b), axes)), None

        start = jnp.zeros(len(u_bD)), (v_bD, real_b)
        (loss_b, _), _ = jax.lax.scan(step, start, jnp.arange(jax.lax.axis_size(axes)))
        return loss_b

    rows, row = PartitionSpec(axes, None), PartitionSpec(axes)
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        ring,
        in_specs=(rows, rows, row, row),
        out_specs=row,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )(u_BD, v_BD, bias_B, real_B)


def _pairs(u_aD: Array, v_bD: Array, bias_a: Array, real_b: Array, own: Array | bool) -> Array:
    """f32[a]: of each ``u`` with the real ones of ``v``; ``own``: whether these are the same examples."""
    pair_ab = jnp.eye(len(u_aD), len(v_bD), dtype=bool) & own
    score_ab = u_aD @ v_bD.T + bias_a[:, None]
    return -jnp.sum(jax.nn.log_sigmoid(jnp.where(pair_ab, score_ab, -score_ab)) * real_b, 1)
