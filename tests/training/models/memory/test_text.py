"""A model with a memory that listens to captions: who attends to them, and the stages before and after."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import latent_stages
import pytest
import spoken
import torch
from flat import nested
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training.models.common.condition import Condition
from longtake.training.models.memory import finetune as finetune_memory_prior
from longtake.training.models.memory import pretrain as pretrain_memory
from longtake.training.models.memory import shared
from longtake.training.models.memory.data import loader_of
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.models.memory.finetune import Config
from longtake.training.registry import disk, lineage

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = MemoryDiTConfig(
    depth=2, width=32, heads=2, channels=4, memory_widths=(8, 16), memory_heads=2, rates=("2x2x2",), branches="high",
    cross_attention=True, shape=(2, 4, 4), history=4, window=2,
)  # fmt: skip
WORDED = PLAIN.model_copy(update={"text_width": 5, "text_empty": 2, "text_length": 7})
T, TIMES = torch.tensor([0.3, 0.8]), torch.arange(4, 7)


def config(**changes: Any) -> Config:
    quick = {"kind": "finetune_memory_prior", "text": "text", "eval_videos": 2, "eval_segments": 2, "guidance": 2.0}
    return Config(**nested(latent_stages.QUICK | quick | changes))


@pytest.fixture(scope="module")
def inputs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Read them, do not change them."""
    root = tmp_path_factory.mktemp("worded")
    made = latent_stages.inputs(root, dataset)
    return made | {"text": spoken.column(root / "text", made["dataset"])}


def awake(model: MemoryDiT) -> MemoryDiT:
    for number, parameter in enumerate(model.parameters()):
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return model.eval()


def latents(count: int = 3) -> Tensor:
    return torch.randn(2, 4, count, 4, 4, generator=torch.Generator().manual_seed(count))


def said() -> Condition:
    text = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))
    return Condition(text=text, mask=torch.tensor([[True] * 4, [True, True, False, False]]))


# the model


@torch.no_grad()
def test_weights_without_text_say_the_same_to_the_bit_beside_text_that_has_not_learned() -> None:
    plain, worded = awake(MemoryDiT(PLAIN)), MemoryDiT(WORDED)
    assert not [name for name in plain.state_dict() if "text" in name]
    worded.load_state_dict(plain.state_dict(), strict=False)
    worded.eval()
    memory = plain.remember(latents(4))
    for condition in (None, said()):
        for past in (None, memory):
            made = worded(latents(), T, TIMES, past, condition)
            assert torch.equal(made, plain(latents(), T, TIMES, past))
    assert not torch.equal(awake(worded)(latents(), T, TIMES, memory, said()), plain(latents(), T, TIMES, memory))
    with pytest.raises(ValueError, match=r"^text: this model takes none; leave it out$"):
        plain(latents(), T, TIMES, memory, said())


@torch.no_grad()
def test_the_video_attends_to_the_text_and_the_memory_does_not() -> None:
    model, seen = awake(MemoryDiT(WORDED)), list[Any]()
    for block in model.blocks():
        assert block.text is not None
        block.text.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    model(latents(), T, TIMES, model.remember(latents(4)), said())
    assert seen == [(2, 3, 16, 32)] * 2


@torch.no_grad()
def test_each_latent_of_a_segment_may_see_a_text_of_its_own() -> None:
    model = awake(MemoryDiT(WORDED))
    condition = said()
    assert condition.mask is not None
    same = Condition(None, condition.text, condition.mask[:, None].expand(-1, 3, -1))
    torch.testing.assert_close(model(latents(), T, TIMES, None, same), model(latents(), T, TIMES, None, condition))
    later = same.mask.clone()  # type: ignore[union-attr]
    later[:, 0] = False
    changed = model(latents(), T, TIMES, None, Condition(None, condition.text, later))
    assert not torch.allclose(changed, model(latents(), T, TIMES, None, same))


@torch.no_grad()
def test_an_old_folder_loads_and_says_what_it_said(tmp_path: Path) -> None:
    plain = awake(MemoryDiT(PLAIN))
    old = {name: value for name, value in plain.config.model_dump(mode="json").items() if not name.startswith("text")}
    disk.save(tmp_path / "old", "memory_dit", old, plain.state_dict(), {"stage": "generation"})
    model: Any = disk.load(tmp_path / "old")
    assert torch.equal(model(latents(), T, TIMES), plain(latents(), T, TIMES))


# the stages


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("changes", [{}, {"zero_stage": 3}])
def test_text_learns_and_a_stopped_training_ends_with_the_same_weights(
    inputs: dict[str, str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    chosen = config(**changes, classes=True)
    straight = latent_stages.fit(finetune_memory_prior, chosen, inputs, tmp_path / "straight")
    latent_stages.fit(finetune_memory_prior, chosen, inputs, tmp_path / "stopped", until=2)
    resumed = latent_stages.fit(finetune_memory_prior, chosen, inputs, tmp_path / "stopped")
    torch.testing.assert_close(resumed, straight, atol=0, rtol=0)
    assert all(straight[name].any() for name in straight if ".text.out.weight" in name)


def test_the_loss_of_a_segment_is_given_its_caption(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen, seen = config(), list[Condition]()
    setup = latent_stages.prepared(chosen, inputs, tmp_path)

    def engine(x: Tensor, t: Tensor, times: Tensor, memory: Any, condition: Condition, *others: Any) -> Tensor:
        seen.append(condition)
        return torch.zeros_like(x)

    batch = next(iter(loader_of(chosen, setup, "train", batch=2)))
    turn = latent_stages.turn(engine, batch, torch.Generator().manual_seed(0))
    finetune_memory_prior._loss(chosen, setup.model, turn)
    assert seen[0].text is batch["text"] and seen[0].mask is batch["text_mask"] and seen[0].classes is None


@pytest.mark.usefixtures("group")
def test_the_prompts_of_samples_and_of_continued_videos_are_kept_beside_them(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    chosen = config(sample_steps=1, eval_videos=1, eval_segments=1, eval_clips=1)
    setup = latent_stages.prepared(chosen, inputs, tmp_path)
    purpose = finetune_memory_prior.objective(chosen, setup)
    assert len(purpose.prompts) == 1 and purpose.prompts[0] in (
        "a red square",
        "a blue circle moves left",
        "no caption",
    )
    (tmp_path / "heldout").mkdir()
    awake(setup.model)
    finetune_memory_prior.evaluate(chosen, setup, tmp_path / "heldout")
    (video,) = json.loads((tmp_path / "heldout" / "continued.json").read_text())["videos"]
    assert video.get("prompt") in ("a red square", "a blue circle moves left", None)
    assert shared.counts(chosen, setup)["train_clips_without_captions"] > 0


@torch.no_grad()
def test_samples_are_led_to_their_caption(inputs: dict[str, str], tmp_path: Path) -> None:
    def sample(guidance: Any) -> Any:
        chosen = config(guidance=guidance, model=latent_stages.TINY | {"label_dropout": 0.1}, classes=True)
        torch.manual_seed(0)
        setup = latent_stages.prepared(chosen, inputs, tmp_path)
        model, made = awake(setup.model), finetune_memory_prior.objective(chosen, setup).sample
        assert made
        return made({"model": SimpleNamespace(module=model)}, torch.Generator())["continued"]

    films = {str(g): sample(g) for g in (1.0, 3.0, {"classes": 3, "text": 3}, {"classes": 1, "text": 3})}
    one, three, equal, apart = films.values()
    assert (three == equal).all() and (one != three).any() and (apart != three).any()


def saved(setup: Any, stage: Any, chosen: Any, run: Path, folder: Path) -> str:
    """The model of a stage, untrained, as a folder."""
    facts = stage.facts(chosen, setup, lineage.read(run))
    disk.save(folder, "memory_dit", setup.model.config.model_dump(mode="json"), setup.model.state_dict(), facts)
    return str(folder)


def test_text_goes_from_a_base_through_a_pretrained_memory_to_the_next_prior(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    none = latent_stages.TINY | {"memory": "none"}
    chosen = config(low_latents=None, model=none)
    given = {name: uri for name, uri in inputs.items() if name != "low_latents"}
    first = saved(
        latent_stages.prepared(chosen, given, tmp_path / "a"),
        finetune_memory_prior,
        chosen,
        tmp_path / "a",
        tmp_path / "first",
    )

    quick = {k: v for k, v in latent_stages.QUICK.items() if k not in ("model", "text")}
    memory = {"memory": "encoder", "rates": ["2x2x2"]}
    middle = pretrain_memory.Config(**nested(quick | {"kind": "pretrain_memory", "base": "base", "model": memory}))
    there = {name: uri for name, uri in inputs.items() if name != "text"} | {"base": first}
    setup = latent_stages.prepared(middle, there, tmp_path / "b")
    second = saved(setup, pretrain_memory, middle, tmp_path / "b", tmp_path / "second")
    assert setup.model.config.text_width == spoken.WIDTH and setup.text is None
    assert disk.read_config(Path(second))["text"]["encoder"]["digest"] == spoken.Counting.digest

    last = config(base="base", model=None)
    setup = latent_stages.prepared(last, inputs | {"base": second}, tmp_path / "c")
    assert setup.text is not None and setup.model.text_in is not None
    silent = config(base="base", model=None, text=None, guidance=1.0)
    with pytest.raises(UserError, match="has learned text; name what a `cache_text` stage has made, or a base without"):
        latent_stages.prepared(silent, there | {"base": second}, tmp_path / "d")


def test_a_base_without_text_gets_it(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = config(text=None)
    setup = latent_stages.prepared(plain, {k: v for k, v in inputs.items() if k != "text"}, tmp_path / "a")
    base = saved(setup, finetune_memory_prior, plain, tmp_path / "a", tmp_path / "base")
    worded = latent_stages.prepared(config(base="base", model=None), inputs | {"base": base}, tmp_path / "b")
    assert "are not in" in capsys.readouterr().out
    theirs, ours = setup.model.state_dict(), worded.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and worded.model.text_in is not None


def test_pretraining_takes_no_text_settings() -> None:
    quick = {k: v for k, v in latent_stages.QUICK.items() if k != "model"}
    model = latent_stages.TINY | {"text_dropout": 0.2}
    with pytest.raises(ValueError, match="model: text_dropout: has no effect without texts"):
        pretrain_memory.Config(**nested(quick | {"kind": "pretrain_memory", "model": model}))
