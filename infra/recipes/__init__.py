"""Recipes that come with the package; `longtake run NAME` finds them."""
