"""Cleaning data before training, on Daft: in this process, or on Ray with one argument and the same result.

``steps`` says what a step is, ``engine`` runs it, ``command`` goes through those that a recipe lists.
"""
