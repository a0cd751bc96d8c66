"""The blocks of every family of our own: a share of them is recomputed, with the same gradients, and they compile whole.

Those of other libraries are in foreign/test_backbone.py and memory/test_foreign.py.
"""

import itertools
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch import nn

from longtake.training.models.common.condition import Condition
from longtake.training.models.common.recompute import Share, chosen
from longtake.training.models.encgan3 import config as encgan3_config
from longtake.training.models.encgan3 import model as encgan3
from longtake.training.models.latte import model as latte
from longtake.training.models.mavin import model as mavin
from longtake.training.models.mavin.config import MavinConfig
from longtake.training.models.mavin.unet import ResnetBlock
from longtake.training.models.memory import dit as memory
from longtake.training.models.memory import dit_config
from longtake.training.models.memory.stretch import Stretch
from longtake.training.models.pv_vae import model as pv_vae
from longtake.training.models.tats import gpt, vqgan
from longtake.training.models.tats.sound import vqgan as sound
from longtake.training.models.tats.spectrogram import Spectrogram


class Config(BaseModel):
    share: Share = False


@pytest.mark.parametrize(("given", "kept"), [(0, False), (0.0, False), (1, True), ("true", True), (0.25, 0.25)])
def test_all_and_none_are_written_in_one_way(given: Any, kept: bool | float) -> None:
    share = Config(share=given).share
    assert share == kept and type(share) is type(kept)


@pytest.mark.parametrize("given", [-0.1, 1.1, "half"])
def test_no_share_is_refused(given: Any) -> None:
    with pytest.raises(ValidationError, match="share"):
        Config(share=given)


@pytest.mark.parametrize("count", [1, 2, 7, 28])
def test_a_share_is_spread_evenly_and_never_nothing(count: int) -> None:
    for part in range(1, 9):
        places = [n for n in range(count) if chosen(part / 8, n, count)]
        assert len(places) == -(-part * count // 8)
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert places[0] == 0 and (places[-1] < count - 1 or len(places) > count / 2)
    assert not any(chosen(False, n, count) for n in range(count)) and all(chosen(True, n, count) for n in range(count))


def _latte(share: Share) -> tuple[nn.Module, list[nn.Module], tuple[Any, ...]]:
    model = latte.Latte(latte.config_from_preset("latte_tiny", activation_checkpointing=share, channels=4))
    return model, list(model.blocks()), (torch.randn(1, 4, 2, 4, 4), torch.rand(1))


def _vae(share: Share) -> tuple[nn.Module, list[nn.Module], tuple[Any, ...]]:
    config = pv_vae.config_from_preset("pv_vae_tiny", activation_checkpointing=share, encoder_blocks=1)
    model = pv_vae.PVVAE(config)
    blocks = [block.branch for block in model.modules() if isinstance(block, pv_vae.ResBlock)]
    return model, blocks, (torch.randn(1, 3, 5, 32, 32),)


def _tats(share: Share) -> tuple[nn.Module, list[nn.Module], tuple[Any, ...]]:
    config = gpt.TATSConfig(depth=4, width=16, heads=2, codes=10, shape=(2, 2, 2), activation_checkpointing=share)
    model = gpt.TATS(config)
    return model, list(model.blocks()), (torch.zeros(1, 7, dtype=torch.long),)


def _memory(share: Share) -> tuple[nn.Module, list[nn.Module], tuple[Any, ...]]:
    config = dit_config.config_from_preset("memory_dit_tiny", activation_checkpointing=share, channels=4, memory="none")
    model = memory.MemoryDiT(config)
    return model, list(model.layers), (torch.randn(1, 4, 2, 4, 4), torch.rand(1), torch.arange(2))


def _remembering(share: Share) -> tuple[nn.Module, list[nn.Module], tuple[Any, ...]]:
    """All that a block may attend to: a memory and its states, which one sample has less of, and a text."""
    fields: dict[str, Any] = {"cross_attention": True, "rates": ("2x2x2",), "memory_widths": (4, 8), "memory_heads": 2}
    fields |= {"channels": 4, "history": 8, "text_width": 8, "text_empty": 1}
    config = dit_config.config_from_preset("memory_dit_tiny", activation_checkpointing=share, **fields)
    model = memory.MemoryDiT(config)
    past = Stretch(
        torch.randn(2, 4, 8, 4, 4), torch.randn(2, 4, 8, 2, 2), 0, torch.zeros(2, 8).bool(), torch.tensor([0, 4])
    )
    said = Condition(text=torch.randn(2, 3, 8), mask=torch.ones(2, 3).bool())
    seen = torch.tensor([[True, True], [False, True]])
    x, t, times = torch.randn(2, 4, 2, 4, 4), torch.rand(2), torch.arange(8, 10)
    return model, list(model.layers), (x, t, times, past, said, None, None, seen)


def _mavin(body: str) -> Any:
    def made(share: Share) -> tuple[nn.Module, list[nn.Module], tuple[Any, ...]]:
        small: dict[str, Any] = {"widths": (8,), "layers": 1, "groups": 4, "head_width": 8, "cross_width": 8}
        config = MavinConfig(body=body, depth=4, width=16, heads=2, activation_checkpointing=share, **small)
        model = mavin.Mavin(config)
        inner: Any = model.body
        blocks = (
            list(inner.layers) if body == "dit" else [part for part in inner.blocks() if isinstance(part, ResnetBlock)]
        )
        return inner, blocks, (torch.randn(1, config.inputs, 2, 4, 4), torch.rand(1, 2), torch.ones(1))

    return made


def _vqgan(share: Share) -> tuple[nn.Module, list[nn.Module], tuple[Any, ...]]:
    model = vqgan.VQGAN(vqgan.config_from_preset("vqgan_tiny", activation_checkpointing=share))
    blocks: list[Any] = list(model.blocks())
    return model, [block.branch for block in blocks], (torch.randn(1, 3, 4, 32, 32), False)


def _sound(share: Share) -> tuple[nn.Module, list[nn.Module], tuple[Any, ...]]:
    pictures = Spectrogram(rate=8000, rows=16, columns=8)
    model = sound.SoundVQGAN(sound.config_from_preset("sound_vqgan_tiny", pictures, activation_checkpointing=share))
    blocks: list[Any] = list(model.blocks())
    return model, [block.branch for block in blocks], (torch.randn(1, 1, 4, 16, 8), False)


def _encgan3(share: Share) -> tuple[nn.Module, list[nn.Module], tuple[Any, ...]]:
    model = encgan3.EncGAN3(encgan3_config.config_from_preset("encgan3_tiny", activation_checkpointing=share))
    size, frames = model.config.size, model.config.frames
    noise = torch.randn(1, 4, model.config.content + model.config.movement)
    video, differences = torch.randn(1, frames, 3, size, size), torch.randn(1, frames - 1, 3, size, size)
    streams: list[Any] = list(model.generator.blocks)
    inside = [model.content.steps, model.movement.steps, *(block.video_space for block in streams)]
    return model, inside, (video, differences, noise)


FAMILIES = {
    "latte": _latte,
    "pv_vae": _vae,
    "tats": _tats,
    "memory": _memory,
    "remembering": _remembering,
    "mavin": _mavin("dit"),
    "mavin_unet": _mavin("unet"),
    "vqgan": _vqgan,
    "sound_vqgan": _sound,
    "encgan3": _encgan3,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_blocks_run_twice_and_the_gradients_stay(family: str) -> None:
    gradients = []
    for share in (False, 0.5, True):
        torch.manual_seed(0)
        model, blocks, inputs = FAMILIES[family](share)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        calls = dict.fromkeys(range(len(blocks)), 0)
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, n=number, calls=calls: calls.update({n: calls[n] + 1}))
        torch.manual_seed(1)
        out = model.train()(*inputs, **({"last": 7} if family == "tats" else {}))
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        twice = [n for n, count in calls.items() if count == 2]
        assert len(twice) == -(-len(blocks) * float(share) // 1), (share, calls)
    for plain, half, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(half, plain, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(whole, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_compiled_whole_and_recomputed_so(family: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, _, inputs = FAMILIES[family](True)
    compiled = list[int]()
    blocks: Any = model.train().blocks()  # type: ignore[operator]
    for number, block in enumerate(blocks):

        def backend(graph: Any, _: Any, number: int = number) -> Any:
            compiled.append(number)
            return graph.forward

        # a break is an error
        block.compile(backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=512):
        out = model(*inputs, **({"last": 7} if family == "tats" else {}))
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    # blocks of one code and one set of guards share a graph
    assert set(compiled) >= _first_of_each_class(model)


def _first_of_each_class(model: nn.Module) -> set[int]:
    classes = list(map(type, model.blocks()))  # type: ignore[operator]
    return {classes.index(kind) for kind in classes}
