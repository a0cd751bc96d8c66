"""The transformer: what sees what, conditions, the cache, and its sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.training.models.common.condition import Condition, of_classes
from longtake.training.models.tats.gpt import TATS, Cache, condition_tokens
from longtake.training.models.tats.gpt_config import PRESETS, Mode, TATSConfig, config_from_preset

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"depth": 3, "width": 16, "heads": 2, "codes": 11, "every": 3}
SHAPES: dict[Mode, tuple[int, int, int]] = {"base": (3, 2, 2), "anchors": (7, 2, 2), "interpolate": (4, 2, 2)}
CONDITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "classes": {"classes": 3},
    "words": {"words": 20, "word_length": 5},
    "sound": {"audio_codes": 6, "audio_tokens": 2, "classes": 3},
    "text": {"text_width": 8, "text_null": "learned"},
}


def awake(model: nn.Module) -> Any:
    """Random weights, also where a layer starts at zero."""
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=rng)
    return model.eval()


def made(mode: Mode = "base", **changes: Any) -> TATS:
    return awake(TATS(TATSConfig(**SMALL | {"mode": mode, "shape": SHAPES[mode]} | changes)))


def tokens(model: TATS, batch: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(model.config.codes, (batch, *model.config.shape), generator=rng)


def conditions(model: TATS, batch: int = 2) -> Condition:
    """A batch whose samples differ: another class, a longer text, sound in the first frame alone."""
    config = model.config
    classes = torch.arange(batch) % 2 if config.classes else None
    text = mask = audio = None
    if config.words or config.text_width:
        mask = torch.arange(4) < 2 + torch.arange(batch)[:, None]
        text = torch.arange(4 * batch).view(batch, 4, 1)
        text = text if config.words else torch.randn(batch, 4, 8, generator=torch.Generator().manual_seed(2))
    if config.audio_codes:
        audio = torch.arange(config.shape[0] * 2).view(1, -1, 2).repeat(batch, 1, 1) % 6
        audio[0, 1:] = -1
    return Condition(classes, text, mask, audio=audio)


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("mode", SHAPES)
def test_a_token_depends_on_what_is_before_it_and_on_nothing_else(mode: Mode, kind: str) -> None:
    model = made(mode, **CONDITIONS[kind])
    config = model.config
    sequence, given = config.sequence(tokens(model)), config.given * config.cells
    seen: list[Tensor] = []

    def watched(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    model.token_in.register_forward_hook(watched)
    logits = model(sequence[:, :-1], conditions(model), last=config.predicted)
    assert logits.shape == (2, config.predicted, config.codes)
    for place in range(config.predicted):
        (slope,) = torch.autograd.grad(logits[:, place].square().sum(), seen[0], retain_graph=True)
        reached = slope[:, config.conditions :].abs().sum(-1) > 0
        # exactly those before it: all anchors, and none of what is predicted later
        assert reached[:, : given + place].all() and not reached[:, given + place :].any(), place


def test_anchors_see_each_other(mode: Mode = "interpolate") -> None:
    model = made(mode)
    sequence = model.config.sequence(tokens(model))
    changed = sequence.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 11  # the last token of the second anchor
    hidden: list[Tensor] = []
    model.layers[0].register_forward_hook(lambda module, inputs, output: hidden.append(output))
    for each in (sequence, changed):
        model(each[:, :-1], last=8)
    assert (hidden[0][:, :8] != hidden[1][:, :8]).any(-1).all()


def test_the_order_and_the_positions_are_those_of_the_true_frames() -> None:
    frames = torch.arange(7)[None, :, None, None].expand(1, 7, 2, 2)
    for mode, order in (("base", (0, 1, 2)), ("anchors", (0, 3, 6)), ("interpolate", (0, 3, 1, 2))):
        model = made(mode)
        window = frames[:, : model.config.shape[0]]
        assert model.config.sequence(window)[0, ::4].tolist() == list(order)
        assert ((model.places[1:] - 1) // 4).tolist() == [frame for frame in order for _ in range(4)]
        assert model.places[0] == 0


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("mode", SHAPES)
def test_cached_logits_are_those_of_one_pass(mode: Mode, kind: str) -> None:
    model = made(mode, **CONDITIONS[kind])
    config = model.config
    sequence, given = config.sequence(tokens(model)), config.given * config.cells
    asked = conditions(model)
    with torch.no_grad():
        whole = model(sequence[:, :-1], asked, last=config.predicted)
        cache, steps, start = Cache(config.conditions + sequence.shape[1]), [], max(given, 4)
        steps.append(model(sequence[:, :start], asked, last=1, cache=cache))
        for place in range(start, sequence.shape[1] - 1):
            steps.append(model(sequence[:, place : place + 1], last=1, cache=cache))
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, start - given :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in CONDITIONS if kind != "plain"])
def test_every_condition_matters_and_padding_does_not(kind: str) -> None:
    model = made(**CONDITIONS[kind])
    sequence, asked = model.config.sequence(tokens(model))[:, :-1], conditions(model)
    with torch.no_grad():
        logits = model(sequence, asked, last=12)
        none = model(sequence, last=12)
        assert (logits != none).any(-1).all()
        torch.testing.assert_close(model(sequence, asked.null, last=12), none)
        if asked.text is not None and asked.mask is not None:
            text, mask = asked.text.clone(), asked.mask
            text[~mask] = 7
            torch.testing.assert_close(model(sequence, Condition(None, text, mask), last=12), logits)


def test_training_hides_conditions_and_sampling_does_not() -> None:
    model = made(classes=3, label_dropout=1.0, audio_codes=6, audio_tokens=2, audio_dropout=1.0)
    sequence, asked = model.config.sequence(tokens(model))[:, :-1], conditions(model)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        free, told = model(sequence, last=12), model(sequence, asked, last=12)
        model.train()
        torch.testing.assert_close(model(sequence, asked, rng, last=12), free)
    assert (told != free).any()


def test_training_hides_each_sample_s_sound_as_often_as_it_says() -> None:
    model = made(audio_codes=6, audio_tokens=2, audio_dropout=0.3).train()
    config, batch = model.config, 2000
    asked = Condition(audio=torch.ones(batch, 3, 2, dtype=torch.int64))
    lost = model._lost(asked, torch.zeros(batch, 1), torch.Generator().manual_seed(0))
    assert lost.audio is not None and 0.27 < lost.audio.float().mean() < 0.33
    front = condition_tokens(config, asked, torch.zeros(batch, 1), lost)[:, 1:]
    assert torch.equal((front == front[0:1]).all(1), lost.audio == lost.audio[0]), "all of a sample, or none"


def test_recomputed_blocks_give_the_same_gradients() -> None:
    slopes = []
    for again in (False, True):
        model = made("interpolate", activation_checkpointing=again).train()
        model(model.config.sequence(tokens(model))[:, :-1], last=8).square().sum().backward()
        slopes.append([p.grad for p in model.parameters()])
    for one, two in zip(*slopes, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
def test_a_loss_in_chunks_is_that_of_all_logits(chunk: int | None) -> None:
    model = made(classes=3).double().train()
    sequence = model.config.sequence(tokens(model))
    given, answers = sequence[:, :-1], sequence[:, -model.config.predicted :]
    condition, last = of_classes([1, 2]), model.config.predicted

    def gradients(loss: Tensor) -> list[Tensor]:
        model.zero_grad()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    rngs = [torch.Generator().manual_seed(3) for _ in range(2)]
    logits = model(given, condition, rngs[0], last=last)
    whole = gradients(F.cross_entropy(logits.flatten(0, 1), answers.flatten()))
    parts = gradients(model(given, condition, rngs[1], last=last, targets=answers, chunk=chunk))
    for one, two in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_logits_of_a_chunk_alone_are_there_at_once() -> None:
    model, made_logits = made().train(), list[int]()
    model.head.register_forward_hook(lambda *call: made_logits.append(len(call[-1])))
    sequence = model.config.sequence(tokens(model))
    answers = sequence[:, -model.config.predicted :]
    kept = list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape[-1]) or x, lambda x: x):
        loss = model(sequence[:, :-1], last=model.config.predicted, targets=answers, chunk=3)
    loss.backward()
    assert max(made_logits) == 3 and sum(made_logits) == 2 * answers.numel()
    assert model.config.codes not in kept


def test_what_a_model_has_not_learned_is_refused() -> None:
    plain, classes, words = made(), made(classes=3), made(words=20, word_length=3)
    for model, asked, why in (
        (plain, of_classes([0, 1]), "classes: this model has none"),
        (plain, Condition(None, torch.zeros(2, 1, 8), torch.ones(2, 1, dtype=torch.bool)), "text: this"),
        (plain, Condition(audio=torch.zeros(2, 3, 2)), "audio: this model takes none"),
        (classes, of_classes([0, 3]), "class 3 is out of range; this model has classes 0 to 2"),
        (words, Condition(None, torch.zeros(2, 4, 1), torch.ones(2, 4, dtype=torch.bool)), "up to 3"),
    ):
        with pytest.raises(ValueError, match=why):
            model(model.config.sequence(tokens(model)), asked, last=1)
    with pytest.raises(ValueError, match=r"tokens have shape \(2, 3, 2, 3\); this model needs \(B, 3, 2, 2\)"):
        plain.config.sequence(torch.zeros(2, 3, 2, 3))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"heads": 3}, "multiple of heads"),
        ({"mode": "interpolate"}, "windows of every \\+ 1 = 4 latent frames, not 3"),
        ({"mode": "anchors"}, "needs 4 or more"),
        ({"words": 5, "text_width": 8, "text_null": "learned"}, "words and text"),
        ({"audio_codes": 5}, "audio_codes and audio_tokens"),
    ],
)
def test_configs_that_do_not_fit_say_why(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TATSConfig(**SMALL | {"shape": (3, 2, 2)} | changes)


def test_presets_have_the_sizes_that_they_name() -> None:
    sizes = {}
    for name in PRESETS:
        with torch.device("meta"):
            model = TATS(config_from_preset(name, codes=16384, shape=(4, 16, 16)))
        sizes[name] = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
    assert sizes == {"tats_paper": 336.9, "tats_small": 55.1, "tats_tiny": 5.1}
    with pytest.raises(ValueError, match="unknown preset 'tats'"):
        config_from_preset("tats")


@pytest.mark.parametrize(("mode", "kind"), [("base", "text"), ("interpolate", "sound")])
def test_each_block_compiles_as_a_whole_to_the_same(mode: Mode, kind: str) -> None:
    model = made(mode, **CONDITIONS[kind])
    sequence, asked = model.config.sequence(tokens(model))[:, :-1], conditions(model)
    expected = model(sequence, asked, last=model.config.predicted)
    with torch._dynamo.config.patch(recompile_limit=64):
        for block in model.blocks():
            block.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(sequence, asked, last=model.config.predicted), expected)
