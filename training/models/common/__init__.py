"""Pieces that the families share."""
