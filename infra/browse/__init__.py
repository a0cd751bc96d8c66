"""A page to look through a dataset: filter, sort, compare, find what is alike, and save a view."""
