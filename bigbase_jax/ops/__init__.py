"""Versions of models and what they are seen to do: registry, monitoring, drift."""
