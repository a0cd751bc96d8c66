"""A transformer of diffusers with a memory: without one it is the class's own, and what reaches what with one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_foreign
import torch
from torch import Tensor, nn

from longtake.training.foreign.backbone import BackboneConfig
from longtake.training.foreign.backbone_wan import _rotation
from longtake.training.foreign.load import codec_of
from longtake.training.models.common import story
from longtake.training.models.common.condition import Condition
from longtake.training.models.common.streaming import Past
from longtake.training.models.memory.foreign import MemoryBackbone, MemoryBackboneConfig
from longtake.training.models.memory.pushes import pushes_of
from longtake.training.models.memory.stretch import Stretch
from longtake.training.models.memory.tokens import Memory, cropped, joined

pytestmark = pytest.mark.usefixtures("one_thread")

C, WIDTH, LENGTH = tiny_foreign.C, tiny_foreign.TEXT, 8
SMALL: dict[str, Any] = {
    "rates": ("2x2x2",),
    "memory_widths": (8, 16),
    "memory_heads": 2,
    "history": 8,
    "shape": (2, 8, 8),
    "window": 2,
    "cross_attention": True,
}
T, TIMES = torch.tensor([0.3, 0.8]), torch.tensor([8, 9, 10])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WAN, HUNYUAN = "WanTransformer3DModel", "HunyuanVideoTransformer3DModel"
SETTINGS = {WAN: tiny_foreign.WAN, HUNYUAN: tiny_foreign.HUNYUAN}


def config(class_name: str = WAN, **changes: Any) -> MemoryBackboneConfig:
    backbone = BackboneConfig(class_name=class_name, settings=SETTINGS[class_name], text_length=LENGTH, text_empty=2)
    return MemoryBackboneConfig(**SMALL | {"backbone": backbone} | changes)


def awake(class_name: str = WAN, **changes: Any) -> MemoryBackbone:
    """A model whose every weight counts, in evaluation mode."""
    torch.manual_seed(0)
    model = MemoryBackbone(config(class_name, **changes))
    model.backbone.net.load_state_dict(tiny_foreign.of_class(class_name, SETTINGS[class_name]).state_dict())
    for parameter in [*model.memory.parameters(), *model.cross.parameters()]:
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    model.set_empty(drawn(2, WIDTH, seed=9), drawn(tiny_foreign.POOLED, seed=8) if class_name == HUNYUAN else None)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> MemoryBackbone:
    return awake()


@pytest.fixture(scope="module", params=[WAN, HUNYUAN])
def either(request: pytest.FixtureRequest) -> MemoryBackbone:
    return awake(request.param)


def history(count: int = 8) -> tuple[Tensor, Tensor]:
    return drawn(2, C, count, 8, 8, seed=1), drawn(2, C, count, 4, 4, seed=2)


def text(count: int = 3) -> Condition:
    return Condition(text=drawn(2, count, WIDTH, seed=3), mask=torch.ones(2, count, dtype=torch.bool))


def told(model: MemoryBackbone, count: int = 3) -> Condition:
    """A text, with its vector where the model takes one."""
    vectors = drawn(2, tiny_foreign.POOLED, seed=4) if model.backbone.config.sizes.pooled_width else None
    return replace(text(count), pooled=vectors)


def close(made: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(made, expected, rtol=0, atol=atol)


def differs(made: Tensor, other: Tensor) -> bool:
    return not torch.allclose(made, other, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("by_latent", [False, True])
def test_without_a_memory_it_is_the_class_itself(model: MemoryBackbone, by_latent: bool) -> None:
    x, said = drawn(2, C, 3, 8, 8), text()
    t = torch.tensor([[0.0, 0.3, 0.3], [0.0, 0.8, 0.8]]) if by_latent else T
    assert said.text is not None
    states = torch.cat([said.text, torch.zeros(2, LENGTH - 3, WIDTH)], dim=1)
    timestep = 1000 * (t.repeat_interleave(16, dim=1) if by_latent else t)
    own = tiny_foreign.tiny_wan_transformer()
    expected = own(x, timestep, states, return_dict=False)[0]
    close(model(x, t, torch.arange(3), None, said), expected)
    close(model.normalise(x), x, 0)
    close(model.denormalise(model.normalise_low(x)), x, 0)


def test_the_rotation_is_the_class_s_own_and_goes_on_between_its_places(model: MemoryBackbone) -> None:
    rope: Any = model.backbone.net.rope
    grid = torch.cartesian_prod(*(torch.arange(n).double() for n in (5, 4, 3)))
    for made, own in zip(_rotation(grid[None], rope), rope(torch.empty(1, C, 5, 8, 6)), strict=True):
        close(made, own, 1e-6)
    half, ends = (_rotation(torch.tensor([[places]]).double(), rope)[0] for places in ([2.5, 1.5, 0.5], [2.0, 1, 0]))
    angle = torch.tensor(2.5).cos()
    assert half[0, 0, 0, 0] == pytest.approx(float(angle), abs=1e-6) and differs(half, ends)


@torch.no_grad()
def test_only_differences_of_times_count_and_order_does_not(either: MemoryBackbone) -> None:
    model = either
    x, memory = drawn(2, C, 3, 8, 8), model.remember(*history())
    made = model(x, T, TIMES, memory, told(model))
    later = memory._replace(positions=memory.positions + torch.tensor([40.0, 0, 0]))
    close(model(x, T, TIMES + 40, later, told(model)), made, 1e-4)
    assert differs(model(x, T, TIMES + 3, memory, told(model)), made)
    order = torch.tensor([2, 0, 1])
    close(model(x[:, :, order], T, TIMES[order], memory, told(model)), made[:, :, order])


@torch.no_grad()
def test_a_memory_reaches_the_velocity_by_its_tokens_its_states_and_their_places(either: MemoryBackbone) -> None:
    model = either
    x, memory = drawn(2, C, 3, 8, 8), model.remember(*history())
    assert memory.tokens.shape == (2, 4 * 2 * 2, 24) == (2, model.config.tokens((8, 8, 8)), model.config.width)
    made = model(x, T, TIMES, memory, told(model))
    assert made.shape == x.shape
    for changed in (
        memory._replace(tokens=memory.tokens.flip(2)),
        memory._replace(hidden=memory.hidden + 1),
        memory._replace(positions=memory.positions + torch.tensor([0, 0.5, 0])),
        None,
    ):
        assert differs(model(x, T, TIMES, changed, told(model)), made)
    close(model(x, T, TIMES, cropped(memory, 99), told(model)), model(x, T, TIMES, None, told(model)))
    close(model(x, T, TIMES, Stretch(*history(), 0, torch.zeros(2, 8, dtype=torch.bool)), told(model)), made)
    assert differs(model(x, T, TIMES, memory, told(model), level=torch.tensor([0.4, 0.4])), made)


@torch.no_grad()
def test_what_a_sample_does_not_have_is_not_seen(either: MemoryBackbone) -> None:
    model = either
    x, (high, low) = drawn(2, C, 3, 8, 8), history()
    seen = torch.tensor([[True, True, True], [False, True, True]])
    memory = model.remember(high, low, skip=torch.tensor([0, 4]))
    made = model(x, T, TIMES, memory, told(model), seen=seen)
    poked, past = x.clone(), high.clone()
    poked[1, :, 0] += 5
    past[1, :, :4] += 5
    changed = model.remember(past, low, skip=torch.tensor([0, 4]))
    close(model(poked, T, TIMES, changed, told(model), seen=seen)[1, :, 1:], made[1, :, 1:])
    alone = model.remember(high[1:, :, 4:], low[1:, :, 4:], 4)
    whole = told(model)
    said = Condition(*(None if part is None else part[1:] for part in (None, whole.text, whole.mask)))
    said = replace(said, pooled=None if whole.pooled is None else whole.pooled[1:])
    close(model(x[1:, :, 1:], T[1:], TIMES[1:], alone, said), made[1:, :, 1:], 1e-4)
    assert differs(model(poked, T, TIMES, changed, told(model))[1, :, 1:], made[1, :, 1:])


@torch.no_grad()
def test_a_memory_in_chunks_is_that_of_the_whole(model: MemoryBackbone) -> None:
    high, low = history()
    whole, pasts = model.remember(high, low), [Past() for _ in model.memory]
    chunks = [model.remember(high[:, :, i : i + 2], low[:, :, i : i + 2], i, pasts) for i in range(0, 8, 2)]
    made: Memory = joined(chunks)
    for name in ("tokens", "positions", "hidden"):
        close(getattr(made, name), getattr(whole, name))


@torch.no_grad()
def test_each_latent_sees_its_own_text_and_the_memory_sees_none(model: MemoryBackbone) -> None:
    x, memory, one, two = drawn(2, C, 3, 8, 8), model.remember(*history()), text(3), text(4)
    made = model(x, T, TIMES, memory, one)
    assert differs(model(x, T, TIMES, memory, two), made) and differs(model(x, T, TIMES, memory), made)
    states = torch.cat([one.text, two.text], dim=1)  # type: ignore[list-item]
    mask = torch.zeros(2, 3, 7, dtype=torch.bool)
    mask[:, :, :3] = True
    # all latents see the first text, as if it were alone; in another order of the states, too
    order = torch.tensor([4, 5, 6, 3, 0, 2, 1])
    close(model(x, T, TIMES, memory, Condition(text=states, mask=mask)), made)
    mask[:, 2] = False
    without = model(x, T, TIMES, memory, Condition(text=states, mask=mask))
    close(model(x, T, TIMES, memory, Condition(text=states[:, order], mask=mask[..., order])), without)
    assert differs(without, made)
    # a block's memory attends to the text "" alone, whatever the window sees
    seen = list[Tensor]()
    handle = model.backbone.net.blocks[0].register_forward_hook(lambda _, __, out: seen.append(out[:, :16]))  # type: ignore[operator, union-attr, index]
    model.backbone.net.blocks[0].attn1.register_forward_hook(lambda _, __, out: out * 0)  # type: ignore[union-attr, index, operator]
    model(x, T, TIMES, memory, one), model(x, T, TIMES, memory, two)
    handle.remove()
    model.backbone.net.blocks[0].attn1._forward_hooks.clear()  # type: ignore[union-attr, index]
    close(seen[0], seen[1], 0)


@torch.no_grad()
def test_without_a_memory_hunyuan_is_the_class_itself() -> None:
    model = awake(HUNYUAN)
    x, said = drawn(2, C, 3, 8, 8), told(model)
    settings = {
        "encoder_hidden_states": said.text,
        "encoder_attention_mask": said.mask,
        "pooled_projections": said.pooled,
    }
    own = tiny_foreign.tiny_hunyuan_transformer()
    expected = own(x, 1000 * T, **settings, guidance=torch.full((2,), 1000.0), return_dict=False)[0]
    close(model(x, T, torch.arange(3), None, said), expected)
    close(model(x, T, torch.arange(3).expand(2, -1), None, said, seen=torch.ones(2, 3, dtype=torch.bool)), expected)


def test_a_text_with_a_vector_is_that_of_a_whole_segment() -> None:
    one, two = (told(awake(HUNYUAN), count) for count in (3, 4))
    assert story.seen([(0, one), (2, two)], 0, range(4)) is one
    assert story.seen([(0, text(3)), (2, text(4))], 0, range(4)).mask.ndim == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("class_name", [WAN, HUNYUAN])
def test_recomputed_blocks_have_the_same_gradients(class_name: str) -> None:
    grads = list[dict[str, Tensor]]()
    for again in (False, True):
        model = awake(class_name, activation_checkpointing=again).train()
        memory = Stretch(*history(), 0, torch.zeros(2, 8, dtype=torch.bool), torch.tensor([0, 2]))
        rng = torch.Generator().manual_seed(0)
        seen = torch.tensor([[True, True, True], [False, True, True]])
        model(drawn(2, C, 3, 8, 8), T, TIMES, memory, told(model), rng, seen=seen).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any(name.startswith("cross.") for name in grads[0])
    for name, grad in grads[0].items():
        close(grads[1][name], grad)
    assert all(grad.abs().max() > 0 for name, grad in grads[0].items() if name.startswith(("memory.", "cross.")))


@pytest.mark.slow
@pytest.mark.parametrize(("class_name", "count"), [(WAN, 2), (HUNYUAN, 5)])
def test_blocks_share_graphs_without_a_break_and_the_attention_of_each_to_a_memory_too(
    class_name: str, count: int
) -> None:
    model, graphs = awake(class_name, activation_checkpointing=True).train(), list[Any]()
    memory = Stretch(*history(), 0, torch.zeros(2, 8, dtype=torch.bool), torch.tensor([0, 2]))
    seen = torch.tensor([[True, True, True], [False, True, True]])
    given = (drawn(2, C, 3, 8, 8), T, TIMES, memory, told(model))

    def made() -> Tensor:
        return model(*given, torch.Generator().manual_seed(0), seen=seen)

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plain = made()
    blocks = list(model.blocks())
    for block in blocks:
        # a break is an error
        block.compile(backend=backend, fullgraph=True)
    velocity = made()
    close(velocity, plain)
    velocity.square().mean().backward()
    assert all(cross.out.weight.grad.any() for cross in model.cross)  # type: ignore[union-attr, operator]
    # of each class, and the attention behind it; behind HunyuanVideo's first blocks tokens lie otherwise in memory
    assert len(graphs) == count
    torch._dynamo.reset()


@torch.no_grad()
def test_a_copy_has_attention_of_its_own(model: MemoryBackbone) -> None:
    twin = copy.deepcopy(model)
    x, memory = drawn(2, C, 3, 8, 8), model.remember(*history())
    before = model(x, T, TIMES, memory, text())
    for cross in twin.cross:
        nn.init.normal_(cross.out.weight)  # type: ignore[union-attr, arg-type]
    close(model(x, T, TIMES, memory, text()), before, 0)
    assert differs(twin(x, T, TIMES, memory, text()), before)


@pytest.mark.parametrize("memory", ["patchify", "framepack", "none"])
@torch.no_grad()
def test_what_memories_are_compared_with_works_too(memory: str) -> None:
    model = awake(memory=memory, cross_attention=False)
    made = model.remember(history()[0])
    assert made.tokens.shape[1] == model.config.tokens((8, 8, 8))
    velocity = model(drawn(2, C, 3, 8, 8), T, TIMES, made, text())
    assert differs(velocity, model(drawn(2, C, 3, 8, 8), T, TIMES, None, text())) == (memory != "none")
    if memory == "framepack":
        # the newest latent is packed as the class embeds it
        fresh = MemoryBackbone(model.config, model.backbone)
        own = model.backbone.tokens(history()[0][:, :, 7:])
        close(fresh.remember(history()[0]).tokens[:, -own.shape[1] :], own)


def test_half_precision_keeps_the_class_s_fp32_weights_and_says_nearly_the_same(model: MemoryBackbone) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept and all("time_embedder" in name or "norm" in name or "scale_shift" in name for name in kept)
    with torch.no_grad():
        made, expected = (
            m(drawn(2, C, 3, 8, 8), T, TIMES, m.remember(*history()), text()).float() for m in (half, model)
        )
    assert (made - expected).abs().mean() < 0.1 * expected.abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("vae", [tiny_foreign.tiny_hunyuan_vae, tiny_foreign.tiny_wan_vae])
def test_a_film_grows_by_the_frames_that_its_last_latents_give(vae: Any, tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path / "vae")
    codec: Any = codec_of(tmp_path / "vae")[0]
    decode, encode = pushes_of(codec, None)
    latents = drawn(1, C, 5, 4, 4)
    parts = [decode(latent) for latent in latents.split(1, dim=2)]
    assert [part.shape[2] for part in parts] == [1, 4, 4, 4, 4]
    close(parts[0], codec.decode(latents[:, :, :1]))
    close(parts[-1], codec.decode(latents)[:, :, -4:])
    made = [encode(part) for part in parts]
    assert [latent.shape[2] for latent in made] == [1] * 5
    close(made[-1], codec.encode(torch.cat(parts, dim=2)).mode()[:, :, -1:], 1e-4)
    # and goes on: of one that is asked again the oldest latent is left out
    last = decode(drawn(1, C, 1, 4, 4, seed=7))
    seen = torch.cat([latents[:, :, 0 if codec.immediate else 1 :], drawn(1, C, 1, 4, 4, seed=7)], dim=2)
    close(last, codec.decode(seen)[:, :, -4:])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"settings": tiny_foreign.WAN_I2V}, "it goes on from a start image"),
    ({"settings": tiny_foreign.WAN | {"patch_size": [2, 2, 2]}}, "its tokens stand for 2x2x2 latents"),
    ({"expert": "high", "boundary": 0.9}, "it is the high-noise expert of two"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_a_transformer_that_takes_no_memory_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(backbone={"class_name": "WanTransformer3DModel", "settings": tiny_foreign.WAN} | changes)
