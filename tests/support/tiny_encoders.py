"""Tiny text encoders with random weights, as folders that `transformers` has written, with a tokenizer of some words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TEXT = (
    "a red blue green square circle moves left right up down to the two people walk through town at night and it rains"
)
WORDS = f"{_TEXT} all time in , describe this : system user".split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SIZE = len(SPECIAL) + len(WORDS)
_ENDS = {"t5": ("", "</s>"), "umt5": ("", "</s>"), "llama": ("<s>", "")}  # else both


def tokenizer(folder: Path, begin: str, end: str, of_clip: bool = False) -> None:
    """Write one of some words. Of CLIP the end token has the highest id, and pads too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS, "<unk>", "<pad>", "<s>", "</s>"] if of_clip else [*SPECIAL, *WORDS]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = " ".join(filter(None, (begin, "$A", end)))
    made.post_processor = processors.TemplateProcessing(
        single=pieces, special_tokens=[(word, vocabulary[word]) for word in ("<s>", "</s>")]
    )
    names = {"pad_token": "</s>" if of_clip else "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **names).save_pretrained(folder)


def model(kind: str, seed: int = 0) -> Any:
    import torch
    import transformers as t

    torch.manual_seed(seed)
    usual = {"vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    usual |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind in ("t5", "umt5"):
        sizes = {"vocab_size": SIZE, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
        config = (t.T5Config if kind == "t5" else t.UMT5Config)(**sizes)
        # T5 as it comes, with its decoder; of UMT5 the encoder alone, as video models bring it
        return t.T5ForConditionalGeneration(config) if kind == "t5" else t.UMT5EncoderModel(config)
    if kind == "clip":
        eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        eyes |= {"image_size": 8, "patch_size": 4, "projection_dim": 16}
        text = usual | {"max_position_embeddings": 24}
        return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=eyes, projection_dim=16))
    if kind == "clip_text":
        return t.CLIPTextModel(t.CLIPTextConfig(**usual, max_position_embeddings=24))
    if kind == "bert":
        return t.BertForMaskedLM(t.BertConfig(**usual, max_position_embeddings=48))
    assert kind == "llama"
    return t.LlamaForCausalLM(t.LlamaConfig(**usual, max_position_embeddings=128))


def encoder(kind: str, folder: Path, seed: int = 0) -> str:
    """A folder with a model of a kind, and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model(kind, seed).save_pretrained(folder)
    tokenizer(folder, *_ENDS.get(kind, ("<s>", "</s>")))
    return str(folder)
