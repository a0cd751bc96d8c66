"""Convolutions of TATS: sides that divide, the right side of the padding, and what an output depends on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from longtake.training.models.tats.convolution import (
    Layer,
    SameConv3d,
    SameTransposed3d,
    layers_of,
    margins,
    needed,
    stream,
    windows,
)
from longtake.training.models.tats.vqgan import VQGAN, config_from_preset

pytestmark = pytest.mark.usefixtures("one_thread")


def ones(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
    return layer.double()


def reached(gradient: torch.Tensor) -> tuple[int, int]:
    """The first and last frame with a gradient."""
    at = gradient.abs().amax((0, 1, 3, 4)).nonzero()
    return int(at[0]), int(at[-1])


@pytest.mark.parametrize(
    ("kernel", "stride", "sides"), [(3, 1, (1, 1)), (4, 2, (1, 1)), (4, 1, (2, 1)), (1, 1, (0, 0))]
)
def test_more_is_padded_before_than_after(kernel, stride, sides):
    layer = Layer(kernel, stride)
    assert (layer.before, layer.after) == sides
    conv = ones(SameConv3d(1, 1, kernel, (stride, 1, 1)))
    x = torch.zeros(1, 1, 12, 2, 2, dtype=torch.float64, requires_grad=True)
    out = conv(x)
    assert out.shape[2] == 12 // stride
    (gradient,) = torch.autograd.grad(out[:, :, 4 // stride].sum(), x)
    assert reached(gradient) == (4 - sides[0], 4 - sides[0] + kernel - 1) == layer.needed(4 // stride, 4 // stride)


@given(st.lists(st.tuples(st.sampled_from([3, 4]), st.sampled_from([1, 2]), st.booleans()), min_size=1, max_size=3))
def test_an_output_depends_on_what_is_needed_and_on_nothing_else(kinds):
    kinds = [(4 if stride == 2 else kernel, stride, transposed) for kernel, stride, transposed in kinds]
    parts = [
        SameTransposed3d(1, 1, k, (s, 1, 1)) if transposed else SameConv3d(1, 1, k, (s, 1, 1))
        for k, s, transposed in kinds
    ]
    stack = ones(nn.Sequential(*parts))
    layers = layers_of(stack, 0)
    assert layers == [Layer(*kind) for kind in kinds]
    x = torch.zeros(1, 1, 64, 1, 1, dtype=torch.float64, requires_grad=True)
    out = stack(x)
    for at in (out.shape[2] // 2, out.shape[2] // 2 + 1):
        (gradient,) = torch.autograd.grad(out[:, :, at].sum(), x, retain_graph=True)
        assert reached(gradient) == needed(layers, at, at)


def test_at_the_papers_shape_a_token_sees_64_frames_and_its_frames_13_tokens():
    with torch.device("meta"):
        model = VQGAN(config_from_preset("vqgan_paper"))
    assert needed(layers_of(model.encoder, 0), 0, 0) == (-32, 31)
    assert margins(layers_of(model.encoder, 0)) == (8, 7)
    assert margins(layers_of(model.decoder, 0)) == (6, 6)
    assert needed(layers_of(model.decoder, 0), 0, 3) == (-6, 6)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.integers(0, 3))
def test_windows_cover_an_axis_once(size, most, before, after):
    if size > most <= before + after:
        with pytest.raises(
            ValueError, match=f"tile {4 * most}; needs {4 * (before + after + 1)} pixels a side or more"
        ):
            windows(size, most, (before, after), 4)
        return
    cut = windows(size, most, (before, after))
    assert [n for window in cut for n in range(window.start, window.end)] == list(range(size))
    for start, end, low, high in cut:
        assert high - low <= most and (low == 0 or start - low >= before) and (high == size or high - end >= after)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 5),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.sampled_from([(1, 1), (4, 1), (1, 4)]),
)
def test_a_stream_runs_each_latent_once_with_its_margins(lengths, chunk, around, scales):
    """`run` marks what lies less than a margin from a border, other than those of the whole."""
    a, b = scales
    total = sum(lengths)
    x = torch.arange(float(total * a)).view(1, 1, -1, 1, 1)
    seen: list[int] = []

    def run(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[2] // a)
        latents = part[:, :, ::a].clone()
        if part[0, 0, 0] > 0:
            latents[:, :, : around[0]] = -1
        if part[0, 0, -1] < total * a - 1 and around[1]:
            latents[:, :, -around[1] :] = -1
        return latents.repeat_interleave(b, 2)

    out = list(stream(run, x.split([n * a for n in lengths], 2), chunk, around, scales))
    if not total:
        assert not out
        return
    assert torch.equal(torch.cat(out, 2), x[:, :, ::a].repeat_interleave(b, 2))
    assert [part.shape[2] for part in out[:-1]] == [chunk * b] * (len(out) - 1)
    assert max(seen) <= chunk + sum(around)
