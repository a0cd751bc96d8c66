"""MAVIN (arXiv 2405.18003): the frames between two clips."""
