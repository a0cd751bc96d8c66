"""Image encoders: from single frames to tokens and embeddings. CLIP needs the extra `[text]`, for `transformers`."""

from longtake.training.pictures.encoder import ClipFrames, ImageEncoder, load_image_encoder

__all__ = ("ClipFrames", "ImageEncoder", "load_image_encoder")
