"""The causal decoder: a language model that reads from left to right.

Axes: B examples, L length, D model width, V entries of the vocabulary.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.attention import SEQUENCE_ATTENTION
from bigbase_jax.models.layers import DTYPES, ModelError, constrain, look_up
from bigbase_jax.models.transformer import REMAT_POLICIES, Encoder

_init = nn.initializers.normal(0.02)  # GPT-2's, of embeddings, positions and a free head


class Decoder(nn.Module):
    """A pre-norm transformer with learned positions, of GPT-2's shape (Radford et al. 2019) and by default its size.

    ``hidden`` and ``logits`` are the two halves of a call, so that a loss need not hold all logits at once.

    Attributes:
      vocab_size: V.
      length: the longest sequence, which has as many positions.
      width, depth, heads: D, blocks, heads.
      mlp_dim: of the hidden layers; None: 4 x width.
      tied: the head is the embedding, transposed (Press & Wolf 2017); otherwise it has parameters of its own.
      dropout: rate on the embedded tokens, after GELUs and on the output of each branch.
      dtype: of the computation, "float32" or "bfloat16"; parameters and logits are float32.
      remat, remat_policy, scan, sequence_attention, pipeline_microbatches: see ``Encoder``.

    Raises:
      ModelError: an unknown word among the attributes, sizes that are missing or do not divide, or a sequence that is
        too long.
    """

    vocab_size: int | None = None
    length: int | None = None
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int | None = None
    tied: bool = True
    dropout: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    remat_policy: str = "nothing_saveable"
    scan: bool = False
    sequence_attention: str = "ring"
    pipeline_microbatches: int = 4

    def __post_init__(self) -> None:
        look_up(DTYPES, self.dtype, "dtype")
        look_up(REMAT_POLICIES, self.remat_policy, "remat_policy")
        look_up(SEQUENCE_ATTENTION, self.sequence_attention, "sequence_attention")
        if self.width % self.heads:
            raise ModelError(f"a width of {self.width} does not divide over {self.heads} heads.")
        super().__post_init__()

    def setup(self) -> None:
        for name in ("vocab_size", "length"):
            if (getattr(self, name) or 0) < 1:
                raise ModelError(f"the model's {name} is {getattr(self, name)}; give it, or data that knows it.")
        self.embedding = self.param("embedding", _init, (self.vocab_size, self.width))
        self.position = self.param("position", _init, (self.length, self.width))
        self.encoder = Encoder(
            self.depth,
            self.heads,
            self.mlp_dim or 4 * self.width,
            causal=True,
            dropout=self.dropout,
            dtype=self.dtype,
            remat=self.remat,
            remat_policy=self.remat_policy,
            scan=self.scan,
            sequence_attention=self.sequence_attention,
            pipeline_microbatches=self.pipeline_microbatches,
        )
        if not self.tied:
            self.head = self.param("head", _init, (self.width, self.vocab_size))

    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float32[Array, "B L V"]:
        """Logits of the token after each one; see ``hidden``."""
        return self.logits(self.hidden(tokens_BL, segments_BL, positions_BL, train))

    def hidden(
        self,
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B L D"]:
        """What ``logits`` reads.

        Args:
          segments_BL: a token sees those before it in the same segment only; None: all before it.
          positions_BL: in each segment from 0; None: in the sequence.
        """
        L = tokens_BL.shape[1]
        if (self.length or 0) < L:
            raise ModelError(f"a sequence of {L} tokens is longer than the {self.length} positions of the model.")
        dtype = DTYPES[self.dtype]
        position = self.position[jnp.arange(L) if positions_BL is None else positions_BL].astype(dtype)
        x_BLD = constrain(self.embedding[tokens_BL].astype(dtype) + position, "batch", "length", "width")
        mask_B1LL = None
        if segments_BL is not None:
            mask_B1LL = (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
        return self.encoder(x_BLD, mask_B1LL, train=train)

    def logits(self, y_BLD: Float[Array, "B L D"]) -> Float32[Array, "B L V"]:
        """The head, whose products are summed in float32."""
        head_DV = (self.embedding.T if self.tied else self.head).astype(y_BLD.dtype)
        logits_BLV = jnp.einsum("bld,dv->blv", y_BLD, head_DV, preferred_element_type=jnp.float32)
        return constrain(logits_BLV, "batch", "length", "vocab")
