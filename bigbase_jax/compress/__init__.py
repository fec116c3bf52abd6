"""Smaller models from trained ones: a run in, an ordinary run out (``--mode=compress``)."""
