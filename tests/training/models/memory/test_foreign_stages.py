"""The stages with a base of another library: what learns, what is refused, and a registered memory that generates and retrieves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import latent_stages
import numpy as np
import pytest
import spoken
import tiny_foreign
import torch
from click.testing import CliRunner
from flat import nested

from longtake.datasets.errors import UserError
from longtake.datasets.stage import content
from longtake.datasets.text import TextConfig
from longtake.infra.cli import cli
from longtake.training import registry
from longtake.training.foreign.columns import pooled_settings, text_settings
from longtake.training.foreign.load import backbone_of, codec_of
from longtake.training.models.common.condition import of_batch
from longtake.training.models.common.video import concatenated
from longtake.training.models.generator import Request, Scene
from longtake.training.models.memory import finetune as finetune_memory_prior
from longtake.training.models.memory import pretrain as pretrain_memory
from longtake.training.models.memory import retrieval
from longtake.training.models.memory.base_foreign import with_lora
from longtake.training.models.memory.data import heldout_of
from longtake.training.models.memory.foreign import MemoryBackbone
from longtake.training.models.memory.history import groups_of
from longtake.training.models.memory.prior import load_prior
from longtake.training.models.memory.recall import recall
from longtake.training.registry import disk, judge, lineage
from longtake.training.registry.gate import Gate
from longtake.training.text import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

MEMORY = {"rates": ["2x2x2"], "memory_widths": [8, 16], "memory_heads": 2, "window": 2, "cross_attention": True}
PLAIN = MEMORY | {"cross_attention": False}
QUICK = latent_stages.QUICK | {"model": MEMORY, "base": "base", "text": "text", "fps": 12}


@pytest.fixture(scope="module")
def inputs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny pipeline, and columns by its parts. Read them, do not change them."""
    root = tmp_path_factory.mktemp("foreign")
    base, copy = tiny_foreign.pipeline_folder(root / "pipeline"), latent_stages.labelled(dataset, root / "dataset")
    codec: Any = codec_of(base)[0]
    return {
        "dataset": copy,
        "latents": latent_stages.encoded(root / "latents", copy, codec, str(base)),
        "low_latents": latent_stages.encoded(root / "low", copy, codec, str(base), (2, 2)),
        "text": spoken.column(root / "text", copy, encoder=load_encoder(TextConfig(encoder=str(base), clean="wan"))),
        "base": str(base),
    }


def retrieving(**changes: Any) -> pretrain_memory.Config:
    return pretrain_memory.Config(**nested(QUICK | {"kind": "pretrain_memory"} | changes))


def continuing(**changes: Any) -> finetune_memory_prior.Config:
    quick = {"kind": "finetune_memory_prior", "eval_videos": 1, "eval_segments": 1, "eval_clips": 1, "guidance": 2.0}
    return finetune_memory_prior.Config(**nested(QUICK | quick | changes))


def heldout_loss(config: Any, setup: Any) -> float:
    clips = [(groups_of(batch, setup.model), of_batch(batch)) for batch in heldout_of(config, setup)]
    setup.model.eval()
    return float(retrieval.heldout_losses(setup.model, clips, 0).mean())


@pytest.mark.usefixtures("group")
def test_a_low_rank_change_and_the_memory_learn_to_retrieve_and_nothing_else(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    plain = retrieving(steps=40, lr=3e-3, batch=4, checkpoint_every=40)
    chosen = with_lora(plain, inputs)
    assert (
        chosen.lora is not None
        and chosen.lora != "none"
        and (chosen.lora.rank, chosen.lora.full) == (128, ("memory", "cross"))
    )
    torch.manual_seed(chosen.seed)
    setup = latent_stages.prepared(chosen, inputs, tmp_path / "before")
    before, start = heldout_loss(chosen, setup), setup.model.state_dict()
    weights = latent_stages.fit(pretrain_memory, chosen, inputs, tmp_path / "run")
    moved = {name for name, value in start.items() if not torch.equal(weights[name], value)}
    assert moved == {n for n, _ in setup.model.named_parameters() if n.startswith(("memory.", "cross.", "first."))}
    changed = {name for name in weights if name.endswith("lora_up.weight") and weights[name].any()}
    assert len(changed) == 2 * (4 + 4 + 2), "attention to the video, to the text, and the MLP of both blocks"

    from longtake.training import checkpoint

    setup.model.load_state_dict(checkpoint.trained(tmp_path / "run", chosen))
    assert heldout_loss(chosen, setup) < 0.5 * before


WAYS: dict[str, dict[str, Any]] = {
    "sharded": {"zero_stage": 3, "model": MEMORY | {"activation_checkpointing": True}},
    "bf16": {"precision": "bf16", "zero_stage": 1, "low_latents": None, "model": {**PLAIN, "memory": "patchify"}},
    "nothing remembered": {"low_latents": None, "model": {**PLAIN, "memory": "none"}},
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_a_prior_learns_in_every_way_and_a_stopped_one_ends_with_the_same_weights(
    inputs: dict[str, str], tmp_path: Path, way: str
) -> None:
    chosen = with_lora(continuing(history_noise=0.3, **WAYS[way]), inputs)
    if chosen.low_latents is None:
        inputs = {name: uri for name, uri in inputs.items() if name != "low_latents"}
    straight = latent_stages.fit(finetune_memory_prior, chosen, inputs, tmp_path / "straight")
    latent_stages.fit(finetune_memory_prior, chosen, inputs, tmp_path / "stopped", until=2)
    resumed = latent_stages.fit(finetune_memory_prior, chosen, inputs, tmp_path / "stopped")
    torch.testing.assert_close(resumed, straight, atol=0, rtol=0)
    assert all(value.isfinite().all() for value in straight.values())
    assert any(name.endswith("lora_up.weight") and value.any() for name, value in straight.items())


def saved(chosen: Any, inputs: dict[str, str], folder: Path, stage: Any) -> tuple[str, Any]:
    """A stage's model before its first step as a model folder, and its setup."""
    setup = latent_stages.prepared(chosen, inputs, folder / "run", stage)
    facts = stage.facts(chosen, setup, lineage.read(folder / "run"))
    disk.save(
        folder / "model", stage.kind(setup), setup.model.config.model_dump(mode="json"), setup.model.state_dict(), facts
    )
    return str(folder / "model"), setup


@pytest.fixture(scope="module")
def hunyuan(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same of a tiny HunyuanVideo, with vectors of the texts."""
    root = tmp_path_factory.mktemp("hunyuan")
    copy = latent_stages.labelled(dataset, root / "dataset")
    base = tiny_foreign.pipeline_folder(root / "pipeline", "hunyuan")
    facts: dict[str, Any] = {"foreign": {"folder": str(base)}}
    codec: Any = codec_of(base)[0]
    own = backbone_of(base)[0].config
    found = {
        "dataset": copy,
        "base": str(base),
        "latents": latent_stages.encoded(root / "latents", copy, codec, str(base)),
        "low_latents": latent_stages.encoded(root / "low", copy, codec, str(base), (2, 2)),
    }
    for name, settings in (
        ("text", text_settings(str(base), facts, own)),
        ("pooled", pooled_settings(str(base), facts)),
    ):
        encoder = load_encoder(TextConfig(**settings))
        found[name] = spoken.column(root / name, copy, encoder=encoder, name=f"text-{name}")
    return found


@pytest.mark.usefixtures("group")
def test_a_memory_goes_in_front_of_hunyuan_too(hunyuan: dict[str, str], tmp_path: Path) -> None:
    chosen = with_lora(retrieving(pooled="pooled", steps=20, lr=3e-3, batch=4, checkpoint_every=20), hunyuan)
    torch.manual_seed(chosen.seed)
    setup = latent_stages.prepared(chosen, hunyuan, tmp_path / "before")
    before = heldout_loss(chosen, setup)
    latent_stages.fit(pretrain_memory, chosen, hunyuan, tmp_path / "run")

    from longtake.training import checkpoint

    setup.model.load_state_dict(checkpoint.trained(tmp_path / "run", chosen))
    assert heldout_loss(chosen, setup) < 0.8 * before

    # It goes on from there, and makes segments by a text each.
    given = hunyuan | {"base": saved(chosen, hunyuan, tmp_path / "one", pretrain_memory)[0]}
    prior = with_lora(continuing(pooled="pooled", model=None, steps=2), given)
    latent_stages.fit(finetune_memory_prior, prior, given, tmp_path / "two")
    made = load_prior(saved(prior, given, tmp_path / "prior", finetune_memory_prior)[0], "generation")
    assert made.pooled and made.prompts

    def film(*prompts: str, negative: str | None = None) -> np.ndarray:
        story = [(0.5 * number, Scene(prompt=prompt)) for number, prompt in enumerate(prompts)]
        return concatenated(made.videos([Request(1, story, negative)], 21, made.settings))

    both = film("red", "blue")
    assert both.shape == (1, 21, 32, 48, 3)
    assert (both != film("red", "red")).any() and (both != film("red", "blue", negative="green")).any()
    without = {name: uri for name, uri in hunyuan.items() if name != "pooled"}
    with pytest.raises(UserError, match=r"pooled: \S+ takes a vector of each text"):
        latent_stages.prepared(retrieving(), without, tmp_path / "without")


@pytest.mark.usefixtures("group")
def test_attention_to_the_memory_s_states_learns_in_the_second_stage_too(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    given = inputs | {"base": saved(retrieving(), inputs, tmp_path / "one", pretrain_memory)[0]}
    chosen = with_lora(continuing(model=None, steps=2), given)
    setup = latent_stages.prepared(chosen, given, tmp_path / "before")
    before = setup.model.state_dict()
    weights = latent_stages.fit(finetune_memory_prior, chosen, given, tmp_path / "two")
    outs = [name for name in before if name.startswith("cross.") and ".out." in name]
    assert len(outs) == 4 and not any(torch.equal(weights[name], before[name]) for name in outs)
    whole = "backbone.net.blocks.0.attn1.to_q.weight"
    assert torch.equal(weights[whole], before[whole])


def test_a_base_learns_with_texts_hidden_and_its_blocks_computed_again(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = with_lora(continuing(model=MEMORY | {"activation_checkpointing": True}), inputs)
    setup = latent_stages.prepared(chosen, inputs, tmp_path / "run", finetune_memory_prior)
    objective = finetune_memory_prior.objective(chosen, setup)
    batch, passes = next(iter(finetune_memory_prior.loader(chosen, setup, 0, 1))), list[Any]()
    next(setup.model.blocks()).register_forward_pre_hook(lambda *_: passes.append(None))

    def loss(chance: float) -> torch.Tensor:
        given = batch | {"chances": torch.full_like(batch["chances"], chance)}
        turn = latent_stages.turn(setup.model, given, torch.Generator().manual_seed(0))
        return objective.loss(turn)[0]

    assert loss(0.0) != loss(1.0), "a tenth of the texts is hidden"
    passes.clear()
    loss(1.0).backward()
    assert len(passes) == 2


def test_what_learns_in_full_begins_as_it_is_stored(inputs: dict[str, str], tmp_path: Path) -> None:
    given = {name: uri for name, uri in inputs.items() if name != "low_latents"}
    half = {"precision": "bf16", "low_latents": None, "model": {**PLAIN, "memory": "patchify"}}
    for lora, dtype in (("none", torch.float32), (None, torch.bfloat16)):
        chosen = with_lora(retrieving(lora=lora, **half), given)
        model = latent_stages.prepared(chosen, given, tmp_path / str(lora)).model
        assert model.dtype == dtype and next(model.memory.parameters()).dtype == dtype


def test_times_are_moved_as_the_pipeline_moves_them(inputs: dict[str, str], tmp_path: Path) -> None:
    def told(name: str, **changes: Any) -> float:
        chosen = continuing(**changes)
        setup = latent_stages.prepared(chosen, inputs, tmp_path / name, finetune_memory_prior)
        made: float = finetune_memory_prior.facts(chosen, setup, lineage.read(tmp_path / name))["sampling"]["shift"]
        return made

    assert told("left out") == 3.0 and told("said", shift=1) == 1.0


def test_a_key_from_before_shift_could_be_null_is_the_same(inputs: dict[str, str]) -> None:
    assert content(retrieving())["shift"] == content(retrieving(base=None, text=None, shift=1))["shift"] == 1.0
    assert content(retrieving(shift=1)) != content(retrieving())
    assert "fps" not in content(retrieving(fps=None))


def test_a_recipe_that_says_nothing_of_lora_says_so_with_its_defaults_written_out(inputs: dict[str, str]) -> None:
    written = retrieving().model_dump(mode="json")
    lora = with_lora(pretrain_memory.Config(**written), inputs).lora
    assert lora is not None and lora != "none" and lora.rank == 128


def test_what_the_user_writes_of_lora_wins(inputs: dict[str, str]) -> None:
    assert with_lora(retrieving(lora="none"), inputs).lora is None
    lora = with_lora(retrieving(lora={"rank": 2}), inputs).lora
    assert lora is not None and lora != "none" and (lora.rank, lora.full) == (2, ())


def test_settings_and_columns_that_do_not_fit_a_base_are_refused_in_a_line(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    silent = {name: uri for name, uri in inputs.items() if name != "text"}
    two = tiny_foreign.pipeline_folder(tmp_path / "two", "wan22_a14b")
    other = tiny_foreign.pipeline_folder(tmp_path / "other", seed=5)
    ltx = tiny_foreign.pipeline_folder(tmp_path / "ltx", "ltx")

    def encoded(name: str, **settings: Any) -> str:
        encoder = load_encoder(TextConfig(**settings))
        return spoken.column(tmp_path / name, inputs["dataset"], encoder=encoder, name=f"text-{name}")

    plain, theirs = encoded("plain", encoder=inputs["base"]), encoded("theirs", encoder=str(other), clean="wan")
    for given, changes, said in (
        (inputs, {"model": MEMORY | {"depth": 3}}, "model: depth: is the base's own"),
        (inputs, {"fps": None}, "fps: .* makes 16 frames a second, and the clips have 12"),
        (inputs, {"fps": 24}, "fps: is 24 frames a second, and the clips have 12, .* or say fps: 12"),
        (inputs, {"classes": True}, "classes: .* takes none"),
        (inputs, {"model": MEMORY | {"rates": ["4x4x2"]}}, "rates: 4x4x2: .* grid of 2x3"),
        (silent, {"text": None}, 'text: .* does not know the states of ""'),
        (inputs | {"base": str(two)}, {}, "base: .* has two transformers, for high and for low noise"),
        (inputs | {"base": str(ltx)}, {}, "base: .*: LTXVideoTransformer3DModel takes no memory"),
        (inputs | {"base": str(other)}, {}, "latents: .* are of .*, another autoencoder than that of"),
        (inputs | {"text": plain}, {}, "text: .* has states of clean: whitespace, .* `cache_text` stage: clean: wan$"),
        (
            inputs | {"text": theirs},
            {},
            "text: .* are of .*, another encoder than that of .*pipeline; encode by its own",
        ),
    ):
        with pytest.raises(UserError, match=said) as e:
            latent_stages.prepared(retrieving(**changes), given, tmp_path / said[:9].replace(".", "_"))
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="text: is for a base of another library"):
        retrieving(base=None, model=latent_stages.TINY)


@pytest.mark.parametrize("stage", [pretrain_memory, finetune_memory_prior])
def test_what_a_stage_leaves_loads_as_it_was_and_a_gate_measures_it(
    inputs: dict[str, str], tmp_path: Path, stage: Any
) -> None:
    chosen = retrieving() if stage is pretrain_memory else continuing()
    folder, setup = saved(chosen, inputs, tmp_path, stage)
    one = judge.load(folder)
    assert one.facts["model"] == "memory_backbone" and one.model.config == setup.model.config
    torch.testing.assert_close(one.model.state_dict(), setup.model.state_dict(), atol=0, rtol=0)
    gate = Gate.model_validate({"metrics": {"loss": {"better": "lower"}}, "samples": 2})
    ours, theirs = judge.rows_of(one, one, inputs, gate)
    assert ours == theirs and len(ours) == 2 and all(0 < row["loss"] < 1e6 for row in ours.values())


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from latent_stages.mlflow_run(tmp_path, monkeypatch)


@pytest.mark.slow
def test_from_a_pipeline_to_a_registered_memory_that_generates_by_a_storyboard_and_retrieves(
    inputs: dict[str, str], store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    quick = {"steps": 2, "sample_every": 2}
    first = pretrain_memory.run(retrieving(name="wan-retrieval", **quick), inputs, str(tmp_path / "a"))
    assert first["uri"] == "models:/wan-retrieval/1" and first["metrics"]["psnr"] > 0
    given, client = inputs | {"base": first["uri"]}, mlflow.MlflowClient()
    monkeypatch.setenv("MLFLOW_RUN_ID", client.create_run(client.get_run(store).info.experiment_id).info.run_id)
    changes = {"name": "wan-memory", "model": None, "lora": {"rank": 4, "full": ["memory", "cross"]}}
    second = finetune_memory_prior.run(continuing(**changes | quick), given, str(tmp_path / "b"))
    assert second["uri"] == "models:/wan-memory/1" and second["metrics"]["heldout_loss"] > 0

    # As it was saved.
    model, facts = registry.load_with_facts("models:/wan-memory@champion")
    assert isinstance(model, MemoryBackbone) and not model.training and model.config.cross_attention
    assert facts["model"] == "memory_backbone" and facts["stage"] == "generation"
    assert facts["text"]["encoder"]["digest"] == registry.load_with_facts(first["uri"])[1]["text"]["encoder"]["digest"]

    # Two segments of 3 latents, by a prompt each.
    prior = load_prior("models:/wan-memory@champion", "generation")
    assert "prompt" in prior.accepts and "storyboard" in prior.accepts

    def film(*prompts: str | None, seconds: float = 0.5) -> np.ndarray:
        story = [(seconds * number, Scene(prompt=prompt)) for number, prompt in enumerate(prompts)]
        return concatenated(prior.videos([Request(1, story)], 21, prior.settings))

    told = film("red", "blue")
    assert told.shape == (1, 21, 32, 48, 3) and prior.joints(21, prior.settings) == [9]
    np.testing.assert_array_equal(told, film("red", "blue"))
    assert (told != film("red", "red")).any() and (told != film(None)).any()

    # What the memory of a clip keeps.
    kept, bound = recall(load_prior(first["uri"], "retrieval"), told[0], seed=1)
    assert kept.shape == bound.shape and kept.shape[1:] == (32, 48, 3) and (kept != bound).any()

    # And both by the commands.
    told_file, story = tmp_path / "told.mp4", tmp_path / "story.yaml"
    story.write_text("- {at: 0s, prompt: red}\n- {at: 0.5s, prompt: blue}\n")

    def longtake(*arguments: object) -> str:
        done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    options = ("--frames", 21, "--storyboard", story, "--steps", 2, "--seed", 1, "--out", told_file)
    longtake("generate", "models:/wan-memory@champion", *options)
    with av.open(str(told_file)) as file:
        assert [(frame.height, frame.width) for frame in file.decode(video=0)] == [(32, 48)] * 21
    longtake("retrieve", first["uri"], told_file, "--at", "0s,1s", "--steps", 2, "--out", tmp_path / "found")
    assert any((tmp_path / "found").iterdir())
