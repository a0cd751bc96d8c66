"""The stage that trains the transformers of TATS: resumed exactly, on its conditions, measured, registered; what it refuses."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import latent_stages
import numpy as np
import pytest
import tats_stages
import torch
from flat import nested
from pydantic import ValidationError

from longtake.datasets import clip
from longtake.datasets import tokens as records
from longtake.datasets.errors import UserError
from longtake.datasets.tokens import read_tokens
from longtake.training import registry
from longtake.training.config import RunConfig
from longtake.training.loop import train
from longtake.training.models import kind_of
from longtake.training.models.common.video import concatenated
from longtake.training.models.generator import Request, Scene
from longtake.training.models.tats import train as pretrain_tats
from longtake.training.models.tats.evaluate import heldout_loss
from longtake.training.models.tats.train import Config, check
from longtake.training.registry.gate import Gate
from longtake.training.registry.judge import Judged, rows_of

pytestmark = pytest.mark.usefixtures("one_thread", "group")

QUICK: dict[str, Any] = {
    "kind": "pretrain_tats",
    "dataset": "dataset",
    "tokens": "tokens",
    "model": tats_stages.TINY,
    "every": tats_stages.EVERY,
    "steps": 4,
    "batch": 4,
    "lr": 1e-3,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 0,
    "eval_clips": 3,
    "eval_videos": 2,
}
WORDS = {"captions": "captions", "words": 60, "model": tats_stages.TINY | {"word_length": 6, "text_dropout": 0.5}}


@pytest.fixture(scope="module")
def made(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Read them, do not change them."""
    return tats_stages.inputs(tmp_path_factory.mktemp("tats"), dataset)


@pytest.fixture(scope="module")
def anchors(made: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that makes anchors, untrained."""
    folder = tmp_path_factory.mktemp("anchors") / "model"
    tats_stages.save_tats(folder, read_tokens(made["tokens"]).model["uri"], "anchors")
    return str(folder)


def only(made: dict[str, str], *more: str, **others: str) -> dict[str, str]:
    """The dataset and its tokens, with some more of the inputs that there are, and others."""
    return {name: made[name] for name in ("dataset", "tokens", *more)} | others


def config(**changes: Any) -> Config:
    # anchors alone make no videos
    idle = {"eval_videos"} if changes.get("mode") == "anchors" else set()
    return Config(**nested({name: value for name, value in QUICK.items() if name not in idle} | changes))


def fit(chosen: Config, inputs: dict[str, str], folder: Path, until: int | None = None, log: Any = None) -> Any:
    return latent_stages.fit(pretrain_tats, chosen, inputs, folder, until, log)


def started(chosen: Config, inputs: dict[str, str], folder: Path) -> Any:
    return latent_stages.prepared(chosen, inputs, folder, pretrain_tats)


@pytest.mark.parametrize("kind", ["classes", "words", "text", "anchors", "interpolate"])
def test_a_training_stopped_after_each_step_ends_with_the_same_weights_and_reads_no_video(
    made: dict[str, str], anchors: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "classes": {"classes": True},
        "words": WORDS,
        "text": {"text": "text", "model": tats_stages.TINY | {"text_dropout": 0.5}},
        "anchors": {"mode": "anchors"},
        "interpolate": {"mode": "interpolate", "anchors": "anchors"},
    }
    more = {"words": ("captions",), "text": ("text",)}.get(kind, ())
    inputs = only(made, *more, **({"anchors": anchors} if kind == "interpolate" else {}))
    monkeypatch.setattr(clip, "decoded", None)
    chosen = config(**changes[kind])
    straight = fit(chosen, inputs, tmp_path / "straight")
    for step in (1, 2, 3):
        fit(chosen, inputs, tmp_path / "stopped", until=step)
    torch.testing.assert_close(fit(chosen, inputs, tmp_path / "stopped"), straight, atol=0, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 1},
        {"zero_stage": 2, "precision": "bf16"},
        {"zero_stage": 3, "classes": True, "guidance": 2.0},
        {"model": tats_stages.TINY | {"activation_checkpointing": True}},
        {"mode": "interpolate", "anchors": "anchors", "zero_stage": 3},
    ],
    ids=str,
)
def test_losses_fall_and_samples_are_shown_in_every_way_of_training(
    made: dict[str, str], anchors: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    chosen = config(**{"steps": 6, "lr": 1e-2} | changes)
    inputs = only(made, **({"anchors": anchors} if chosen.anchors else {}))
    setup = started(chosen, inputs, tmp_path)
    log = latent_stages.Log()
    running = chosen.model_copy(update={"run": RunConfig(sample_every=6, log_every=1, workers=0)})
    train(pretrain_tats.objective(chosen, setup), pretrain_tats.loader(chosen, setup, 0, 1), running, tmp_path, log)  # type: ignore[arg-type]
    losses = [row["loss"] for row in log.steps]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert log.videos == {"generated": (tats_stages.FRAMES, 2 * 16 + 2, 2 * 16 + 2, 3)}


@torch.no_grad()
def one_by_one(model: Any, tokens: torch.Tensor) -> float:
    """The mean loss of the predicted tokens, each of which is asked for with no more than what is before it."""
    sequence = model.config.sequence(tokens)
    losses = []
    for place in range(sequence.shape[1] - model.config.predicted, sequence.shape[1]):
        logits = model(sequence[:, :place], last=1)[:, 0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, sequence[:, place]))
    return float(torch.stack(losses).mean())


def test_the_loss_is_that_of_the_middle_alone_and_begins_at_that_of_chance(
    made: dict[str, str], anchors: str, tmp_path: Path
) -> None:
    for mode, predicted in (("base", 48), ("anchors", 32), ("interpolate", 16)):
        chosen = config(mode=mode, anchors="anchors" if mode == "interpolate" else None)
        inputs = only(made, **({"anchors": anchors} if mode == "interpolate" else {}))  # type: ignore[arg-type]
        setup = started(chosen, inputs, tmp_path / mode)
        setup.model.eval()
        batch = next(iter(pretrain_tats.loader_of(chosen, setup, "train", batch=4)))
        seen: list[Any] = []

        def engine(*given: Any, seen: list[Any] = seen, setup: Any = setup, **options: Any) -> torch.Tensor:
            seen.append((given[0].shape, options["last"]))
            return setup.model(*given, **options)

        turn = latent_stages.turn(engine, batch, torch.Generator().manual_seed(0))
        loss, _ = pretrain_tats._loss(setup, None, turn)
        assert loss.item() == pytest.approx(one_by_one(setup.model, batch["tokens"]), rel=1e-4)
        length = 31 if mode == "anchors" else 47
        assert seen == [(torch.Size([4, length]), predicted)]
        assert abs(loss.item() - np.log(32)) < 0.2
        # awake, so that each place has another loss
        tats_stages.awake(setup.model)
        loss, _ = pretrain_tats._loss(setup, None, turn)
        assert loss.item() == pytest.approx(one_by_one(setup.model, batch["tokens"]), rel=1e-4)
        heldout = heldout_loss(setup.model, batch, None)[0].mean().item()
        assert heldout == pytest.approx(loss.item(), rel=1e-4)


def test_the_words_are_those_of_the_training_clips_and_stay_with_the_run(made: dict[str, str], tmp_path: Path) -> None:
    chosen, inputs = config(**WORDS), only(made, "captions")
    setup = started(chosen, inputs, tmp_path)
    setup.words.check(["a red square", "a blue circle moves left"])
    with pytest.raises(UserError, match="no caption that this model has learned from has 'zebra'"):
        setup.words.check(["a zebra"])
    batch = next(iter(pretrain_tats.loader_of(chosen, setup, "train", batch=8)))
    condition = setup.condition(batch)
    lengths = [len((caption or "").split()) for caption in batch["caption"]]
    assert condition.mask.sum(1).tolist() == lengths and max(lengths) == 5
    before = (tmp_path / "words.json").read_bytes()
    started(config(**WORDS | {"words": 40}), inputs, tmp_path)
    assert (tmp_path / "words.json").read_bytes() == before


@pytest.mark.parametrize("mode", ["base", "anchors", "interpolate"])
def test_what_is_measured_is_that_of_the_model(made: dict[str, str], anchors: str, tmp_path: Path, mode: Any) -> None:
    chosen = config(mode=mode, anchors="anchors" if mode == "interpolate" else None)
    inputs = only(made, **({"anchors": anchors} if mode == "interpolate" else {}))
    setup = started(chosen, inputs, tmp_path)
    setup.model.eval()
    with torch.no_grad():
        setup.model.head.weight.zero_()  # every code is as likely
    (tmp_path / "heldout").mkdir()
    summary = pretrain_tats.evaluate(chosen, setup, tmp_path / "heldout")
    assert abs(summary["heldout_loss"] - np.log(32)) < 1e-5 and abs(summary["heldout_perplexity"] - 32) < 1e-3
    windows = [
        batch["tokens"][0] for batch in pretrain_tats.loader_of(chosen, setup, "val", batch=1, epochs=1, shuffle=False)
    ]
    predicted = {"base": (0, 1, 2), "anchors": (0, 2), "interpolate": (1,)}[mode]
    counts = np.ones(32)
    for path in Path(inputs["dataset"], "train").glob(f"*.{read_tokens(inputs['tokens']).column}.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                counts += np.bincount(np.load(io.BytesIO(tar.extractfile(member).read())).ravel(), minlength=32)  # type: ignore[union-attr]
    nats = -np.log(counts / counts.sum())
    expected = np.mean([nats[window[frame].numpy()] for window in windows[:3] for frame in predicted])
    assert summary["heldout_loss_codes"] == pytest.approx(expected)
    pairs = {"base": ((0, 1), (1, 2)), "anchors": ((0, 2),), "interpolate": ((0, 1),)}[mode]
    same = [(window[a] == window[b]).float().mean() for window in windows[:3] for a, b in pairs]
    assert summary["accuracy_copy"] == pytest.approx(float(np.mean(same)))
    assert [what["what"] for what in summary["against"]] == ["held-out loss", "share of tokens foretold"]
    assert [frame for frame, _ in summary["series"]["heldout_loss_by_step"]] == list(
        setup.model.config.order[setup.model.config.given :]
    )
    entries = json.loads((tmp_path / "heldout" / "drawn.json").read_bytes())["videos"]
    shown = {} if mode == "anchors" else {"seed-0.mp4": 12, "seed-1.mp4": 12, "longer.mp4": 48}
    assert {entry["file"]: entry["frames"] for entry in entries} == shown
    for name, frames in shown.items():
        assert len(clip.decode((tmp_path / "heldout" / name).read_bytes())) == frames


def test_a_base_is_continued_as_it_is(made: dict[str, str], tmp_path: Path) -> None:
    uri = read_tokens(made["tokens"]).model["uri"]
    base = tats_stages.save_tats(tmp_path / "base", uri)
    chosen = config(base="base", model={"label_dropout": 0.5})
    setup = started(chosen, only(made, base=str(tmp_path / "base")), tmp_path / "run")
    assert setup.model.config.label_dropout == 0.5 and "tensors are taken" in setup.note
    torch.testing.assert_close(setup.model.state_dict(), base.state_dict())
    tats_stages.save_tats(tmp_path / "wide", uri, width=32)
    wide = config(base="base", model={"width": 16})
    with pytest.raises(UserError, match=r"base: .*wide does not fit these settings: "):
        started(wide, only(made, base=str(tmp_path / "wide")), tmp_path / "other")


def test_what_does_not_fit_is_refused_in_one_line(made: dict[str, str], anchors: str, tmp_path: Path) -> None:
    uri = read_tokens(made["tokens"]).model["uri"]
    gap = only(made)
    tats_stages.save_tats(tmp_path / "sparse", uri, "anchors", every=3, shape=(4, 4, 4))
    tats_stages.save_tats(tmp_path / "many", uri, "anchors", codes=64)
    tats_stages.save_tats(tmp_path / "base", uri)
    tats_stages.save_tats(tmp_path / "classes", uri, "anchors", classes=2)
    tats_stages.save_tats(tmp_path / "other", uri, "anchors", {"vqgan": {"uri": "models:/other/1", "encoder": "other"}})
    window = {"frames": 12, "stride": 2, "size": [16, 16], "fps": 12.0}
    tats_stages.save_tats(tmp_path / "fast", uri, "anchors", {"window": window})
    texts = {"text": {"encoder": {"digest": "another", "encoder": "elsewhere"}}}
    tats_stages.save_tats(tmp_path / "texts", uri, "anchors", texts)
    interpolate = {"mode": "interpolate", "anchors": "anchors"}
    cases: tuple[tuple[dict[str, Any], dict[str, str], str], ...] = (
        (interpolate, {"anchors": str(tmp_path / "sparse")}, "has every 3, this training 2"),
        (interpolate, {"anchors": str(tmp_path / "many")}, "has codes 64, this training 32"),
        (interpolate, {"anchors": str(tmp_path / "base")}, "is of mode base; name one of mode anchors"),
        (interpolate, {"anchors": str(tmp_path / "classes")}, "has learned 2 classes, these are 0"),
        (interpolate, {"anchors": str(tmp_path / "other")}, "has learned tokens of another VQGAN, models:/other/1"),
        (interpolate, {"anchors": str(tmp_path / "fast")}, "was trained at stride 2, these windows have 1"),
        (interpolate, {"anchors": str(tmp_path / "texts")}, "anchors: .* has learned text; name what"),
        (interpolate, {"anchors": uri}, "is a VQGAN, not a TATS"),
        (interpolate | {"every": 3}, {"anchors": anchors}, "reads windows of every \\+ 1 = 4 latent frames, not 3"),
        (
            interpolate | WORDS | {"words": None},
            {"anchors": anchors, "captions": made["captions"]},
            "have learned no words",
        ),
    )
    for number, (changes, inputs, why) in enumerate(cases):
        with pytest.raises(UserError, match=why) as e:
            started(config(**changes), gap | inputs, tmp_path / str(number))
        assert "\n" not in str(e.value)
    record = replace(read_tokens(made["tokens"]), digests={"train": "x", "val": "x"})
    records.write_tokens(str(tmp_path / "stale"), record)
    with pytest.raises(UserError, match="the dataset has changed since they were made; run their `cache_tokens` stage"):
        started(config(), {"dataset": made["dataset"], "tokens": str(tmp_path / "stale")}, tmp_path / "stale_run")
    with pytest.raises(UserError, match="keep is 5; a window has room for 1 to 2"):
        chosen = config(keep=5)
        pretrain_tats.objective(chosen, started(chosen, only(made), tmp_path / "keep"))
    with pytest.raises(UserError, match="guidance is 3: this model was trained with label_dropout: 0"):
        chosen = config(classes=True, guidance=3.0, model=tats_stages.TINY | {"label_dropout": 0.0})
        pretrain_tats.objective(chosen, started(chosen, only(made), tmp_path / "guidance"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mode": "interpolate"}, "anchors: mode interpolate needs the model"),
        ({"anchors": "anchors"}, "anchors: mode interpolate needs the model"),
        ({"mode": "interpolate", "anchors": "anchors", "keep": 1}, "keep: is of the windows of anchors"),
        ({"mode": "anchors", "eval_videos": 4}, "eval_videos: mode anchors makes no whole videos"),
        ({"features": "x.pt", "eval_videos": 1}, "eval_videos: 1; a distance needs 2"),
        ({"captions": "captions", "text": "text"}, "learns the words of captions or their states"),
        ({"words": 50}, "words: is the size of the vocabulary of `captions`"),
        ({"top_p": 0}, "greater than 0"),
        ({"model": {"codes": 5}}, "codes follows from the stage's other settings"),
        ({"model": {"preset": "tats"}}, "unknown preset"),
        ({"model": {"text_dropout": 0.2}}, "text_dropout: has no effect without texts"),
        ({"base": "base", "model": {"preset": "tats_tiny"}}, "the base has its own"),
        ({"base": "base", "model": {"size": 3}}, "unknown size"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        config(**changes)


def test_stages_of_one_recipe_that_do_not_fit_are_refused() -> None:
    chosen = config(mode="interpolate", anchors="anchors")
    for stage, why in (
        (config(), "anchors: is of mode base; name one of mode anchors"),
        (config(mode="anchors", classes=True), "anchors: learns other conditions"),
        (config(mode="anchors", dataset="other").model_copy(update={"kind": "finetune_latte"}), "makes no TATS"),
    ):
        with pytest.raises(ValueError, match=why):
            check(chosen, {"anchors": stage})
    check(chosen, {"anchors": config(mode="anchors")})


@pytest.fixture(scope="module")
def run_id(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        yield from latent_stages.mlflow_run(tmp_path_factory.mktemp("mlflow"), patch)


def test_a_hierarchy_is_trained_registered_judged_and_generates_by_one_name(
    made: dict[str, str], run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"captions": made["captions"]}
    first = config(mode="anchors", name="line", classes=True, **WORDS)
    line = _run(first, only(made, **words), tmp_path / "line", monkeypatch)
    assert line["metrics"]["train_clips"] > 0 and line["metrics"]["heldout_loss"] > 0
    second = config(mode="interpolate", name="gaps", classes=True, anchors="line", **WORDS | {"words": None})
    gaps = _run(second, only(made, **words, anchors="models:/line@champion"), tmp_path / "gaps", monkeypatch)
    module, facts = registry.load_with_facts(gaps["uri"])
    assert facts["anchors"]["uri"] == line["uri"] and facts["vqgan"]["uri"] == read_tokens(made["tokens"]).model["uri"]
    assert facts["words"] == registry.load_with_facts(line["uri"])[1]["words"]
    assert set(facts["sampling"]) == {"guidance", "temperature", "top_k", "top_p", "keep"}

    kind = kind_of(facts)
    assert (
        kind.generator
        and {"prompt", "class", "start", "storyboard", "top_p"} <= kind.accepts
        and "steps" not in kind.accepts
    )
    generator = kind.generator(gaps["uri"], module, facts, None, torch.float32)
    told = Request(3, [(0.0, Scene(1, "a red square"))])
    video = concatenated(generator.videos([told], 36, generator.settings))
    assert video.shape == (1, 36, 16, 16, 3)
    generator.check_prompts(["a blue circle"])
    with pytest.raises(UserError, match="has 'zebra'"):
        generator.check_prompts(["zebra"])

    judged = Judged(gaps["uri"], module.eval(), facts)
    gate = Gate(metrics={"loss": {"better": "lower"}}, samples=2)  # type: ignore[dict-item]
    inputs = only(made, **words)
    ours, theirs = rows_of(judged, judged, inputs, gate)
    assert ours == theirs and len(ours) == 2 and all(row["loss"] > 0 for row in ours.values())
    with pytest.raises(UserError, match=r"captions: .* has learned words; name what their `caption` stage has made"):
        rows_of(judged, None, only(made), gate)
    with pytest.raises(UserError, match=r"tokens: .* has learned tokens; name what"):
        rows_of(judged, None, {"dataset": made["dataset"]}, gate)


def _run(chosen: Config, inputs: dict[str, str], folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stage makes, in a run of its own."""
    import mlflow

    client = mlflow.MlflowClient()
    patch.setenv("MLFLOW_RUN_ID", client.create_run(client.get_experiment_by_name("e").experiment_id).info.run_id)
    chosen = chosen.model_copy(
        update={"run": chosen.run.model_copy(update={"checkpoints": str(folder / "checkpoints")})}
    )
    return pretrain_tats.run(chosen, inputs, str(folder))
