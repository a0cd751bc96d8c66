"""Latents that are encoded while training goes on (`latents: live`), for datasets whose latents are too many to keep.

A window's latents are those that `cache_latents` would have made of it: its stream goes through the encoder from its
beginning up to the end of the window, rounded to the column's dtype. So the windows are the same, in the same order.
"""
