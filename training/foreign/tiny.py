"""A tiny Wan with random weights, as a folder in the layout of diffusers: for a first run of a recipe on two CPU cores.

It makes nothing to look at. Autoencoder, transformer, text encoder and scheduler are of the classes of Wan 2.1, so that what
runs with it runs with a real one. The same version of the libraries writes the same weights in every run.
"""

from pathlib import Path
from typing import Any

import torch

from longtake.datasets.errors import UserError
from longtake.training.foreign.library import class_of

_CHANNELS, _TEXT = 16, 64  # of latents, of states of texts
_SPECIAL = ("<pad>", "</s>", "<unk>")
_LETTERS = [chr(code) for code in range(ord(" "), ord("~") + 1)]  # a token each

_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "text_dim": _TEXT,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 4,
}
_VAE: dict[str, Any] = {"base_dim": 8, "z_dim": _CHANNELS, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
_ENCODER = {"vocab_size": 128, "d_model": _TEXT, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_SCHEDULER: dict[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
}


def write(folder: Path, seed: int = 0) -> None:
    """Write the pipeline into a new folder.

    Raises:
        UserError: there is something at the folder; the extra is not installed.
    """
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UserError(f"{folder}: is there already; name another folder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = class_of("WanPipeline")(
            tokenizer=_tokenizer(),
            text_encoder=class_of("UMT5EncoderModel", "transformers")(
                class_of("UMT5Config", "transformers")(**_ENCODER)
            ),
            vae=_vae(),
            transformer=class_of("WanTransformer3DModel")(**_TRANSFORMER),
            scheduler=class_of("UniPCMultistepScheduler")(**_SCHEDULER),
        )
        pipeline.save_pretrained(folder, safe_serialization=True)


def _vae() -> Any:
    """An autoencoder with the means and deviations that its random latents have of noise at several scales."""
    vae = class_of("AutoencoderKLWan")(**_VAE).eval()
    coarse = torch.rand(4, 3, 9, 8, 8) * 2 - 1
    video = torch.nn.functional.interpolate(coarse, scale_factor=(1, 8, 8), mode="trilinear")
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mean.transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
    return vae


def _tokenizer() -> Any:
    """A token for each letter, and one at the end."""
    tokenizers = class_of("Tokenizer", "tokenizers"), class_of("models", "tokenizers")
    vocabulary = {letter: number for number, letter in enumerate([*_SPECIAL, *_LETTERS])}
    made = tokenizers[0](tokenizers[1].WordLevel(vocabulary, unk_token=_SPECIAL[-1]))
    made.pre_tokenizer = class_of("pre_tokenizers", "tokenizers").Split("", "isolated")
    made.post_processor = class_of("processors", "tokenizers").TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return class_of("PreTrainedTokenizerFast", "transformers")(tokenizer_object=made, model_max_length=512, **names)
