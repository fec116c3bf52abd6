"""Trained models that answer what users give them."""
