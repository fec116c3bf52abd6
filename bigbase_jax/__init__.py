"""bigbase_jax: a foundation-model base that a small team can own."""
