"""The row of LTXVideoTransformer3DModel: tokens in one sequence, a mask of the text, positions in seconds and pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from longtake.training.foreign.backbone_config import BackboneConfig, Sizes
from longtake.training.foreign.backbone_inputs import Inputs, held, token_times

TEXT_LENGTH = 128
STRIDE = (8, 32)
EVEN_TIMES = True
TARGETS = (
    r"net\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)",
    r"net\.transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
)


def sizes(settings: Mapping[str, Any]) -> Sizes:
    for name in ("patch_size", "patch_size_t"):
        if settings.get(name, 1) != 1:
            raise ValueError(f"settings: {name} is {settings[name]!r}; LTX has tokens of one latent")
    return Sizes(
        channels=int(settings.get("in_channels", 128)),
        text_width=int(settings.get("caption_channels", 4096)),
        width=int(settings.get("num_attention_heads", 32) * settings.get("attention_head_dim", 64)),
        patch=(1, 1, 1),
    )


def build(make: Callable[..., Any], settings: Mapping[str, Any]) -> nn.Module:
    net: nn.Module = make(**settings)
    return net


def blocks(net: Any) -> Iterator[nn.Module]:
    yield from net.transformer_blocks


def tokens(net: Any, x: Tensor) -> Tensor:
    made: Tensor = net.proj_in(x.flatten(2).transpose(1, 2))
    return made


def velocity(net: Any, config: BackboneConfig, inputs: Inputs) -> Tensor:
    fps = inputs.fps
    if fps is None:
        raise ValueError("fps: positions of this model are in seconds; give the frame rate")
    inputs = held(inputs)
    _, _, frames, rows, columns = inputs.x.shape
    factor, pixels = config.strides
    # a number stays on the host: as a tensor it would be copied to the device, which waits for it
    rates = fps.to(inputs.x.device).reshape(-1, 1, 1, 1, 1) if isinstance(fps, Tensor) else fps
    scale = (factor / rates, pixels, pixels)
    predicted: Tensor = net(
        hidden_states=inputs.x.flatten(2).transpose(1, 2),
        encoder_hidden_states=inputs.text,
        timestep=token_times(inputs, rows * columns),
        encoder_attention_mask=inputs.seen,
        num_frames=frames,
        height=rows,
        width=columns,
        rope_interpolation_scale=scale,
        return_dict=False,
    )[0]
    return predicted.transpose(1, 2).unflatten(2, (frames, rows, columns))
