"""The bag of words: a text is the mean of its tokens, whatever their order.

Axes: B examples, L length, D model width.
"""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float, Int

from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import DTYPES, ModelError, constrain


class BagOfWords(nn.Module):
    """One vector for each token, as fastText (Joulin et al. 2017) without its n-grams: what others have to beat.

    Attributes:
      vocab_size: entries of the vocabulary.
      width: D.
      dropout: rate on whole tokens.
      dtype: of the vectors, "float32" or "bfloat16"; parameters are float32.
    """

    vocab_size: int | None = None
    width: int = 128
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def hidden(
        self,
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B L D"]:
        """The vector of each token; nothing else is read.

        Raises:
          ModelError: the size of the vocabulary is missing.
        """
        if (self.vocab_size or 0) < 1:
            raise ModelError(f"the model's vocab_size is {self.vocab_size}; give it, or data that knows it.")
        table_VD = self.param("embedding", nn.initializers.normal(0.1), (self.vocab_size, self.width))
        x_BLD = constrain(table_VD[tokens_BL].astype(DTYPES[self.dtype]), "batch", "length", "width")
        return Dropout(self.dropout, broadcast_dims=(2,), deterministic=not train)(x_BLD)
