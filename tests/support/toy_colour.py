"""A scorer for tests (see toy_scorers.py), as a module of its own."""

from toy_scorers import COLOUR as SCORER

__all__ = ["SCORER"]
