"""Adapters of ours in the loaders of diffusers and PEFT, and theirs in ours: the same output, the same matrices."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_backbones import HUNYUAN, LTX, WAN, called, tiny_transformer
from torch import Tensor, nn

from longtake.datasets.errors import Failure, UserError
from longtake.training.config import LoraConfig
from longtake.training.engines import lora
from longtake.training.foreign import adapters

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = {
    WAN: r"net\.blocks\.\d+\.(attn\d\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))",
    LTX: r"net\.transformer_blocks\.\d+\.(attn\d\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",
    HUNYUAN: r"net\.(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|proj_mlp|proj_out)",
}  # fmt: skip


class Held(nn.Module):
    """A transformer of diffusers as a Backbone holds it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def trained(class_name: str, config: LoraConfig, **more: Any) -> tuple[dict[str, Tensor], Tensor]:
    """What a LoRA of a tiny transformer has learned, here at random, and what the transformer says with it."""
    module = Held(tiny_transformer(class_name, **more))
    lora.attach(module, config)
    learned = {name: value for name, value in module.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in learned.values():
            value.normal_(0, 0.3)
    return {name: value.detach() for name, value in learned.items()}, called(module.net)


@pytest.mark.parametrize("class_name", [WAN, LTX, HUNYUAN])
def test_diffusers_and_peft_load_an_adapter_of_ours_to_the_same_output(tmp_path: Path, class_name: str) -> None:
    import peft

    config = LoraConfig(rank=4, alpha=3.0, targets=(TARGETS[class_name],))
    learned, output = trained(class_name, config)
    adapters.write(tmp_path, learned, config, class_name, "peft")

    by_folder = tiny_transformer(class_name)
    before = called(by_folder)
    by_folder.load_lora_adapter(str(tmp_path), use_safetensors=True)
    by_tensors = tiny_transformer(class_name)
    by_tensors.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    by_peft = peft.PeftModel.from_pretrained(tiny_transformer(class_name), str(tmp_path))
    by_ours = Held(tiny_transformer(class_name))
    adapters.load_into(by_ours, adapters.read(tmp_path, class_name))

    assert not torch.allclose(before, output, atol=1e-3)
    for loaded in (by_folder, by_tensors, by_peft.base_model.model, by_ours.net):
        torch.testing.assert_close(called(loaded), output, atol=1e-6, rtol=1e-5)
    names = [name for name, _ in by_peft.named_modules() if name.endswith("lora_A.default")]
    assert len(names) == len(learned) / 2
