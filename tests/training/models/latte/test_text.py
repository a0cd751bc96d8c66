"""A Latte that listens to captions: what it begins as, what it learns from, what it is measured on, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import latent_stages
import pytest
import spoken
import torch
from flat import nested
from torch import Tensor, nn

from longtake.datasets import text as column
from longtake.datasets.errors import UserError
from longtake.training import checkpoint, registry
from longtake.training.config import RunConfig
from longtake.training.data import text_of
from longtake.training.loop import train
from longtake.training.models.common.condition import Condition
from longtake.training.models.generator import fields_of
from longtake.training.models.latte import base as latte_base
from longtake.training.models.latte import finetune as finetune_latte
from longtake.training.models.latte.finetune import Config, check, heldout_of, loader_of
from longtake.training.models.latte.model import Latte, LatteConfig
from longtake.training.registry import disk, lineage
from longtake.training.registry.gate import Gate
from longtake.training.registry.judge import Judged, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = LatteConfig(depth=2, width=32, heads=2, channels=4, shape=(3, 4, 6))
WORDED = PLAIN.model_copy(update={"text_width": 5, "text_empty": 2, "text_length": 7})
TINY = {"preset": "latte_tiny", "depth": 2, "width": 32, "heads": 2}
QUICK: dict[str, Any] = {
    "kind": "finetune_latte",
    "dataset": "dataset",
    "latents": "latents",
    "text": "text",
    "model": TINY | {"text_dropout": 0.5},
    "frames": 9,
    "steps": 4,
    "batch": 4,
    "lr": 1e-2,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 0,
    "sample_steps": 2,
    "ema_half_lives": [],
    "eval_videos": 2,
    "overlap": 1,
    "guidance": 2.0,
}
T = torch.tensor([0.3, 0.8])


def config(**changes: Any) -> Config:
    return Config(**nested(QUICK | changes))


def fit(chosen: Config, inputs: dict[str, str], folder: Path, until: int | None = None) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = latent_stages.fit(finetune_latte, chosen, inputs, folder, until)
    return weights


def started(chosen: Config, inputs: dict[str, str], folder: Path) -> Any:
    return latent_stages.prepared(chosen, inputs, folder, finetune_latte)


@pytest.fixture(scope="module")
def inputs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dataset with labels, latents and texts: read them, do not change them."""
    root = tmp_path_factory.mktemp("worded")
    made = latent_stages.inputs(root, dataset, join=0.0)
    del made["low_latents"]
    return made | {"text": spoken.column(root / "text", made["dataset"])}


def awake(model: Latte) -> Latte:
    for number, parameter in enumerate(model.parameters()):
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return model.eval()


def noise() -> Tensor:
    return torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(1))


def said() -> Condition:
    text = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))
    return Condition(text=text, mask=torch.tensor([[True] * 4, [True, True, False, False]]))


# the model


@torch.no_grad()
def test_a_model_without_text_has_the_weights_that_it_had_and_refuses_any() -> None:
    torch.manual_seed(0)
    model = Latte(PLAIN)
    assert not [name for name in model.state_dict() if "text" in name]
    with pytest.raises(ValueError, match=r"^text: this model takes none; leave it out$"):
        model(noise(), T, said())


@torch.no_grad()
def test_weights_without_text_say_the_same_to_the_bit_beside_text_that_has_not_learned() -> None:
    plain, worded = awake(Latte(PLAIN)), Latte(WORDED)
    worded.load_state_dict(plain.state_dict(), strict=False)
    worded.eval()
    for condition in (None, said()):
        assert torch.equal(worded(noise(), T, condition), plain(noise(), T))
    assert not torch.equal(awake(worded)(noise(), T, said()), plain(noise(), T))


@torch.no_grad()
def test_an_old_folder_loads_and_says_what_it_said(tmp_path: Path) -> None:
    plain = awake(Latte(PLAIN))
    old = {name: value for name, value in plain.config.model_dump(mode="json").items() if not name.startswith("text")}
    disk.save(tmp_path / "old", "latte", old, plain.state_dict(), {"classes": []})
    assert torch.equal(registry.load(str(tmp_path / "old"))(noise(), T), plain(noise(), T))


@pytest.mark.parametrize("changes", [{}, {"text_null": "learned"}, {"text_null": "zeros"}, {"text_padding": "zeros"}])
def test_all_that_is_of_text_learns(changes: dict[str, Any]) -> None:
    model = awake(Latte(WORDED.model_copy(update=changes))).train()
    model(noise(), T, said(), rng=torch.Generator().manual_seed(0)).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent in ([], ["text_in.null"]), "where no sample lost its text, what stands for none learns nothing"


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = awake(Latte(WORDED.model_copy(update={"activation_checkpointing": checkpointing}))).train()
        model(noise(), T, said(), rng=torch.Generator().manual_seed(0)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@torch.no_grad()
def test_training_hides_a_share_of_the_texts_by_the_generator_that_it_is_given() -> None:
    model = awake(Latte(WORDED.model_copy(update={"text_dropout": 0.5})))
    told, none = model(noise(), T, said()), model(noise(), T)
    model.train()
    made = [model(noise(), T, said(), rng=torch.Generator().manual_seed(seed)) for seed in range(20)]
    again = model(noise(), T, said(), rng=torch.Generator().manual_seed(7))
    assert torch.equal(again, made[7])
    hidden = [torch.allclose(row, none[n], atol=1e-6) for each in made for n, row in enumerate(each)]
    known = [torch.allclose(row, told[n], atol=1e-6) for each in made for n, row in enumerate(each)]
    assert 10 < sum(hidden) < 30 and [not one for one in hidden] == known


# a base


def base(folder: Path, facts: dict[str, Any] | None = None, chosen: LatteConfig = PLAIN) -> str:
    torch.manual_seed(0)
    model = awake(Latte(chosen))
    disk.save(folder, "latte", chosen.model_dump(mode="json"), model.state_dict(), {"classes": []} | (facts or {}))
    return str(folder)


KNOWN: dict[str, Any] = {"channels": 4, "shape": (3, 4, 6), "conditioning": 0.3}


@torch.no_grad()
def test_a_base_that_gets_text_begins_as_it_was_and_learns_text_in_full(inputs: dict[str, str], tmp_path: Path) -> None:
    uri, record = base(tmp_path / "base"), column.read_text(inputs["text"])
    latte, note = latte_base.continue_from(uri, {}, KNOWN, text=record)
    assert "tensors of text begin anew and add nothing at first" in note
    assert latte.config.text_width == spoken.WIDTH and latte.text_in is not None and latte.text_in.null is not None
    assert torch.equal(latte.text_in.null, torch.from_numpy(record.empty()))
    states = torch.from_numpy(record.empty())[None].expand(2, -1, -1)
    told = Condition(text=states, mask=torch.ones(2, states.shape[1], dtype=torch.bool))
    assert torch.equal(latte.eval()(noise(), T, told), registry.load(uri)(noise(), T))


def test_a_base_with_text_of_another_encoder_is_refused_in_one_line(inputs: dict[str, str], tmp_path: Path) -> None:
    record = column.read_text(inputs["text"])
    known = {"text": {"encoder": dict(record.encoder)}}
    other = {"text": {"encoder": dict(record.encoder) | {"digest": "other", "encoder": "umt5"}}}
    words = WORDED.model_copy(update={"text_width": spoken.WIDTH, "text_empty": 1, "text_length": spoken.LIMIT})
    with pytest.raises(
        UserError, match=r"has learned texts of another encoder, umt5; encode by that one, or name another"
    ):
        latte_base.continue_from(base(tmp_path / "a", other, words), {}, KNOWN, text=record)
    with pytest.raises(
        UserError, match=r"has learned text; name what a `cache_text` stage has made, or a base without"
    ):
        latte_base.continue_from(base(tmp_path / "b", known, words), {}, KNOWN)
    latte, note = latte_base.continue_from(
        base(tmp_path / "c", known, words), {"text_dropout": 0.3}, KNOWN, text=record
    )
    assert latte.config.text_dropout == 0.3 and "anew" not in note


# the stage


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "changes",
    [{}, {"zero_stage": 3}, {"precision": "bf16"}, {"model": TINY | {"text_padding": "zeros", "text_null": "zeros"}}],
)
def test_text_learns_in_every_way_of_training_and_samples_are_of_captions(
    inputs: dict[str, str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    chosen, shown = config(**changes, classes=True), dict[str, Any]()
    setup = started(chosen, inputs, tmp_path)
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}

    class Log(latent_stages.Log):
        def text(self, step: int, name: str, text: str) -> None:
            shown[name] = text

    log, run = Log(), RunConfig(sample_every=2)
    purpose, loader = finetune_latte.objective(chosen, setup), finetune_latte.loader(chosen, setup, 0, 1)
    train(purpose, loader, chosen.model_copy(update={"run": run}), tmp_path, log)  # type: ignore[arg-type]
    after = checkpoint.trained(tmp_path, chosen)
    words = [name for name in after if "text" in name and "null" not in name]
    assert len(words) == 4 + 2 * 8
    assert all((after[name].float() - before[name].float()).any() for name in words if not name.endswith("bias"))
    assert log.videos["generated"] == (9, 2 * 32 + 2, 2 * 48 + 2, 3)
    assert shown["prompts"].split("\n") == [
        "a red square",
        "a blue circle moves left",
        "a red square",
        "a blue circle moves left",
    ]


@pytest.mark.usefixtures("group")
def test_a_stopped_training_hides_the_same_texts_and_ends_with_the_same_weights(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    chosen = config()
    straight = fit(chosen, inputs, tmp_path / "straight")
    fit(chosen, inputs, tmp_path / "stopped", until=2)
    torch.testing.assert_close(fit(chosen, inputs, tmp_path / "stopped"), straight, atol=0, rtol=0)


def test_the_loss_of_a_window_is_given_its_caption(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen, seen = config(classes=True), list[Condition]()
    setup = started(chosen, inputs, tmp_path)

    def engine(x: Tensor, t: Tensor, condition: Condition, start: Tensor, rng: Any) -> Tensor:
        seen.append(condition)
        return torch.zeros_like(x)

    batch = next(iter(loader_of(chosen, inputs, setup.target, "train", batch=8)))
    rng = torch.Generator().manual_seed(0)
    finetune_latte._loss(chosen, setup.target, setup.model, latent_stages.turn(engine, batch, rng))
    assert seen[0].text is batch["text"] and seen[0].mask is batch["text_mask"] and seen[0].classes is not None
    assert {len(row) for row in batch["text"]} <= {2, 4, 6}
    spoken = [number for batch in heldout_of(chosen, setup) for number in batch["text_mask"].sum(1).tolist()]
    assert set(spoken) == {0, 4, 6}, "without random numbers the first caption, and clips without any come too"


def test_config_json_names_the_encoder_and_clips_without_captions_are_counted(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    from longtake.training.registry import lineage

    chosen = config()
    setup = started(chosen, inputs, tmp_path)
    facts = finetune_latte.facts(chosen, setup, lineage.read(tmp_path))
    record = column.read_text(inputs["text"])
    assert facts["text"]["encoder"] == dict(record.encoder) and facts["text"]["uri"] == inputs["text"]
    assert len(facts["text"]["digest"]) == 64 and json.dumps(facts)
    counts = finetune_latte.counts(chosen, setup)
    silent = sum(
        not batch["text_mask"].any() for batch in loader_of(chosen, inputs, setup.target, "train", batch=1, epochs=1)
    )
    assert counts["train_clips_without_captions"] == silent > 0
    without = started(
        config(text=None, model=TINY), {k: v for k, v in inputs.items() if k != "text"}, tmp_path / "none"
    )
    assert "train_clips_without_captions" not in finetune_latte.counts(config(text=None, model=TINY), without)


@pytest.mark.usefixtures("group")
def test_generated_videos_are_of_the_captions_of_heldout_clips(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(eval_videos=3, conditioning=0.0)
    setup = started(chosen, inputs, tmp_path)
    awake(setup.model)
    (tmp_path / "heldout").mkdir()
    summary = finetune_latte.evaluate(chosen, setup, tmp_path / "heldout")
    videos = json.loads((tmp_path / "heldout" / "generated.json").read_text())["videos"]
    assert [video["prompt"] for video in videos] == ["a red square", "a blue circle moves left", "a red square"]
    assert summary["heldout_loss"] > 0


def test_a_model_of_texts_is_judged_on_captions(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config()
    setup = started(chosen, inputs, tmp_path)
    from longtake.training.registry import lineage

    facts = finetune_latte.facts(chosen, setup, lineage.read(tmp_path)) | {"model": "latte"}
    judged = Judged("models:/worded/1", awake(setup.model), facts)
    gate = Gate(metrics={"loss": {"better": "lower"}}, samples=4)
    rows, _ = rows_of(judged, None, inputs, gate)
    nobody = spoken.column(tmp_path / "text", latent_stages.labelled(inputs["dataset"], tmp_path / "dataset"))
    assert len(rows) == 4 and nobody
    with pytest.raises(
        UserError, match=r"^text: models:/worded/1 has learned text; name what their `cache_text` stage"
    ):
        rows_of(judged, None, {k: v for k, v in inputs.items() if k != "text"}, gate)


# what is refused


def test_texts_that_do_not_fit_are_refused_in_one_line(inputs: dict[str, str], tmp_path: Path) -> None:
    record = column.read_text(inputs["text"])
    empty = torch.from_numpy(record.empty()).to(torch.bfloat16)
    cases = {
        "text: .* are of the dataset /elsewhere, not of": {"dataset": "/elsewhere"},
        "text: .*: the dataset has changed since they were made; run their `cache_text` stage again": {"digests": {"train": "a", "val": "b"}},
        "text: .* has no column text-other; run their `cache_text` stage again": {"column": "text-other"},
    }  # fmt: skip
    for number, (said, changes) in enumerate(cases.items()):
        folder = str(tmp_path / str(number))
        column.write_text(folder, replace(record, **changes), empty)
        with pytest.raises(UserError, match=said) as e:
            started(config(), inputs | {"text": folder}, tmp_path / f"run-{number}")
        assert "\n" not in str(e.value)
    # captions that are of another state, and texts whose view lacks clips to learn from
    named = replace(record, captions_digests=dict.fromkeys(record.digests, "older"))
    column.write_text(str(tmp_path / "older"), named, empty)
    with pytest.raises(UserError, match=r"text: .*: captions have changed since; run their `cache_text` stage again"):
        text_of(inputs | {"text": str(tmp_path / "older")})
    with pytest.raises(UserError, match="no text here"):
        text_of(inputs | {"text": str(tmp_path)})


def test_a_dataset_without_captions_is_refused(dataset: str, tmp_path: Path) -> None:
    made = latent_stages.inputs(tmp_path / "silent", dataset, join=0.0)
    made["text"] = spoken.column(tmp_path / "text", made["dataset"], lambda number: ())
    with pytest.raises(UserError, match="no training clip that there is has a caption; make some by a `caption` stage"):
        started(config(), made, tmp_path / "run")


def test_guidance_without_dropout_is_refused_before_training(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(model=TINY | {"text_dropout": 0.0})
    setup = started(chosen, inputs, tmp_path)
    with pytest.raises(UserError, match=r"^guidance is 2: this model was trained with text_dropout: 0"):
        finetune_latte.objective(chosen, setup)
    assert finetune_latte.objective(config(model=TINY | {"text_dropout": 0.0}, guidance=1.0), setup)


def test_guidance_of_each_is_registered_as_plain_data(inputs: dict[str, str], tmp_path: Path) -> None:
    apart = {"classes": 2.0, "text": 6.0}
    chosen = config(classes=True, guidance=apart)
    setup = started(chosen, inputs, tmp_path)
    facts = json.loads(json.dumps(finetune_latte.facts(chosen, setup, lineage.read(tmp_path))))
    assert facts["sampling"] == {"steps": 2, "guidance": apart, "shift": 1.0, "overlap": 1}
    assert fields_of(facts)["settings"] == chosen.settings()
    with pytest.raises(
        UserError, match=r"^guidance: classes is 2, and this model has learned no classes; leave it out"
    ):
        finetune_latte.objective(config(guidance=apart), started(config(), inputs, tmp_path / "unlabelled"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": None}, "model: text_dropout: has no effect without texts; name a `cache_text` stage in text"),
        ({"model": TINY | {"text_width": 8}}, "text_width follows from the stage's other settings"),
        ({"model": TINY | {"text_null": "nothing"}}, "text_null"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**changes)


def test_a_recipe_whose_texts_are_of_another_dataset_is_refused() -> None:
    class Other:
        dataset = "others"

    with pytest.raises(ValueError, match="text: are of the dataset others, not of dataset"):
        check(config(), {"text": Other()})  # type: ignore[dict-item]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from latent_stages.mlflow_run(tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_champion_of_texts_is_registered_and_another_goes_on_from_it(
    inputs: dict[str, str], store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = finetune_latte.run(config(classes=True), inputs, str(tmp_path / "out"))
    model, facts = registry.load_with_facts("models:/latte@champion")
    assert isinstance(model, Latte) and model.config.text_dropout == 0.5
    assert facts["text"]["encoder"]["digest"] == spoken.Counting.digest and facts["lineage"]["inputs"]["text"]["digest"]
    assert result["metrics"]["train_clips_without_captions"] > 0
    further = config(classes=True, base="models:/latte@champion", model=None, steps=2)
    there = inputs | {"base": further.base or ""}
    monkeypatch.setenv("MLFLOW_RUN_ID", store)
    assert finetune_latte.run(further, there, str(tmp_path / "further"))["uri"] == "models:/latte/2"
