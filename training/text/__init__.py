"""Text encoders: from captions to the states of their tokens. Needs the extra `[text]`. See README.md beside this file."""

from longtake.datasets.text import TextConfig
from longtake.training.text.encoder import TextEncoder, digest_of, gives, load_encoder

__all__ = ("TextConfig", "TextEncoder", "digest_of", "gives", "load_encoder")
