"""Tiny models of pictures with random weights, as folders that `transformers` has written, and files of other kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_encoders

SIDE = 16
KINDS = ("clip", "siglip", "siglip2", "clip_vision", "dinov2", "vit", "resnet")  # of encoders
LABELS = ("Safe", "NSFW: nude", "7 other")


def model(kind: str, seed: int = 0, **config: Any) -> Any:
    import torch
    import transformers as t

    torch.manual_seed(seed)
    eyes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    eyes |= {"image_size": SIDE, "patch_size": 4, "initializer_range": 0.3}
    text = {"hidden_size": 32 if kind == "clip" else 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "vocab_size": tiny_encoders.SIZE, "max_position_embeddings": 64}
    if kind == "clip":
        ends = {"bos_token_id": tiny_encoders.SIZE - 2, "eos_token_id": tiny_encoders.SIZE - 1, "pad_token_id": 0}
        return t.CLIPModel(t.CLIPConfig(text_config=text | ends, vision_config=eyes, projection_dim=24))
    if kind in ("siglip", "siglip2"):
        text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "projection_size": 16}
        if kind == "siglip":
            siglip = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=eyes))
        else:
            # pictures in their own proportions
            eyes = {name: value for name, value in eyes.items() if name != "image_size"} | {"num_patches": 16}
            siglip = t.Siglip2Model(t.Siglip2Config(text_config=text, vision_config=eyes))
        torch.nn.init.constant_(siglip.logit_scale, 1.0)
        torch.nn.init.constant_(siglip.logit_bias, -0.5)
        return siglip
    if kind == "clip_vision":
        return t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**eyes, projection_dim=24))
    if kind == "dinov2":
        return t.Dinov2Model(t.Dinov2Config(**eyes))
    if kind == "masked":
        return t.ViTMAEModel(t.ViTMAEConfig(**eyes))
    if kind == "resnet":
        return t.ResNetModel(t.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8))
    assert kind in ("vit", "classifier")
    if "num_labels" not in config:
        config |= {"id2label": dict(enumerate(LABELS)), "label2id": {label: n for n, label in enumerate(LABELS)}}
    return t.ViTForImageClassification(t.ViTConfig(**eyes, **config))


def folder(kind: str, place: Path, seed: int = 0, **config: Any) -> str:
    """A folder with a model, its preprocessor config, and of a dual encoder its tokenizer."""
    import transformers as t

    model(kind, seed, **config).save_pretrained(place)
    if kind in ("clip", "clip_vision"):
        sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        t.CLIPImageProcessorPil(**sizes).save_pretrained(place)
    elif kind == "siglip2":
        t.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16).save_pretrained(place)
    else:
        t.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(place)
    if kind == "clip":
        tiny_encoders.tokenizer(place, "<s>", "</s>", of_clip=True)
    if kind in ("siglip", "siglip2"):
        tiny_encoders.tokenizer(place, "", "</s>")
    return str(place)


def script(place: Path, width: int, seed: int = 0) -> str:
    """A TorchScript file, (B, 3, S, S) to (B, width)."""
    import torch

    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(),
        torch.nn.Linear(32, width), torch.nn.Tanh(),
    )  # fmt: skip
    torch.jit.script(net.eval()).save(str(place))
    return str(place)
