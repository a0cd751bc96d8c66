"""Text in a transformer: attention as it is defined, masks, padding, what stands for no text, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from longtake.training.models.common.condition import Condition
from longtake.training.models.common.guidance import Guidance
from longtake.training.models.common.text import TextAttention, TextIn, check_guidance, text_tokens
from longtake.training.models.latte.model import LatteConfig

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, FRAMES, PLACES, WIDTH, HEADS = 2, 3, 4, 16, 2
NULLS, PADDINGS = ("empty", "zeros", "learned"), ("mask", "zeros")
FIELDS: dict[str, Any] = {
    "depth": 2,
    "width": WIDTH,
    "heads": HEADS,
    "text_width": 5,
    "text_empty": 2,
    "text_length": 7,
}
X = torch.zeros(BATCH, 4, FRAMES, 2, 2)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awake(module: nn.Module) -> Any:
    """A module of which every parameter counts."""
    for number, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            parameter.copy_(parameter + 0.3 * randn(*parameter.shape, seed=number))
    return module.eval()


def text_in(**changes: Any) -> TextIn:
    torch.manual_seed(0)
    module: TextIn = awake(TextIn(LatteConfig(**FIELDS | changes)))
    module.set_empty(randn(2, 5, seed=9))
    return module


def attention() -> TextAttention:
    torch.manual_seed(0)
    module: TextAttention = awake(TextAttention(WIDTH, HEADS))
    return module


def said(*lengths: int, columns: int = 0) -> Condition:
    """Texts of these lengths, in so many columns at least."""
    count = max(columns, 1, *lengths)
    rows = [F.pad(randn(length, 5, seed=length + n), (0, 0, 0, count - length)) for n, length in enumerate(lengths)]
    return Condition(text=torch.stack(rows), mask=torch.arange(count) < torch.tensor(lengths)[:, None])


def by_frame(condition: Condition, frames: int = FRAMES) -> Condition:
    assert condition.mask is not None
    return Condition(None, condition.text, condition.mask[:, None].expand(-1, frames, -1))


def added(module: TextIn, condition: Condition | None, **hidden: Tensor) -> Tensor:
    """What a block adds for a condition."""
    return attention()(randn(BATCH, FRAMES, PLACES, WIDTH, seed=3), *module(condition, X, **hidden))


def close(made: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


# attention


@torch.no_grad()
@pytest.mark.parametrize("seen", [None, (BATCH, 5), (BATCH, FRAMES, 5)])
def test_attention_is_what_it_is_defined_as(seen: tuple[int, ...] | None) -> None:
    module, x, text = attention(), randn(BATCH, FRAMES, PLACES, WIDTH), randn(BATCH, 5, WIDTH, seed=1)
    mask = None if seen is None else (torch.rand(seen, generator=torch.Generator().manual_seed(4)) < 0.5)
    if mask is not None:
        mask[..., 0] = True
    head, expected = WIDTH // HEADS, torch.zeros_like(x)
    for b in range(BATCH):
        for t in range(FRAMES):
            row = [True] * 5 if mask is None else (mask[b] if mask.ndim == 2 else mask[b, t]).tolist()
            sees = [n for n in range(5) if row[n]]
            keys, values = module.key_value(text[b, sees]).split(WIDTH, dim=-1)
            for s in range(PLACES):
                query, parts = module.query(F.layer_norm(x[b, t, s], (WIDTH,), eps=1e-6)), []
                for h in range(HEADS):
                    part = slice(h * head, (h + 1) * head)
                    q, k = _normed(query[part], module.query_norm), _normed(keys[:, part], module.key_norm)
                    parts.append((k @ q / math.sqrt(head)).softmax(0) @ values[:, part])
                expected[b, t, s] = module.out(torch.cat(parts))
    close(module(x, text, mask), expected)


def _normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


@torch.no_grad()
def test_without_norms_of_queries_and_keys_it_is_pytorchs_own_attention() -> None:
    module, x, text = attention(), randn(BATCH, FRAMES, PLACES, WIDTH), randn(BATCH, 5, WIDTH, seed=1)
    module.query_norm = module.key_norm = nn.Identity()  # type: ignore[assignment]
    seen = torch.tensor([[True] * 5, [True, True, False, True, False]])
    normed = F.layer_norm(x, (WIDTH,), eps=1e-6).flatten(1, 2)
    expected, _ = F.multi_head_attention_forward(
        normed.transpose(0, 1), text.transpose(0, 1), text.transpose(0, 1), WIDTH, HEADS,
        torch.cat([module.query.weight, module.key_value.weight]),
        torch.cat([module.query.bias, module.key_value.bias]),
        None, None, False, 0.0, module.out.weight, module.out.bias, key_padding_mask=~seen, need_weights=False,
    )  # fmt: skip
    close(module(x, text, seen), expected.transpose(0, 1).view_as(x))


@torch.no_grad()
def test_it_starts_by_adding_nothing_and_who_sees_nothing_gets_nothing() -> None:
    x, text = randn(BATCH, FRAMES, PLACES, WIDTH), randn(BATCH, 5, WIDTH, seed=1)
    assert not TextAttention(WIDTH, HEADS)(x, text, None).any()
    seen = torch.ones(BATCH, FRAMES, 5, dtype=torch.bool)
    seen[1, 2] = False
    made = attention()(x, text, seen)
    assert not made[1, 2].any() and made[1, :2].all() and made[0].all() and made.isfinite().all()


# texts and none


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("null", NULLS)
def test_a_sample_without_text_is_as_one_whose_text_is_hidden_and_as_no_condition(null: str, padding: str) -> None:
    module, hidden = text_in(text_null=null, text_padding=padding), torch.tensor([False, True])
    none = added(module, None)
    close(added(module, said(4, 0))[1], none[1])
    close(added(module, said(4, 6), hidden=hidden), added(module, said(4, 0)))
    close(added(module, by_frame(said(4, 0)))[1], none[1])
    assert (added(module, said(4, 0))[0] - none[0]).abs().max() > 1e-3, "a text does something"
    assert none.any() == (null != "zeros" or padding == "zeros")


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS)
def test_the_states_of_an_empty_text_stand_for_none(padding: str) -> None:
    module = text_in(text_padding=padding)
    empty = Condition(text=randn(2, 5, seed=9).expand(2, -1, -1), mask=torch.ones(2, 2, dtype=torch.bool))
    close(added(module, empty), added(module, None))


@pytest.mark.parametrize("padding", PADDINGS)
@given(lengths=st.tuples(st.integers(0, 4), st.integers(0, 4)), more=st.integers(0, 3))
def test_how_far_a_batch_is_padded_makes_no_difference(padding: str, lengths: tuple[int, int], more: int) -> None:
    module = text_in(text_padding=padding)
    tight = said(*lengths)
    assert tight.text is not None
    wide = said(*lengths, columns=tight.text.shape[1] + more)
    close(added(module, wide), added(module, tight))
    # what the padding holds neither, under either rule
    assert wide.text is not None and wide.mask is not None
    close(
        added(module, Condition(None, torch.where(wide.mask[..., None], wide.text, 5.0), wide.mask)),
        added(module, tight),
    )


@torch.no_grad()
def test_padding_with_zeros_is_seen_up_to_the_length_that_the_model_has() -> None:
    module, condition = text_in(text_padding="zeros", text_null="zeros"), said(4, 2)
    assert condition.text is not None
    tokens, seen = module(condition, X)
    assert seen is None and tokens.shape == (2, 7, WIDTH)
    close(tokens, module.project(module.norm(F.pad(condition.text, (0, 0, 0, 3)))))
    longer = text_in(text_padding="zeros", text_null="zeros", text_length=9)
    assert (added(longer, condition) - added(module, condition)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("null", NULLS)
def test_a_mask_that_is_the_same_for_all_frames_is_that_of_the_sample(null: str, padding: str) -> None:
    module = text_in(text_null=null, text_padding=padding)
    close(added(module, by_frame(said(4, 0))), added(module, said(4, 0)))


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS)
def test_each_frame_sees_its_own_text_alone(padding: str) -> None:
    module, first, second = text_in(text_padding=padding), said(3, 3), said(2, 2)
    assert first.text is not None and second.text is not None
    mask = torch.zeros(BATCH, FRAMES, 5, dtype=torch.bool)
    mask[:, 0, :3] = mask[:, 1, 3:] = True
    story = added(module, Condition(None, torch.cat([first.text, second.text], dim=1), mask))
    for frame, alone in enumerate((first, second, None)):
        close(story[:, frame], added(module, alone)[:, frame])


# what is refused


def test_texts_that_do_not_fit_are_refused_in_one_line() -> None:
    module = text_in()
    for condition, line in (
        (Condition(text=torch.zeros(2, 3, 4), mask=torch.ones(2, 3, dtype=torch.bool)), r"text has shape \(2, 3, 4\); this model needs \(2, N, 5\)"),
        (said(3), r"text has shape \(1, 3, 5\); this model needs \(2, N, 5\)"),
        (said(8, 2), "text has 8 tokens; this model takes 7: shorten it"),
        (by_frame(said(2, 2), 4), r"mask has shape \(2, 4, 2\); a window of 3 needs \(2, 3, N\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{line}$"):
            module(condition, X)
    with pytest.raises(ValueError, match=r"^text: this model takes none; leave it out$"):
        text_tokens(None, said(2, 2), X)
    assert text_tokens(None, None, X) == (None, None)
    with pytest.raises(ValueError, match=r"^empty has shape \(3, 5\); this model needs \(2, 5\)$"):
        module.set_empty(torch.zeros(3, 5))
    with pytest.raises(
        ValueError, match=r"text_empty is 0; with text_null: empty it is the number of tokens of an empty text"
    ):
        LatteConfig(**FIELDS | {"text_empty": 0})


def test_guidance_needs_a_training_that_has_hidden_what_it_leads_away_from() -> None:
    config = LatteConfig(**FIELDS | {"classes": 3, "text_dropout": 0.0})
    check_guidance(config, 1.0)
    check_guidance(config, Guidance(classes=4.0))
    for guidance in (4.0, Guidance(text=4.0)):
        with pytest.raises(ValueError, match=r"^guidance is 4: this model was trained with text_dropout: 0 and cannot"):
            check_guidance(config, guidance)
    with pytest.raises(ValueError, match=r"label_dropout: 0 and cannot do without classes; leave guidance at 1$"):
        check_guidance(LatteConfig(**FIELDS | {"classes": 3, "label_dropout": 0.0}), 0.0)
    check_guidance(LatteConfig(**FIELDS | {"text_width": 0, "label_dropout": 0.0, "text_dropout": 0.0}), 4.0)


def test_guidance_of_its_own_for_what_a_model_has_not_learned_is_refused() -> None:
    worded, classed = LatteConfig(**FIELDS), LatteConfig(**FIELDS | {"classes": 3, "text_width": 0})
    check_guidance(worded, Guidance(text=6.0))
    check_guidance(classed, Guidance(classes=2.0))
    with pytest.raises(ValueError, match=r"^guidance: audio is 2, and this model has learned no audio; leave it out$"):
        check_guidance(worded, Guidance(audio=2.0))
    with pytest.raises(ValueError, match=r"^guidance: classes is 2, and this model has learned no classes; leave it"):
        check_guidance(worded, Guidance(2.0, 6.0))
    with pytest.raises(ValueError, match=r"^guidance: text is 6, and this model has learned no text; leave it out$"):
        check_guidance(classed, Guidance(2.0, 6.0))
