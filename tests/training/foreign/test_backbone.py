"""Transformers of diffusers as velocities of our flow: equal to their classes, in all that a backbone adds to them too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_foreign
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from longtake.training.config import LoraConfig
from longtake.training.engines import lora
from longtake.training.foreign.backbone import Backbone, BackboneConfig, Front
from longtake.training.models.common.condition import Condition

TEXT = tiny_foreign.TEXT
WAN, LTX, HUNYUAN = "WanTransformer3DModel", "LTXVideoTransformer3DModel", "HunyuanVideoTransformer3DModel"
SETTINGS = {WAN: tiny_foreign.WAN, LTX: tiny_foreign.LTX, HUNYUAN: tiny_foreign.HUNYUAN}
CLASSES = pytest.mark.parametrize("name", [WAN, LTX, HUNYUAN])
LENGTHS = (3, 6)  # tokens of the two texts


def backbone(name: str, settings: dict[str, Any] | None = None, **fields: Any) -> Backbone:
    """A tiny backbone with random weights, which knows the states of ""."""
    made = Backbone(BackboneConfig(class_name=name, settings=settings or SETTINGS[name], **fields)).eval()
    made.net.load_state_dict(tiny_foreign.of_class(name, settings or SETTINGS[name]).state_dict())
    generator = torch.Generator().manual_seed(9)
    vector = made.config.sizes.pooled_width
    pooled = torch.randn(vector, generator=generator) if vector else None
    made.set_empty(torch.randn(2, TEXT, generator=generator), pooled)
    return made


class Batch:
    """Two windows of 3 latents of 2 x 4 or 4 x 6 positions, at other times and with texts of other lengths."""

    def __init__(self, made: Backbone) -> None:
        generator, sizes = torch.Generator().manual_seed(1), made.config.sizes
        self.x = torch.randn(2, sizes.channels, 3, 4, 6, generator=generator)
        self.t = torch.tensor([0.3, 0.85])
        text = torch.randn(2, max(LENGTHS), TEXT, generator=generator)
        self.condition = Condition(None, text, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None])
        self.more: dict[str, Any] = {}
        if made.config.class_name == LTX:
            self.more["fps"] = 25.0
        if sizes.pooled_width:
            self.more["pooled"] = torch.randn(2, sizes.pooled_width, generator=generator)

    def __call__(self, made: Backbone, **changes: Any) -> Tensor:
        given = {"x": self.x, "t": self.t, "condition": self.condition, **self.more, **changes}
        velocity: Tensor = made(given.pop("x"), given.pop("t"), given.pop("condition"), **given)
        return velocity


def by_class(made: Backbone, batch: Batch) -> Tensor:
    """What the class itself makes of a batch, called as its pipeline calls it."""
    text, mask = batch.condition.text, batch.condition.mask
    assert text is not None and mask is not None
    x, t, net = batch.x, 1000 * batch.t, tiny_foreign.of_class(made.config.class_name, made.config.settings)
    if made.config.class_name == WAN:
        padded = F.pad(torch.where(mask[..., None], text, 0.0), (0, 0, 0, 512 - text.shape[1]))
        return net(x, t, padded, return_dict=False)[0]  # type: ignore[no-any-return]
    # what is behind the end of a text is masked, whatever it is
    text = torch.where(mask[..., None], text, 7.0)
    if made.config.class_name == HUNYUAN:
        guidance = torch.full((2,), 6000.0)
        return net(x, t, text, mask.float(), batch.more["pooled"], guidance, return_dict=False)[0]  # type: ignore[no-any-return]
    packed, scale = x.flatten(2).transpose(1, 2), (8 / 25.0, 32, 32)
    made_of = net(
        packed, text, t, mask, num_frames=3, height=4, width=6, rope_interpolation_scale=scale, return_dict=False
    )
    return made_of[0].transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@CLASSES
@torch.no_grad()
def test_the_velocity_is_that_of_the_class(name: str) -> None:
    made = backbone(name)
    batch = Batch(made)
    more = {"guidance": 6.0} if name == HUNYUAN else {}
    velocity = batch(made, **more)
    assert largest(velocity, by_class(made, batch)) < 1e-5 < velocity.std()
    # each sample alone is the same
    text, mask = batch.condition.text, batch.condition.mask
    assert text is not None and mask is not None
    for n, length in enumerate(LENGTHS):
        one = Condition(None, text[n : n + 1, :length], mask[n : n + 1, :length])
        pooled = {"pooled": batch.more["pooled"][n : n + 1]} if "pooled" in batch.more else {}
        alone = batch(made, x=batch.x[n : n + 1], t=batch.t[n : n + 1], condition=one, **more, **pooled)
        assert largest(alone, velocity[n : n + 1]) < 1e-5


@CLASSES
@torch.no_grad()
def test_latents_may_have_times_of_their_own(name: str) -> None:
    made = backbone(name)
    batch = Batch(made)
    velocity, each = batch(made), batch.t[:, None].repeat(1, 3)
    assert largest(batch(made, t=each), velocity) < 1e-5
    # the samples have other numbers of clean latents
    each[0, 0] = each[1, :2] = 0
    other = batch(made, t=each)
    assert largest(other, velocity) > 0.01
    for n, count in enumerate((1, 2)):
        pooled = {"pooled": batch.more["pooled"][n : n + 1]} if "pooled" in batch.more else {}
        text, mask = batch.condition.text, batch.condition.mask
        assert text is not None and mask is not None
        one = Condition(None, text[n : n + 1], mask[n : n + 1])
        noisy = batch.x[n : n + 1].clone()
        noisy[:, :, :count] = 5.0
        given = {"x": noisy, "image": batch.x[n : n + 1, :, :count], "condition": one, **pooled}
        assert largest(batch(made, t=batch.t[n : n + 1], **given), other[n : n + 1]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", [WAN, HUNYUAN])
def test_tokens_in_front_are_like_clean_latents_before_the_window(name: str) -> None:
    made = backbone(name)
    batch = Batch(made)
    assert largest(batch(made, places=torch.arange(3)), batch(made)) < 1e-5
    _, rows, columns = (side // size for side, size in zip(batch.x.shape[2:], made.config.patch, strict=True))
    grid = torch.meshgrid(torch.arange(1), torch.arange(rows), torch.arange(columns), indexing="ij")
    ahead = Front(made.tokens(batch.x[:, :, :1]), torch.stack(grid, dim=-1).flatten(0, 2))
    times = batch.t[:, None].repeat(1, 3)
    noisy = times.clone()
    times[:, 0] = 0
    # those of Wan attend to no text
    given: dict[str, Any] = {"condition": None} | ({"pooled": None} if "pooled" in batch.more else {})
    behind = {"x": batch.x[:, :, 1:], "places": torch.tensor([1, 2]), **given}
    clean, level = batch(made, t=times, **given)[:, :, 1:], batch(made, t=noisy, **given)[:, :, 1:]
    assert largest(batch(made, front=ahead, **behind), clean) < 1e-5
    assert largest(batch(made, front=ahead._replace(time=batch.t), **behind), level) < 1e-5 < largest(clean, level)


@CLASSES
@torch.no_grad()
def test_no_text_is_the_empty_one_and_training_hides_some(name: str) -> None:
    made = backbone(name, text_dropout=1.0)
    batch = Batch(made)
    empty = Condition(None, made.empty.expand(2, -1, -1), torch.ones(2, 2, dtype=torch.bool))
    vectors = {} if made.empty_pooled is None else {"pooled": made.empty_pooled.expand(2, -1)}
    wanted = batch(made, condition=empty, **vectors)
    none = dict.fromkeys(vectors)
    assert largest(batch(made, condition=None, **none), wanted) < 1e-5
    assert largest(batch(made, condition=batch.condition.null), wanted) < 1e-5
    assert largest(batch(made), wanted) > 0.01
    assert largest(batch(made.train()), wanted) < 1e-5
    unknown = Backbone(BackboneConfig(class_name=name, settings=SETTINGS[name]))
    with pytest.raises(ValueError, match='text: this model does not know the states of ""'):
        batch(unknown, condition=None, **none)


@CLASSES
def test_bf16_keeps_in_fp32_what_the_class_keeps(name: str, tmp_path: Path) -> None:
    made = backbone(name)
    made.net.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = type(made.net).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)  # type: ignore[attr-defined]
    made.to(torch.bfloat16)
    assert made.dtype == torch.bfloat16
    types = {f"net.{key}": value.dtype for key, value in loaded.named_parameters()}
    assert {key: value.dtype for key, value in made.named_parameters()} == types
    assert (torch.float32 in types.values()) == (name == WAN)
    for key, value in loaded.named_parameters():
        assert torch.equal(value, made.get_parameter(f"net.{key}")), key
    with torch.no_grad():
        velocity = Batch(made)(made)
    assert velocity.dtype == torch.bfloat16 and velocity.isfinite().all()


@CLASSES
def test_checkpointing_recomputes_blocks_in_training_and_changes_no_gradient(name: str) -> None:
    gradients, calls = [], []
    for saves in (False, 0.5, True):
        made = backbone(name, activation_checkpointing=saves, text_dropout=0.0).train()
        counted = [0]

        def count(*_: Any, counted: list[int] = counted) -> None:
            counted[0] += 1

        for block in made.blocks():
            block.register_forward_pre_hook(count)
        batch = Batch(made)
        each = batch.t[:, None].repeat(1, 3) * torch.tensor([0.0, 1.0, 1.0])
        batch(made, t=each).square().mean().backward()
        gradients.append({key: value.grad for key, value in made.named_parameters()})
        calls.append(counted[0] / len(list(made.blocks())))
        assert all(gradient is not None for gradient in gradients[-1].values())
        with torch.no_grad():
            batch(made.eval())
    assert calls[0] == 1 < calls[1] < calls[2] == 2
    for key, gradient in gradients[0].items():
        assert all(torch.allclose(gradient, other[key], atol=1e-6) for other in gradients[1:]), key


@CLASSES
def test_blocks_of_a_class_share_graphs_without_a_break_also_when_they_are_recomputed(name: str) -> None:
    torch._dynamo.reset()
    deep = {"num_layers": 4} | ({"num_single_layers": 4} if name == HUNYUAN else {})
    made = backbone(name, SETTINGS[name] | deep, activation_checkpointing=True, text_dropout=0.0).train()
    batch, graphs = Batch(made), list[Any]()

    def backend(graph: Any, _: Any) -> Any:
        # that of a hook which adds nothing hands its tokens on
        graphs.extend([graph] if any(node.op.startswith("call") for node in graph.graph.nodes) else [])
        return graph.forward

    each = batch.t[:, None] * torch.tensor([0.0, 1.0, 1.0])
    plain = [batch(made).detach(), batch(made, t=each).detach()]
    blocks = list(made.blocks())
    for block in blocks:
        # a break is an error
        block.compile(backend=backend, fullgraph=True)
    # latents with times of their own are another graph
    for number, t in enumerate((batch.t, each), 1):
        velocity = batch(made, t=t)
        velocity.square().mean().backward()
        assert largest(velocity.detach(), plain[number - 1]) < 1e-5
        # behind the first block of a class tokens may lie otherwise in memory
        assert len(graphs) <= 2 * number * len(set(map(type, blocks)))
    torch._dynamo.reset()


@CLASSES
def test_low_rank_changes_have_targets_by_default(name: str) -> None:
    made = backbone(name)
    told = lora.attach(made, LoraConfig(rank=2, targets=made.lora_targets))
    blocks = len(list(made.blocks()))
    changed = [key for key, _ in made.named_parameters() if key.endswith("lora_down.weight")]
    assert f"{len(changed)} layers" in told and len(changed) >= 4 * blocks
    for parts in {key.split(".lora_down")[0] for key in changed}:
        assert "blocks" in parts
    # a change is of the dtype of its layer, also in what stays fp32
    assert made.to(torch.bfloat16).dtype == torch.bfloat16


def test_a_start_image_has_channels_of_its_own() -> None:
    made, net = backbone(WAN, tiny_foreign.WAN_I2V_21), tiny_foreign.tiny_wan_i2v_transformer(**tiny_foreign.WAN_I2V_21)
    batch, sizes = Batch(made), made.config.sizes
    assert (sizes.channels, sizes.image_channels, sizes.image_width) == (4, 8, 16)
    image, looks = torch.randn(2, 4, 3, 4, 6), torch.randn(2, 5, 16)
    mask = torch.zeros(2, 4, 3, 4, 6)
    mask[:, :, 0] = 1
    text = F.pad(torch.where(batch.condition.mask[..., None], batch.condition.text, 0.0), (0, 0, 0, 506))  # type: ignore[index,arg-type]
    with torch.no_grad():
        wanted = net(torch.cat([batch.x, mask, image], dim=1), 1000 * batch.t, text, looks, return_dict=False)[0]
        assert largest(batch(made, image=image, image_states=looks), wanted) < 1e-5
    with pytest.raises(ValueError, match="image: this model goes on from a start image; give its latents"):
        batch(made, image_states=looks)
    with pytest.raises(ValueError, match="image_states: this model attends to the states of its start image"):
        batch(made, image=image)


def test_the_shift_is_that_of_the_pipeline() -> None:
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    dynamic = tiny_foreign.SCHEDULERS["ltx"]
    ltx = Backbone(BackboneConfig(class_name=LTX, settings=tiny_foreign.LTX, scheduler=dynamic))
    mu = calculate_shift(5 * 6 * 7, 1024, 4096, 0.95, 2.05)
    assert ltx.shift_of((5, 6, 7)) == pytest.approx(torch.tensor(mu).exp().item(), rel=1e-6)
    linear = BackboneConfig(
        class_name=LTX, settings=tiny_foreign.LTX, scheduler=dynamic | {"time_shift_type": "linear"}
    )
    assert linear.shift_of((5, 6, 7)) == pytest.approx(mu)
    for scheduler, shift in (({}, 1.0), ({"shift": 7.0}, 7.0), ({"flow_shift": 3.0}, 3.0)):
        assert (
            BackboneConfig(class_name=WAN, settings=tiny_foreign.WAN, scheduler=scheduler).shift_of((5, 6, 8)) == shift
        )


def test_positions_in_seconds_follow_the_frame_rate_of_each_sample() -> None:
    made = backbone(LTX)
    batch = Batch(made)
    with torch.no_grad():
        both = batch(made, fps=torch.tensor([24.0, 12.0]))
        assert (
            largest(both[:1], batch(made, fps=24.0)[:1]) < 1e-5 and largest(both[1:], batch(made, fps=12.0)[1:]) < 1e-5
        )
        assert largest(both[:1], batch(made, fps=12.0)[:1]) > 1e-3
    with pytest.raises(ValueError, match="fps: positions of this model are in seconds; give the frame rate"):
        batch(made, fps=None)


def test_a_module_without_memory_has_its_positions() -> None:
    config = BackboneConfig(class_name=WAN, settings=tiny_foreign.WAN)
    with torch.device("meta"):
        made = Backbone(config)
    rope: Any = made.net.rope
    assert rope.freqs_cos.device.type == "cpu" and next(made.parameters()).is_meta
    assert torch.equal(rope.freqs_cos, backbone(WAN).net.rope.freqs_cos)  # type: ignore[union-attr]


REFUSED: dict[str, Callable[[Batch, Backbone], Any]] = {
    r"x has shape .*; this model needs \(B, 4, T, H, W\)": lambda b, m: b(m, x=b.x[:, :3]),
    r"T, H and W in multiples of \(1, 2, 2\)": lambda b, m: b(m, x=b.x[..., :5]),
    r"t has shape \(2, 2\); it needs \(2,\) or \(2, 3\)": lambda b, m: b(m, t=torch.zeros(2, 2)),
    "text has shape": lambda b, m: b(m, condition=Condition(None, torch.zeros(2, 3, 8), torch.ones(2, 3).bool())),
    "text has 513 tokens; this model takes 512": lambda b, m: b(
        m, condition=Condition(None, torch.zeros(2, 513, TEXT), torch.ones(2, 513).bool())
    ),
    "class: this model takes neither classes": lambda b, m: b(m, condition=Condition(torch.tensor([1, 2]))),
    "pooled: this model takes no vector": lambda b, m: b(m, pooled=torch.zeros(2, 3)),
    "image has shape": lambda b, m: b(m, image=torch.zeros(2, 4, 1, 2, 2)),
    "image_states: this model attends to none": lambda b, m: b(m, image_states=torch.zeros(2, 4, 16)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_class_does_not_take_is_refused(message: str) -> None:
    made = backbone(WAN)
    with pytest.raises(ValueError, match=message):
        REFUSED[message](Batch(made), made)


@torch.no_grad()
@pytest.mark.parametrize("name", [WAN, HUNYUAN])
def test_samples_may_have_positions_of_their_own(name: str) -> None:
    made = backbone(name)
    batch = Batch(made)
    places = torch.tensor([[0, 1, 2], [3, 7, 11]])
    both = batch(made, places=places)
    for n in (0, 1):
        alike = batch(made, places=places[n])
        assert largest(both[n], alike[n]) < 1e-5 < largest(both[1 - n], alike[1 - n])


def test_a_class_that_takes_no_memory_says_so() -> None:
    made = backbone(LTX)
    batch = Batch(made)
    with pytest.raises(ValueError, match=r"places: .* takes no memory; leave it out"):
        batch(made, places=torch.arange(3))
    with pytest.raises(ValueError, match=r"present: .* takes no memory; leave it out"):
        batch(made, present=torch.ones(2, 3, dtype=torch.bool))


def test_a_model_that_takes_a_vector_of_each_text_needs_it() -> None:
    made = backbone(HUNYUAN)
    with pytest.raises(
        ValueError, match="pooled: this model needs a vector of each text beside its states; give pooled"
    ):
        Batch(made)(made, pooled=None)
    with pytest.raises(ValueError, match="pooled: a text of this model has a vector of 32 beside its states"):
        made.set_empty(torch.zeros(1, TEXT))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_name": "FluxTransformer2DModel"}, "is no video transformer known here"),
        ({"scheduler": {"num_train_timesteps": 10**12}}, "num_train_timesteps is '1000000000000'; it must be a number"),
        ({"scheduler": {"shift": "3"}}, "scheduler: shift is '3'; it must be a number above 0"),
        ({"scheduler": {"max_image_seq_len": 256}}, "base_image_seq_len and max_image_seq_len are the same"),
        ({"expert": "high"}, "expert: high has no range; give boundary"),
        ({"class_name": LTX, "settings": {"patch_size": 2}}, "patch_size is 2; LTX has tokens of one latent"),
        ({"class_name": HUNYUAN, "settings": {"image_condition_type": "latent_concat"}}, "HunyuanVideo from an image"),
    ],
)
def test_a_config_that_is_not_known_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BackboneConfig(**{"class_name": WAN, "settings": tiny_foreign.WAN, **fields})
