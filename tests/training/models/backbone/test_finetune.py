"""Fine-tuning transformers of other libraries: what is learned, at which times, of what, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import foreign_stages
import latent_stages
import numpy as np
import pytest
import spoken
import tiny_foreign
import torch
import yaml
from flat import nested
from torch import Tensor

from longtake.datasets.errors import Failure, UserError
from longtake.datasets.text import TextConfig
from longtake.training import checkpoint, registry
from longtake.training.fit import Source
from longtake.training.foreign import adapters
from longtake.training.foreign.backbone import Backbone
from longtake.training.foreign.load import codec_of
from longtake.training.models.backbone import evaluate, finetune
from longtake.training.models.backbone.base import opened as base_of
from longtake.training.models.backbone.finetune import Config
from longtake.training.models.backbone.sample import accepts_of
from longtake.training.models.kind import Judged
from longtake.training.objective import Turn
from longtake.training.registry import disk, judge, lineage
from longtake.training.registry.gate import Gate, Window
from longtake.training.text import load_encoder

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

QUICK: dict[str, Any] = {
    "kind": "finetune_backbone",
    "dataset": "dataset",
    "latents": "latents",
    "text": "text",
    "base": "base",
    "frames": 9,
    "fps": 12.0,
    "lora": {"rank": 4},
    "steps": 4,
    "batch": 4,
    "lr": 1e-3,
    "warmup_steps": 0,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 0,
    "sample_steps": 2,
    "eval_videos": 1,
    "eval_clips": 2,
}
Given = dict[str, str]


def config(**changes: Any) -> Config:
    return Config(**nested(QUICK | changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backbones")


@pytest.fixture(scope="module")
def wan(root: Path, dataset: str) -> Given:
    """A tiny Wan, and a dataset with its latents and texts: read them, do not change them."""
    return foreign_stages.inputs(root / "wan", dataset)


@pytest.fixture(scope="module")
def of_kind(root: Path, dataset: str, wan: Given) -> Callable[[str], Given]:
    """The same of other pipelines, made when they are asked for."""
    made = {"wan": wan}

    def inputs(kind: str) -> Given:
        if kind not in made:
            made[kind] = foreign_stages.inputs(root / kind, dataset, kind)
        return made[kind]

    return inputs


def started(chosen: Config, given: Given, folder: Path) -> Any:
    return latent_stages.prepared(chosen, given, folder, finetune)


def fit(chosen: Config, given: Given, folder: Path, until: int | None = None, log: Any = None) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = latent_stages.fit(finetune, chosen, given, folder, until, log)
    return weights


def measured(chosen: Config, given: Given, folder: Path) -> tuple[dict[str, Any], Backbone]:
    """The evaluation of a finished training, as a rank makes it, and what was trained."""
    setup = started(chosen, given, folder)
    setup.model.load_state_dict(checkpoint.trained(folder, chosen))
    setup.model.eval()
    (folder / "heldout").mkdir()
    return finetune.evaluate(chosen, setup, folder / "heldout"), setup.model


class Seen:
    """An engine that keeps what it is asked, and knows the answer."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.asked: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        self.answer = answer

    def __call__(self, x: Tensor, t: Tensor, condition: Any, rng: Any, **given: Any) -> Tensor:
        self.asked.append((x, t, given))
        return self.answer(x, t) if self.answer else torch.zeros_like(x)


def losses(chosen: Config, setup: Any, engine: Any, passes: int = 8) -> list[float]:
    """Losses of the first batches."""
    loader, objective = finetune.loader(chosen, setup, 0, 1), finetune.objective(chosen, setup)
    values = []
    for number, batch in enumerate(loader.at(range(passes))):
        rng = torch.Generator().manual_seed(number)
        values.append(float(objective.loss(Turn("model", {"model": engine}, batch, number, rng, 0, {}))[0]))
    return values


# what is learned


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("kind", "more"), [("wan", {}), ("ltx", {}), ("wan", {"precision": "bf16", "zero_stage": 2})])
def test_the_written_adapter_does_on_a_fresh_base_what_was_trained(
    of_kind: Callable[[str], Given], tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    chosen, log = config(**more), latent_stages.Log()
    given = of_kind(kind)
    fit(chosen, given, tmp_path, log=log)
    assert all(np.isfinite(row["loss"]) for row in log.steps)
    shares = [sum(row[f"times/{n}"] for n in range(8)) for row in log.steps]
    assert shares == pytest.approx([1.0] * 4)
    summary, model = measured(chosen, given, tmp_path)
    assert summary["heldout_loss"] != summary["heldout_loss_base"]
    assert summary["heldout_loss"] == pytest.approx(np.mean([summary[f"heldout_loss_at_{n}"] for n in range(8)]))
    assert [
        video["frames"] for video in json.loads((tmp_path / "heldout" / "generated.json").read_text())["videos"]
    ] == [9]

    # what a user does: the base anew, and the files of the adapter
    fresh, _ = registry.load_with_facts(given["base"], "transformer")
    fresh = fresh.to(model.dtype)
    adapters.load_into(fresh, adapters.read(tmp_path / "adapter", model.config.class_name))
    weights = fresh.state_dict()
    for name, value in model.state_dict().items():
        if name.startswith("net."):
            torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("group")
def test_an_adapter_that_is_broken_or_does_nothing_is_refused(
    wan: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(steps=1)
    fit(chosen, wan, tmp_path)
    changes = checkpoint.changes(tmp_path, chosen)
    assert changes and all(".lora_" in name for name in changes)
    spoilt = {
        "not finite": {name: value * float("nan") for name, value in changes.items()},
        "has a held-out loss of": {name: value * 3 for name, value in changes.items()},
    }
    for says, values in spoilt.items():
        monkeypatch.setattr(checkpoint, "changes", lambda *_, values=values: values)
        shutil.rmtree(tmp_path / "heldout", ignore_errors=True)
        with pytest.raises(Failure, match=says):
            measured(chosen, wan, tmp_path)
    monkeypatch.undo()

    # a rate of next to nothing
    still = config(steps=1, lr=1e-30)
    fit(still, wan, tmp_path / "still")
    with pytest.raises(Failure, match="changes nothing of what the base does; train for longer, or with a higher lr"):
        measured(still, wan, tmp_path / "still")


@pytest.mark.usefixtures("group")
def test_the_base_is_measured_with_the_same_vector_of_no_text(
    of_kind: Callable[[str], Given], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[Backbone] = []

    def opened(*arguments: Any) -> tuple[Backbone, dict[str, Any]]:
        base, facts = base_of(*arguments)
        bases.append(base)
        return base, facts

    chosen, given = config(pooled="pooled", steps=1), of_kind("hunyuan")
    fit(chosen, given, tmp_path)
    monkeypatch.setattr(evaluate, "opened", opened)
    _, model = measured(chosen, given, tmp_path)
    assert model.empty_pooled is not None and model.empty_pooled.any()
    assert bases[0].empty_pooled is not None and torch.equal(bases[0].empty_pooled.cpu(), model.empty_pooled.cpu())


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("lora", [{"rank": 4}, None])
def test_a_stopped_training_ends_with_the_same_weights(wan: Given, tmp_path: Path, lora: Any) -> None:
    chosen = config(lora=lora, ema_half_lives=[5.0], frames=[17, 9], max_tokens=60)
    straight = fit(chosen, wan, tmp_path / "straight")
    fit(chosen, wan, tmp_path / "stopped", until=2)
    torch.testing.assert_close(fit(chosen, wan, tmp_path / "stopped"), straight, atol=0, rtol=0)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "more",
    [
        {"lora": None, "zero_stage": 3, "precision": "bf16"},
        {"lora": None, "precision": "bf16", "activation_checkpointing": True},
        {"zero_stage": 3, "activation_checkpointing": True},
    ],
)
def test_it_trains_in_every_way(wan: Given, tmp_path: Path, more: dict[str, Any]) -> None:
    log = latent_stages.Log()
    fit(config(steps=2, **more), wan, tmp_path, log=log)
    assert all(np.isfinite(row["loss"]) and row["updates_left_out"] == 0 for row in log.steps)


@pytest.mark.usefixtures("group")
def test_activation_checkpointing_changes_nothing(wan: Given, tmp_path: Path) -> None:
    plain, saving = (
        fit(config(steps=2, activation_checkpointing=saves), wan, tmp_path / str(saves)) for saves in (False, True)
    )
    torch.testing.assert_close(plain, saving, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(
    wan: Given, tmp_path: Path, module_ranks: Callable[[int, str], Any], group: None
) -> None:
    pair = module_ranks(2, latent_stages.rank_of(finetune))
    for number, (more, alone) in enumerate([({}, {}), ({"zero_stage": 3, "precision": "bf16"}, {"precision": "bf16"})]):
        chosen = config(steps=2, text_dropout=0.0, **more)
        job = {"settings": chosen.model_dump(mode="json"), "inputs": wan, "folder": str(tmp_path / f"two-{number}")}
        pair.send(job)
        both = pair.answers()[0]
        one = fit(config(steps=2, text_dropout=0.0, **alone), wan, tmp_path / f"one-{number}")
        assert both.keys() == one.keys()
        # times and noise are drawn by each rank: what is frozen is the same, and what learns has moved as far
        for name, value in one.items():
            theirs = torch.tensor(both[name])
            if ".lora_" not in name:
                torch.testing.assert_close(theirs, value, atol=0, rtol=0, check_dtype=False)
            elif ".lora_up" in name:
                assert 0.3 < theirs.norm() / value.norm() < 3


@pytest.mark.slow
@pytest.mark.usefixtures("group")
def test_200_steps_of_lora_lower_the_heldout_loss(wan: Given, tmp_path: Path) -> None:
    chosen = config(steps=200, lr=3e-3, checkpoint_every=200, log_every=50, eval_clips=8)
    fit(chosen, wan, tmp_path)
    summary, _ = measured(chosen, wan, tmp_path)
    assert summary["heldout_loss"] < 0.5 * summary["heldout_loss_base"]
    assert all(summary[f"heldout_loss_at_{n}"] < summary[f"heldout_loss_base_at_{n}"] for n in range(8))
    assert summary["against"][0]["beats"]


# times, start images, batches


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_expert_learns_its_own_times_alone(of_kind: Callable[[str], Given], tmp_path: Path, expert: str) -> None:
    chosen, given = config(expert=expert), of_kind("wan22_a14b")
    setup, seen = started(chosen, given, tmp_path), Seen()
    losses(chosen, setup, seen)
    t = torch.cat([t for _, t, _ in seen.asked])
    assert ((t >= 0.875) if expert == "high" else (t <= 0.875)).all() and t.std() > 0
    origins = {name: {"uri": name} for name in ("vae", "latents", "text", "base")}
    assert finetune.facts(chosen, setup, {"inputs": origins})["expert"] == expert
    # each has the weights of its own folder
    stored = tiny_foreign.of_class("WanTransformer3DModel", tiny_foreign.WAN, 0 if expert == "high" else 1)
    assert torch.equal(setup.model.net.proj_out.weight, stored.proj_out.weight)


@pytest.mark.usefixtures("group")
def test_the_shift_is_that_of_the_scheduler_or_the_configs(wan: Given, tmp_path: Path) -> None:
    means = []
    for shift in (None, 3.0, 1.0):
        chosen, seen = config(shift=shift), Seen()
        losses(chosen, started(chosen, wan, tmp_path), seen)
        means.append(torch.cat([t for _, t, _ in seen.asked]))
    assert torch.equal(means[0], means[1]) and means[2].mean() < means[0].mean() - 0.1


@pytest.mark.usefixtures("group")
def test_of_a_share_of_windows_the_first_latent_is_clean_and_not_learned(wan: Given, tmp_path: Path) -> None:
    chosen = config(image_conditioning=0.5)
    setup = started(chosen, wan, tmp_path)
    assert setup.model.config.expand_timesteps and "start" in accepts_of({"config": setup.model.config.model_dump()})
    loader = finetune.loader(chosen, setup, 0, 1)
    firsts = [batch["latent"][:, 0].float() for batch in loader.at(range(8))]

    def answer(x: Tensor, t: Tensor) -> Tensor:
        # the velocity is wrong in clean latents alone
        return torch.where(t[:, None, :, None, None] == 0, 1e6, 0.0).expand_as(x)

    seen = Seen(answer)
    assert max(losses(chosen, setup, seen)) < 100
    clean = torch.cat([t[:, 0] == 0 for _, t, _ in seen.asked])
    assert 0.2 < clean.float().mean() < 0.8
    for (x, t, _), x0 in zip(seen.asked, firsts, strict=True):
        assert (t[:, 1:] > 0).all() and torch.equal(x[t[:, 0] == 0][:, :, 0], x0[t[:, 0] == 0][:, :, 0])


@pytest.mark.usefixtures("group")
def test_a_model_from_an_image_sees_the_first_frame_and_then_grey(
    of_kind: Callable[[str], Given], tmp_path: Path
) -> None:
    chosen, given = config(), of_kind("wan_i2v")
    setup, seen = started(chosen, given, tmp_path), Seen()
    assert setup.image_share == 1 and not setup.holds
    losses(chosen, setup, seen, passes=1)
    (_, t, beside), codec = seen.asked[0], setup.target.codec
    batch = next(iter(finetune.loader(chosen, setup, 0, 1).at([0])))
    with torch.no_grad():
        frame = codec.decode(batch["latent"][:, 0, :, :1].float())
        grey = torch.cat([frame.clamp(-1, 1), torch.zeros(4, 3, 8, *frame.shape[3:])], dim=2)
        torch.testing.assert_close(beside["image"], codec.encode(grey).mode(), atol=1e-5, rtol=1e-5)
    assert t.ndim == 1 and beside["fps"] == 12


@pytest.mark.usefixtures("group")
def test_a_model_with_vectors_of_texts_gets_those_of_the_second_encoder(
    of_kind: Callable[[str], Given], tmp_path: Path
) -> None:
    chosen, given = config(pooled="pooled"), of_kind("hunyuan")
    setup, seen = started(chosen, given, tmp_path), Seen()
    losses(chosen, setup, seen, passes=1)
    batch = next(iter(finetune.loader(chosen, setup, 0, 1).at([0])))
    for row, (states, mask) in enumerate(zip(batch["pooled"], batch["pooled_mask"], strict=True)):
        if mask.any():
            assert torch.equal(seen.asked[0][2]["pooled"][row], states[mask][-1])
    fit(config(pooled="pooled", steps=1), given, tmp_path / "run")

    # a gate measures it with them
    folder, facts = tmp_path / "model", finetune.facts(chosen, setup, lineage.read(tmp_path))
    disk.save(folder, "backbone", setup.model.config.model_dump(mode="json"), setup.model.state_dict(), facts)
    one, gate = judge.load(str(folder)), Gate.model_validate({"metrics": {"loss": {"better": "lower"}}, "samples": 2})
    ours, theirs = judge.rows_of(one, one, given, gate)
    assert ours == theirs and len(ours) == 2 and all(0 < row["loss"] < 1e6 for row in ours.values())
    with pytest.raises(UserError, match=r"pooled: .* has learned a vector of each text; name what their `cache_text`"):
        judge.rows_of(one, None, {name: uri for name, uri in given.items() if name != "pooled"}, gate)


@pytest.mark.usefixtures("group")
def test_batches_are_bound_by_their_tokens_and_the_largest_comes_first(
    wan: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = config(frames=[33, 17, 9], max_tokens=60, steps=2)
    setup = started(chosen, wan, tmp_path)
    loader, objective = finetune.loader(chosen, setup, 0, 1), finetune.objective(chosen, setup)
    assert objective.tokens and objective.largest
    sizes = {batch["latent"].shape[3]: objective.tokens(batch) for batch in loader.at(range(loader.batches_per_epoch))}
    assert len(sizes) > 1 and max(sizes.values()) <= 60
    largest = objective.largest()
    assert objective.tokens(largest) == max(sizes.values())
    lines, _ = finetune.announce(chosen, setup, loader)
    assert "windows of 3x4x6 latents, 18 tokens: " in lines[0] and "times: shift 3; of each eighth" in lines[-1]

    fit(chosen, wan, tmp_path / "run")
    assert (
        f"the largest batch, {len(largest['key'])} windows, {max(sizes.values())} tokens: " in capsys.readouterr().out
    )


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("bound", "frames"), [(36, 9), (35, 17), (None, 17)])
def test_a_plan_takes_the_batch_that_is_tried_first(wan: Given, tmp_path: Path, bound: int | None, frames: int) -> None:
    # one window of 17 frames has 30 tokens, two of 9 have 36
    chosen = config(frames=[17, 9], max_tokens=bound)
    setup = started(chosen, wan, tmp_path)
    largest = finetune.objective(chosen, setup).largest
    assert largest
    sources = {name: Source(None, None, uri, {}) for name, uri in wan.items()}
    wanted, planned = largest(), finetune.largest(chosen, sources, chosen.batch).batch
    assert planned["latent"].shape == wanted["latent"].shape and wanted["latent"].shape[3] == 1 + (frames - 1) // 4
    with pytest.raises(UserError, match="max_tokens: 29 hold no window of 30 tokens; raise it, or lower `frames`"):
        finetune.largest(config(frames=[17, 9], max_tokens=29), sources, chosen.batch)


# what is refused


def wrong_latents(wan: Given, folder: Path) -> str:
    """Latents of another autoencoder of the same channels."""
    other = tiny_foreign.pipeline_folder(folder / "other", "wan", 7)
    codec, _ = codec_of(other)
    return latent_stages.encoded(folder / "latents", wan["dataset"], codec, str(other), join=0.0)  # type: ignore[arg-type]


def wrong_text(wan: Given, folder: Path) -> str:
    """Texts of another encoder of the same width."""
    other = tiny_foreign.pipeline_folder(folder / "other", "wan", 7)
    encoder = load_encoder(TextConfig(encoder=str(other), clean="wan", length=64))
    return spoken.column(folder / "text", wan["dataset"], encoder=encoder, name="text-other")


def narrow_text(wan: Given, folder: Path) -> str:
    return spoken.column(folder / "text", wan["dataset"], name="text-narrow")


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("wan", {"fps": None}, r"fps: \S+ makes 16 frames a second, and the clips have 12, .* clip.fps: 16, or say fps: 12"),
        ("wan", {"fps": 24.0}, r"fps: is 24 frames a second, and the clips .* cut them again with clip.fps: 24, or say fps: 12"),
        ("wan", {"frames": 10}, r"frames: 10: latents have windows of 1 \+ 4n frames, such as 9 or 13"),
        ("wan", {"expert": "high"}, "has no second transformer; leave `expert` out"),
        ("wan", {"max_tokens": 17}, "positions: 68 a process hold no window of 72 positions of latents; raise it"),
        ("wan22_a14b", {}, "has a transformer for high noise and one for low; say which by `expert`"),
        ("wan_i2v", {"image_conditioning": 0.5}, "image_conditioning: .* always needs a start image; give 1, or leave it out"),
        ("hunyuan", {}, r"pooled: \S+ takes a vector of each text .* name texts by the second text encoder"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    of_kind: Callable[[str], Given], tmp_path: Path, kind: str, changes: dict[str, Any], says: str
) -> None:
    given = {name: uri for name, uri in of_kind(kind).items() if name != "pooled"}
    chosen = config(**changes)
    with pytest.raises(UserError, match=says) as caught:
        finetune.loader(chosen, started(chosen, given, tmp_path), 0, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("field", "make", "says"),
    [
        ("latents", wrong_latents, r"latents: \S+ are of \S+other, another autoencoder than that of \S+pipeline; encode by its own"),
        ("text", wrong_text, r"text: \S+ are of \S+, another encoder than that of \S+pipeline; encode by its own"),
        ("text", narrow_text, r"text: \S+ has states of 8 values, and \S+ takes 32; encode by the text encoder of its own"),
    ],
)  # fmt: skip
def test_columns_of_another_pipeline_are_one_line(
    wan: Given, tmp_path: Path, field: str, make: Callable[[Given, Path], str], says: str
) -> None:
    copy = str(shutil.copytree(wan["dataset"], tmp_path / "dataset"))
    given = foreign_stages.moved(wan, copy, tmp_path / "records")
    given[field] = make(given, tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        started(config(), given | {"vae": str(tmp_path / "other")} if field == "latents" else given, tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_texts_by_other_settings_than_the_bases_are_one_line_that_says_what_to_write(
    of_kind: Callable[[str], Given], tmp_path: Path, kind: str
) -> None:
    chosen = config(pooled="pooled" if kind == "hunyuan" else None)
    given = foreign_stages.moved(of_kind(kind), of_kind(kind)["dataset"], tmp_path)

    def encoded(name: str, **settings: Any) -> str:
        """A column of texts by the base's own encoder."""
        encoder = load_encoder(TextConfig(encoder=given["base"], length=64, **settings))
        return spoken.column(tmp_path / name, given["dataset"], encoder=encoder, name=f"text-{kind}-{name}")

    says = "text: .* has states of clean: whitespace.*, and .* has learned others; write in its `cache_text` stage: "
    with pytest.raises(UserError, match=says) as caught:
        started(chosen, given | {"text": encoded("default")}, tmp_path / "run")
    assert "\n" not in str(caught.value)
    said = str(caught.value).partition("stage: ")[2]
    started(chosen, given | {"text": encoded("said", **yaml.safe_load(f"{{{said}}}"))}, tmp_path / "again")


@pytest.mark.usefixtures("group")
def test_vectors_of_texts_by_other_settings_are_one_line(of_kind: Callable[[str], Given], tmp_path: Path) -> None:
    given = of_kind("hunyuan")
    encoder = load_encoder(TextConfig(encoder=str(Path(given["base"]) / "text_encoder_2"), clean="none", layer=-2))
    other = spoken.column(tmp_path / "pooled", given["dataset"], encoder=encoder, name="text-pooled-other")
    with pytest.raises(UserError, match=r"pooled: .* has states of layer: -2, .* `cache_text` stage: layer: -1$"):
        started(config(pooled="pooled"), given | {"pooled": other}, tmp_path / "run")


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("kind", "part"), [("wan", "transformer"), ("wan22_a14b", "transformer"), ("wan22_a14b", "transformer_2")]
)
def test_a_transformer_in_its_pipelines_folder_is_that_of_the_pipeline(
    of_kind: Callable[[str], Given], tmp_path: Path, kind: str, part: str
) -> None:
    given = of_kind(kind)
    expert = None if kind == "wan" else "low" if part == "transformer_2" else "high"
    chosen, inside = config(expert=expert, fps=None), given | {"base": str(Path(given["base"]) / part)}
    with pytest.raises(UserError, match=r"fps: \S+ makes 16 frames a second"):
        started(chosen, inside, tmp_path / "rate")
    chosen = config(expert=expert)
    setup = started(chosen, inside, tmp_path / "run")
    assert setup.model.config == started(chosen, given, tmp_path / "whole").model.config
    # its columns are compared with the parts beside it
    moved = foreign_stages.moved(given, given["dataset"], tmp_path)
    name, says = ("text", "another encoder") if part == "transformer_2" else ("latents", "another autoencoder")
    other = (wrong_text if name == "text" else wrong_latents)(moved, tmp_path)
    more = {"vae": str(tmp_path / "other")} if name == "latents" else {}
    with pytest.raises(UserError, match=f"{says} than that of .*; encode by its own: encoder: {given['base']}$"):
        started(chosen, inside | {name: other} | more, tmp_path / "other-run")


@pytest.mark.usefixtures("group")
def test_a_base_that_is_no_transformer_of_another_library_is_one_line(wan: Given, tmp_path: Path) -> None:
    ours = latent_stages.saved(latent_stages.vae(), tmp_path / "vae")
    with pytest.raises(UserError, match="is a PVVAE, and no video transformer of another library; name a folder in"):
        started(config(), wan | {"base": ours}, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora": {"rank": 4, "full": ["net"]}}, "an adapter has low-rank changes alone"),
        ({"frames": []}, "names no length"),
        ({"eval_probes": 4}, "a model of another library is not probed"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": [9, 10]}, r"^frames: 10: .* makes 1 \+ 4n frames, such as 9 or 13$"),
        ({"expert": "low"}, "has no second transformer; leave `expert` out"),
    ],
)
def test_a_recipe_is_refused_that_its_base_cannot_follow(wan: Given, changes: dict[str, Any], says: str) -> None:
    finetune.check(config(base=wan["base"]), {})
    finetune.check(config(base="/only/on/the/cluster", **changes), {})
    with pytest.raises(ValueError, match=says):
        finetune.check(config(base=wan["base"], **changes), {})


# registered


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from latent_stages.mlflow_run(tmp_path / "store", monkeypatch)


@pytest.mark.slow
def test_it_is_measured_registered_judged_and_fine_tuned_again(wan: Given, store: str, tmp_path: Path) -> None:
    import mlflow

    chosen = config(name="wan-ft")
    result = finetune.run(chosen, wan, str(tmp_path / "out"))
    assert result["uri"] == "models:/wan-ft/1" and result["metrics"]["train_clips"] > 0
    artifacts = {item.path for item in mlflow.MlflowClient().list_artifacts(store, "adapter")}
    assert "adapter/adapter_model.safetensors" in artifacts

    model, facts = registry.load_with_facts("models:/wan-ft@champion")
    assert isinstance(model, Backbone) and model.config.shape == (3, 4, 6)
    assert facts["window"] == {"frames": 9, "stride": 1, "size": [32, 48], "fps": 12.0}
    assert facts["base"]["uri"] == wan["base"] and facts["expert"] is None and facts["classes"] == []
    assert facts["vae"]["uri"] == wan["base"] and facts["text"]["encoder"]["width"] == 32

    # the judge says of each clip what the evaluation says of all
    from longtake.training.models import judge_of

    measuring, judged = judge_of(facts), Judged("", model.eval(), facts)
    options = measuring.options(judged, wan, Window(frames=9))
    assert set(options["columns"]) == {"latent", "text"} and options["clip_starts"] == 1
    latent = torch.zeros(1, 2, 4, 3, 4, 6)
    assert measuring.figures(judged, {"latent": latent}, None, 0, 1.0)["loss"] > 0

    # the next training begins with it, at its frame rate, and knows its texts
    again = config(name="wan-ft", fps=None, lora=None, steps=1, zero_stage=1)
    setup = started(again, wan | {"base": "models:/wan-ft@champion"}, tmp_path / "again")
    assert setup.target.fps == 12 and torch.equal(setup.model.empty, model.empty)
