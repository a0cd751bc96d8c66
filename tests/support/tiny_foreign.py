"""Tiny models of diffusers with random weights, and whole pipeline folders of them, the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tiny_encoders

C, TEXT, POOLED = 4, 32, 32  # channels of latents, of the states of texts, of pooled texts

WAN = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": C,
    "out_channels": C,
    "text_dim": TEXT,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
# noise, a mask of the 4 frames of a latent, latents of the start image; 2.1 attends to states of it too
WAN_I2V = WAN | {"in_channels": C + 4 + C}
WAN_I2V_21 = WAN_I2V | {"image_dim": 16, "added_kv_proj_dim": 24}
LTX = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": TEXT,
}
HUNYUAN = {
    "in_channels": C,
    "out_channels": C,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "text_embed_dim": TEXT,
    "pooled_projection_dim": POOLED,
    "rope_axes_dim": [4, 4, 4],
}
WAN_VAE = {
    "base_dim": 4,
    "z_dim": C,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.3, -0.2, 0.1, 0.4],
    "latents_std": [1.5, 0.7, 1.2, 2.0],
}
WAN22_VAE = WAN_VAE | {
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_spatial": 16,
}
LTX_VAE = {
    "latent_channels": 8,
    "block_out_channels": [8, 8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8, 8],
    "layers_per_block": [1, 1, 1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1, 1, 1],
    "spatio_temporal_scaling": [True, True, True, False],
    "decoder_spatio_temporal_scaling": [True, True, True, False],
    "patch_size": 4,
    "scaling_factor": 0.8,
}
HUNYUAN_VAE = {
    "latent_channels": C,
    "block_out_channels": [8, 8, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.476986,
}
EULER = {"class_name": "FlowMatchEulerDiscreteScheduler"}
UNIPC = {
    "class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "num_train_timesteps": 1000,
}
SCHEDULERS = {
    "wan": UNIPC | {"flow_shift": 3.0},
    "ltx": EULER
    | {
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "shift_terminal": 0.1,
    },
    "hunyuan": EULER | {"shift": 7.0},
}


def of_class(name: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """A model of diffusers in evaluation mode whose weights are all random, also those that begin at zero or one."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    made = getattr(diffusers, name)(**settings)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return made.eval()


def tiny_wan_transformer(seed: int = 0, **changes: Any) -> Any:
    return of_class("WanTransformer3DModel", WAN | changes, seed)


def tiny_wan_i2v_transformer(seed: int = 0, **changes: Any) -> Any:
    """That of 2.2, without states of the image; of 2.1 with `**WAN_I2V_21`."""
    return of_class("WanTransformer3DModel", WAN_I2V | changes, seed)


def tiny_ltx_transformer(seed: int = 0, **changes: Any) -> Any:
    return of_class("LTXVideoTransformer3DModel", LTX | changes, seed)


def tiny_hunyuan_transformer(seed: int = 0, **changes: Any) -> Any:
    return of_class("HunyuanVideoTransformer3DModel", HUNYUAN | changes, seed)


def tiny_wan_vae(seed: int = 0, **changes: Any) -> Any:
    return _vae("AutoencoderKLWan", WAN_VAE | changes, seed)


def tiny_wan22_vae(seed: int = 0, **changes: Any) -> Any:
    return _vae("AutoencoderKLWan", WAN22_VAE | changes, seed)


def tiny_ltx_vae(seed: int = 0, **changes: Any) -> Any:
    made = _vae("AutoencoderKLLTXVideo", LTX_VAE | changes, seed)
    made.latents_mean.copy_(made.latents_mean + 0.3)
    made.latents_std.copy_(made.latents_std * 1.7)
    return made


def tiny_hunyuan_vae(seed: int = 0, **changes: Any) -> Any:
    return _vae("AutoencoderKLHunyuanVideo", HUNYUAN_VAE | changes, seed)


def _vae(name: str, settings: dict[str, Any], seed: int) -> Any:
    """An autoencoder with the random weights that it begins with: larger ones would saturate."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    return getattr(diffusers, name)(**settings).eval()


def scheduler_of(config: dict[str, Any]) -> Any:
    """The scheduler of diffusers with this config, its class under `class_name`."""
    import diffusers

    return getattr(diffusers, config["class_name"])(**{k: v for k, v in config.items() if k != "class_name"})


# kind -> pipeline, transformer, autoencoder, text encoder, scheduler
PIPELINES: dict[str, tuple[str, Any, Any, str, str]] = {
    "wan": ("WanPipeline", tiny_wan_transformer, tiny_wan_vae, "umt5", "wan"),
    "wan22_5b": ("WanPipeline", tiny_wan_transformer, tiny_wan22_vae, "umt5", "wan"),
    "wan22_a14b": ("WanPipeline", tiny_wan_transformer, tiny_wan_vae, "umt5", "wan"),
    "wan_i2v": ("WanImageToVideoPipeline", tiny_wan_i2v_transformer, tiny_wan_vae, "umt5", "wan"),
    "ltx": ("LTXPipeline", tiny_ltx_transformer, tiny_ltx_vae, "t5", "ltx"),
    "hunyuan": ("HunyuanVideoPipeline", tiny_hunyuan_transformer, tiny_hunyuan_vae, "llama", "hunyuan"),
}


def pipeline(kind: str, seed: int = 0, scheduler: dict[str, Any] | None = None, **parts: Any) -> Any:
    """A pipeline of diffusers with random parts, some of them given; without texts of its own unless `parts` has them."""
    import diffusers

    name, transformer, vae, _, usual = PIPELINES[kind]
    made = {
        "transformer": transformer(seed),
        "vae": vae(seed),
        "scheduler": scheduler_of(scheduler or SCHEDULERS[usual]),
    }
    made |= {"tokenizer": None, "text_encoder": None}
    if kind == "wan22_5b":
        made["expand_timesteps"] = True
    if kind == "wan22_a14b":
        made |= {"transformer_2": transformer(seed + 1), "boundary_ratio": 0.875}
    if kind == "wan_i2v":
        made |= {"image_encoder": None, "image_processor": None}
    if kind == "hunyuan":
        made |= {"tokenizer_2": None, "text_encoder_2": None}
    made = getattr(diffusers, name)(**made | parts)
    made.set_progress_bar_config(disable=True)
    return made


def pipeline_folder(folder: Path, kind: str = "wan", seed: int = 0, **parts: Any) -> Path:
    """A folder of a whole pipeline of a kind of `PIPELINES` as diffusers writes it, with its text encoder and tokenizer."""
    with TemporaryDirectory() as scratch:
        made = pipeline(kind, seed, **text_parts(Path(scratch), kind, seed) | parts)
    made.save_pretrained(folder, safe_serialization=True)
    return folder


def text_parts(scratch: Path, kind: str, seed: int = 0) -> dict[str, Any]:
    """The text encoders and tokenizers of a kind of pipeline; the tokenizers are first written to `scratch`."""
    encoder = PIPELINES[kind][3]
    parts = {"text_encoder": _text_encoder(encoder, seed), "tokenizer": _tokenizer(scratch / "1", encoder)}
    if kind == "hunyuan":
        parts |= {
            "text_encoder_2": _text_encoder("clip_text", seed),
            "tokenizer_2": _tokenizer(scratch / "2", "clip_text"),
        }
    return parts


def _text_encoder(kind: str, seed: int) -> Any:
    import torch
    import transformers

    if kind == "clip_text":
        torch.manual_seed(seed)
        sizes = {"hidden_size": POOLED, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        # of CLIP's end token the config says 2, and the class takes the highest id for it
        ids = {"vocab_size": tiny_encoders.SIZE, "bos_token_id": tiny_encoders.SIZE - 2, "eos_token_id": 2}
        return transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**sizes, **ids, max_position_embeddings=77)
        ).eval()
    made = tiny_encoders.model(kind, seed).eval()
    if kind == "t5":
        # video models bring the encoder alone
        alone = transformers.T5EncoderModel(made.config).eval()
        alone.load_state_dict(made.state_dict(), strict=False)
        return alone
    if kind == "llama":
        made.config.max_position_embeddings = 512  # positions are rotated, and none is stored
        return made.model
    return made


def _tokenizer(folder: Path, kind: str) -> Any:
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    ends = {"t5": ("", "</s>"), "umt5": ("", "</s>"), "llama": ("<s>", "")}
    tiny_encoders.tokenizer(folder, *ends.get(kind, ("<s>", "</s>")), of_clip=kind == "clip_text")
    most = 77 if kind == "clip_text" else 512
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder, model_max_length=most)
