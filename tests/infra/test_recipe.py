import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets.errors import UserError
from longtake.infra import graph, recipe
from longtake.infra.cli import cli
from longtake.infra.deploy import Deploy, environment
from longtake.pipeline.stages import shard
from longtake.training.checkpoint import Place, place_of

GOOD: dict[str, Any] = {
    "name": "small",
    "workspace": "runs/small",
    "stages": {
        "shards": {"kind": "shard", "sources": ["videos"], "clip": {"short_side": 64, "fps": 12}},
        "view": {"kind": "curate", "dataset": "shards"},
        "vae": {
            "kind": "pretrain_vae",
            "dataset": "shards",
            "view": "view",
            "model": {"preset": "pv_vae_tiny"},
            "frames": 9,
            "sizes": [[64, 64]],
        },
    },
}


def write(folder: Path, content: Any, name: str = "r.yaml") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def changed(**stages: Any) -> dict[str, Any]:
    return GOOD | {"stages": GOOD["stages"] | stages}


def build(path: str, *overrides: str) -> list[graph.Node]:
    return graph.build(recipe.load(path, overrides))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("name: [", "r.yaml:1:8: not valid YAML"),
        ("- a", "a recipe is a mapping"),
        (GOOD | {"chosen": {"kind": "curate", "dataset": "shards"}}, "chosen: a stage belongs below `stages`, indented"),
        (GOOD | {"workspce": "x"}, "workspce: unknown key (did you mean workspace?)"),
        (GOOD | {"name": 3}, "name: must be a text"),
        (GOOD | {"workspace": " "}, "workspace: must be a text"),
        (GOOD | {"stages": {}}, "stages: must be a mapping"),
        (changed(shards={"kind": "shrad"}), "stages.shards.kind: unknown kind 'shrad' (did you mean shard?); allowed: shard, curate"),
        (changed(shards={"sources": ["x"]}), "stages.shards.kind: has no kind"),
        (changed(shards={"kind": "shard", "sources": []}), "stages.shards.sources: "),
        (changed(shards={"kind": "shard", "sources": ["x", ""]}), "stages.shards.sources: a source is empty"),
        (changed(shards={"kind": "shard", "sources": ["runs/small"]}), "runs/small is the workspace, whose videos"),
        (changed(shards={"kind": "shard", "sources": ["runs/small/**/*.mp4"]}), "is the workspace, whose videos"),
        (changed(shards={"kind": "shard"}), "stages.shards.sources: is missing"),
        (changed(shards={"kind": "shard", "sources": ["x"], "clip": {"fsp": 3}}), "clip.fsp: unknown key (did you mean fps?); allowed: short"),
        (changed(vae=GOOD["stages"]["vae"] | {"sseed": 3}), "stages.vae.sseed: unknown key (did you mean seed?); see `longtake stage --help pretrain_vae`"),
        (changed(vae=GOOD["stages"]["vae"] | {"workers": 3}), "stages.vae.workers: is now run.workers; write `run: {workers: ...}`"),
        (changed(vae=GOOD["stages"]["vae"] | {"launcher": "ray"}), "stages.vae.launcher: is now run.launcher; write `run: {launcher: ...}`"),
        (changed(shards={"kind": "shard", "sources": ["x"], "task": {"cpus": 2}}), "stages.shards.task: is now run"),
        (changed(latents={"kind": "cache_latents", "dataset": "shards", "encoder": "vae", "steps": 2}), "stages.latents.steps: is now run.chunk"),
        (changed(latents={"kind": "cache_latents", "dataset": "shards", "encoder": "vae", "batch": 2}), "stages.latents.batch: is now run.batch"),
        (changed(shards={"kind": "shard", "sources": ["x"], "clip": {"fps": "many"}}), "clip.fps: input should be a valid number"),
        (changed(shards={"kind": "shard", "sources": ["x"], "clip": {"aspects": ["wide"]}}), "'wide' is not an aspect ratio"),
        (changed(view={"kind": "curate", "dataset": "shards", "rules": {"motoin": {"min": 1}}}), "stages.view.rules: unknown score motoin"),
        (changed(view={"kind": "curate", "dataset": "nothing"}), "stages.view.dataset: there is no stage 'nothing'; stages: shards, vae"),
        (changed(vae={"kind": "pretrain_vae", "dataset": "view"}), "stages.vae.dataset: needs a dataset, but stage view makes a view"),
        (changed(vae=GOOD["stages"]["vae"] | {"model": {"preset": "pv"}}), "stages.vae.model: unknown preset 'pv'"),
        (changed(vae=GOOD["stages"]["vae"] | {"model": {"preset": "pv_vae_tiny", "wdith": 3}}), "wdith"),
        (changed(sound={"kind": "pretrain_sound_vqgan", "dataset": "shards", "spectrogram": {"rwos": 8}}), "stages.sound.spectrogram.rwos: unknown key; see `longtake stage --help pretrain_sound_vqgan`"),
        (changed(sound={"kind": "pretrain_sound_vqgan", "dataset": "shards", "model": {"spectrogram": 1}}), "stages.sound.model: spectrogram is a setting of the stage"),
        (changed(tats={"kind": "pretrain_tats", "dataset": "shards", "tokens": "view", "model": {"detph": 3}}), "stages.tats.model.detph: unknown key; see `longtake stage --help pretrain_tats`"),
        (changed(vae=GOOD["stages"]["vae"] | {"frames": 8}), "frames 8: the model needs 1 + 4n frames, such as 5 or 9"),
        (changed(vae=GOOD["stages"]["vae"] | {"sizes": [[60, 64]]}), "sizes 60x64: the model needs multiples of 16"),
        (changed(vae=GOOD["stages"]["vae"] | {"sizes": [[128, 128]]}), "stages.vae.sizes: 128 is larger than clip.short_side 64"),
        (changed(vae=GOOD["stages"]["vae"] | {"frames": 401}), "stages.vae.frames: a window spans 401 frames"),
        (changed(vae=GOOD["stages"]["vae"] | {"betas": [1.0, 0.9]}), "stages.vae.betas: [1.0, 0.9]: Adam needs numbers from 0 to below 1"),
        (changed(tats={"kind": "pretrain_tats", "dataset": "shards", "tokens": "view", "betas": [0.5, float("nan")]}), "stages.tats.betas: [0.5, nan]: Adam"),
        (changed(vae=GOOD["stages"]["vae"] | {"batch": 9, "accumulate": 2}), "batch 9 does not divide into accumulate 2"),
        (changed(shards={"kind": ["shard"], "sources": ["x"]}), "stages.shards.kind: unknown kind ['shard']"),
        (GOOD | {"outside": "abc"}, "outside: must be a mapping of stage names to digests"),
        (changed(**{"bad name": {"kind": "curate", "dataset": "shards"}}), "a stage's name has lower-case letters"),
        (GOOD | {"deploy": "x"}, "deploy: must be a mapping with the keys image, kuberay"),
        (GOOD | {"deploy": {"imge": "x"}}, "deploy.imge: unknown key (did you mean image?); allowed: image, kuberay"),
        (GOOD | {"deploy": {"resources": {"vea": {}}}}, "deploy.resources.vea: there is no such stage (did you mean vae?)"),
        (GOOD | {"deploy": {"resources": {"vae": {"gpu": 1}}}}, "deploy.resources.vae.gpu: unknown key (did you mean gpus?)"),
        (GOOD | {"deploy": {"resources": {"vae": {"gpus": -1}}}}, "deploy.resources.vae.gpus: "),
        (GOOD | {"deploy": {"schedule": {"cron": "daily"}}}, "deploy.schedule.cron: a cron line has five fields"),
        (GOOD | {"deploy": {"env": ["TOKEN=abc"]}}, "deploy.env: takes names of environment variables, not their values"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_line_with_file_key_and_remedy(tmp_path: Path, content: Any, says: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        build(path)
    assert says in str(caught.value)
    assert "r.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["${FOOTAGE}/**/*.mp4", "s3://${FOOTAGE}/raw", "/data/${FOOTAGE}"])
def test_an_empty_variable_inside_a_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FOOTAGE", "")
    with pytest.raises(
        UserError, match=r"r\.yaml: stages\.shards\.sources\.0: the environment variable FOOTAGE is empty"
    ):
        build(write(tmp_path, changed(shards={"kind": "shard", "sources": [text]})))


def test_a_cycle_is_named(tmp_path: Path) -> None:
    views = {name: {"kind": "curate", "dataset": other} for name, other in (("a", "b"), ("b", "c"), ("c", "a"))}
    with pytest.raises(UserError, match=r"r\.yaml: stages: a cycle: \w -> \w -> \w -> \w; remove one of these inputs"):
        build(write(tmp_path, changed(**views)))


def test_a_base_is_inherited_and_overrides_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOOTAGE", str(tmp_path))
    write(tmp_path, GOOD, "base.yaml")
    child = write(
        tmp_path,
        {
            "base": "base.yaml",
            "name": "child",
            "stages": {"vae": {"steps": 7}, "shards": {"sources": ["${FOOTAGE}/a"]}},
        },
        "c.yaml",
    )
    loaded = recipe.load(child, ["stages.vae.lr=1e-3", "stages.vae.model.padding=noise"])
    vae: Any = loaded.stages["vae"]
    assert (loaded.name, vae.steps, vae.lr, vae.frames, vae.model["padding"]) == ("child", 7, 1e-3, 9, "noise")
    assert loaded.stages["shards"].sources == (f"{tmp_path}/a",)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.vae.steps", "write KEY.PATH=VALUE"),
        ("name.x=1", "name is a value"),
        ("stages.vae.steps=[", "not valid YAML"),
        ("=3", "write KEY"),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe.load(write(tmp_path, GOOD), [override])


def test_missing_files_variables_and_circles_of_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such recipe file, and no recipe of the package"):
        recipe.load(str(tmp_path / "none.yaml"))
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    with pytest.raises(UserError, match=r"r\.yaml: workspace: the environment variable NOT_SET_ANYWHERE is not set"):
        recipe.load(write(tmp_path, GOOD | {"workspace": "${NOT_SET_ANYWHERE}/x"}))
    write(tmp_path, {"base": "b.yaml"}, "a.yaml")
    with pytest.raises(UserError, match="goes round in a circle"):
        recipe.load(write(tmp_path, {"base": "a.yaml"}, "b.yaml"))


def test_a_folder_hides_no_recipe_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDEOS", str(tmp_path))
    (tmp_path / "quickstart").mkdir()
    child = write(tmp_path, {"base": "quickstart", "name": "child"}, "c.yaml")
    monkeypatch.chdir(tmp_path)
    assert recipe.load("quickstart").name == "quickstart" and recipe.load(child).name == "child"
    write(tmp_path, GOOD, "retrain")
    assert recipe.load("retrain").name == "small", "a file of such a name goes first"
    with pytest.raises(UserError, match="no such recipe file"):
        recipe.load(str(tmp_path))


def test_a_resolved_recipe_loads_to_the_same_graph(tmp_path: Path) -> None:
    first = recipe.load(write(tmp_path, GOOD))
    again = recipe.load(write(tmp_path, first.to_yaml(), "resolved.yaml"))
    assert [n.fingerprint for n in graph.build(first)] == [n.fingerprint for n in graph.build(again)]
    assert first.digest() == again.digest()


def test_a_changed_setting_reruns_what_hangs_on_it_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    before = {n.name: n for n in build(path)}

    def moved(*overrides: str) -> set[str]:
        return {n.name for n in build(path, *overrides) if n.fingerprint != before[n.name].fingerprint}

    assert moved("stages.vae.steps=5") == {"vae"}
    assert moved("stages.view.rules={motion: {min: 0.5}}") == {"view", "vae"}
    assert moved("stages.shards.clip.fps=6") == {"shards", "view", "vae"}
    assert moved("name=other") == set()


def test_new_sources_change_the_fingerprint_but_not_the_dataset(tmp_path: Path) -> None:
    from dataclasses import replace

    loaded = recipe.load(write(tmp_path, GOOD))
    one, two = (graph.build(replace(loaded, outside={"shards": digest}))[0] for digest in "ab")
    assert one.fingerprint != two.fingerprint
    assert one.output == two.output


def test_the_recipes_of_the_package_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("VIDEOS", "WORKSPACE", "CHECKPOINTS"):
        monkeypatch.setenv(variable, variable.lower())
    monkeypatch.setenv("VAE", "models:/pv-vae@champion")
    monkeypatch.setenv("WAN", "models:/wan-1.3b@champion")
    for name in recipe.builtin():
        assert graph.build(recipe.load(name))


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    )
)
def test_no_recipe_makes_a_stack_trace(content: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_text(yaml.safe_dump({"name": "x", "workspace": "y", "stages": content}))
        with pytest.raises(UserError):
            build(str(path))


def test_the_graph_as_json_says_all_that_a_scheduler_needs(tmp_path: Path) -> None:
    deploy = {"resources": {"vae": {"gpus": 1, "labels": {"zone": "eu"}, "timeout_seconds": 60}}, "retries": 5}
    loaded = recipe.load(write(tmp_path, GOOD | {"deploy": deploy}))
    described = json.loads(json.dumps(graph.describe(loaded, graph.build(loaded))))
    assert described["edges"] == [["shards", "view"], ["shards", "vae"], ["view", "vae"]]
    vae = described["stages"][-1]
    assert vae["command"] == ["longtake", "stage", loaded.path, "vae"] and vae["timeout_seconds"] == 60
    assert vae["resources"] == {"cpus": 0, "gpus": 1, "memory_bytes": 0, "custom": {}, "labels": {"zone": "eu"}}
    assert described["path"] == loaded.path and described["resolve"][-2:] == [loaded.path, "--to"]
    assert described["deploy"]["retries"] == 5 and described["deploy"]["env"] == ["MLFLOW_TRACKING_URI"]


def test_where_a_recipe_runs_changes_nothing_that_it_makes(tmp_path: Path) -> None:
    deploy = {"env": ["A"], "resources": {"shards": {"cpus": 2}}, "schedule": {"cron": "@daily"}, "image": "x:1"}
    loaded = recipe.load(write(tmp_path, GOOD | {"deploy": deploy}, "a.yaml"))
    assert [n.fingerprint for n in graph.build(loaded)] == [n.fingerprint for n in build(write(tmp_path, GOOD))]
    (tmp_path / "again.yaml").write_text(loaded.to_yaml())
    assert recipe.load(str(tmp_path / "again.yaml")).deploy == loaded.deploy


def test_only_variables_of_the_list_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANTED", "1")
    monkeypatch.setenv("SECRET", "2")
    assert environment(Deploy(env=("WANTED", "NOT_SET"))) == {"WANTED": "1"}


def test_a_resolved_recipe_is_kept_so_that_a_retry_sees_the_same_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"one")
    stages = {"shards": {"kind": "shard", "sources": [str(videos)]}, "view": {"kind": "curate", "dataset": "shards"}}
    path = write(tmp_path, {"name": "r", "workspace": str(tmp_path / "work"), "stages": stages})
    target = tmp_path / "work" / "recipes" / "one.yaml"

    def resolve(*more: str) -> Any:
        return CliRunner().invoke(cli, ["resolve", path, "--to", str(target), *more])

    said = json.loads(resolve().output.splitlines()[-1])
    assert said == {"recipe": str(target), "workspace": str(tmp_path / "work"), "todo": ["shards", "view"]}
    first = [n.fingerprint for n in build(str(target))]
    (videos / "b.mp4").write_bytes(b"two")
    assert json.loads(resolve().output.splitlines()[-1]) == said
    assert [n.fingerprint for n in build(str(target))] == first
    refused = resolve("--set", "name=other")
    assert isinstance(refused.exception, UserError) and "is there already" in str(refused.exception)


def test_what_can_be_reached_again_reruns_its_stage_and_all_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"one")
    stages = {"shards": {"kind": "shard", "sources": [str(tmp_path)]}, "view": {"kind": "curate", "dataset": "shards"}}
    loaded = recipe.load(write(tmp_path, {"name": "r", "workspace": str(tmp_path / "work"), "stages": stages}))
    before = graph.build(graph.pin(loaded))
    monkeypatch.setattr(shard, "retried", lambda uri: "again" if uri == before[0].output else "")
    after = graph.build(graph.pin(loaded))
    assert [n.output for n in after][:1] == [n.output for n in before][:1], "it adds to the same dataset"
    assert all(a.fingerprint != b.fingerprint for a, b in zip(after, before, strict=True))


def test_each_night_with_new_videos_trains_in_a_place_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of retrain.yaml with a URL and named checkpoints; one that was stopped goes on where it was."""
    (tmp_path / "a.mp4").write_bytes(b"one")
    for name, value in (("VIDEOS", str(tmp_path)), ("WORKSPACE", "s3://lab/retrain")):
        monkeypatch.setenv(name, value)

    def place() -> Place:
        at = [f"stages.vae.run.checkpoints={tmp_path}/named", "stages.vae.run.upload=s3://lab/copies"]
        loaded = recipe.load("retrain", at)
        [vae] = [node for node in graph.build(graph.pin(loaded)) if node.name == "vae"]
        config: Any = vae.config
        return place_of(config.run, vae.output)

    first = place()
    assert place() == first and first.folder.parent == tmp_path / "named"
    (tmp_path / "b.mp4").write_bytes(b"two")
    assert place().folder != first.folder and place().upload != first.upload


def test_the_recipe_of_the_papers_trains_as_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VIDEOS", "WORKSPACE", "CHECKPOINTS"):
        monkeypatch.setenv(name, f"/somewhere/{name.lower()}")
    stages: Any = recipe.load("pv_vae").stages
    for name, steps in (("images", 300_000), ("vae", 50_000), ("decoder", 50_000)):
        vae = stages[name]
        assert (vae.steps, vae.lr, vae.schedule, vae.final_lr, vae.warmup) == (steps, 5e-5, "cosine", 0.1, 1000)
    images = stages["images"]
    assert images.gan_start + images.gan_warmup == 5000, "a new discriminator learns alone before"
    assert (stages["vae"].gan_start, stages["decoder"].gan_start) == (5000, 0), "and the parent's has learned"
    prior = stages["prior"]
    assert (prior.steps, prior.batch, prior.lr, prior.sample_steps) == (250_000, 64, 1e-4, 100)
    assert (prior.conditioning, prior.warmup, prior.schedule) == (0, 0, "constant")
    # while one on a GPU makes longer videos too
    small: Any = recipe.load("pv_vae_small").stages
    assert small["prior"].conditioning > 0 and small["decoder"].warmup == 1000


def test_the_recipe_of_tats_trains_as_the_paper_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VIDEOS", "WORKSPACE", "CHECKPOINTS"):
        monkeypatch.setenv(name, f"/somewhere/{name.lower()}")
    stages: Any = recipe.load("tats").stages
    vqgan = stages["vqgan"]
    assert (vqgan.steps, vqgan.batch, vqgan.accumulate, vqgan.lr) == (30_000, 96, 6, 9e-5)
    assert (vqgan.gan_start, vqgan.betas, vqgan.warm_steps, vqgan.ema_half_lives) == (10_000, (0.5, 0.9), 0, ())
    assert (vqgan.vae().codes, vqgan.vae().downsample, vqgan.vae().padding) == (16_384, (4, 8, 8), "replicate")
    for name, steps in (("base", 500_000), ("anchors", 500_000), ("tats", 30_000)):
        tats = stages[name]
        assert (tats.steps, tats.batch, tats.lr, tats.schedule, tats.warmup) == (steps, 24, 1.08e-4, "constant", 0)
        assert (tats.betas, tats.weight_decay, tats.every) == ((0.9, 0.95), 0.01, 4)
    assert [stages[name].frames for name in ("tokens", "far", "near")] == [16, 64, 20]


@pytest.mark.parametrize("name", ["tats", "tats_small", "tats_tiny"])
def test_the_recipes_of_tats_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"one")
    for variable in ("VIDEOS", "WORKSPACE", "CHECKPOINTS"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    said = CliRunner().invoke(cli, ["resolve", name, "--to", str(tmp_path / "resolved.yaml")])
    assert not said.exception, said.exception
    todo = json.loads(said.output.splitlines()[-1])["todo"]
    assert todo == ["shards", "view", "vqgan", "tokens", "far", "near", "base", "anchors", "tats"]


@pytest.mark.parametrize(
    "name", ["team/vae", "it's", "a:b", "", "m-1", "pv@1", "pv-vae.promotion", " a", "a\n", "x" * 300]
)
def test_what_cannot_name_a_model_is_refused_before_anything_starts(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, changed(vae=GOOD["stages"]["vae"] | {"name": name}))
    with pytest.raises(UserError) as caught:
        build(path)
    assert f"{path}: stages.vae.name: {name!r} cannot name a registered model" in str(caught.value)


def test_another_name_runs_again_but_goes_on_in_the_same_place(tmp_path: Path) -> None:
    stages = {"latents": {"kind": "cache_latents", "dataset": "shards", "encoder": "vae"}}
    path = write(tmp_path, changed(**stages))
    before, after = build(path), build(path, "stages.vae.name=better")
    for was, now in zip(before, after, strict=True):
        assert now.output == was.output
        assert (now.fingerprint == was.fingerprint) == (now.name in ("shards", "view"))
    assert build(path, "stages.vae.lr=0.1")[-1].output != before[-1].output


@pytest.mark.parametrize("dry", [True, False])
def test_an_observer_on_a_gpu_that_is_not_there_is_refused_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    vae = {
        "kind": "pretrain_vae",
        "dataset": "shards",
        "model": {"preset": "pv_vae_tiny"},
        "sizes": [[64, 64]],
        "run": {"observer": "cuda:9"},
    }
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"a video")
    stages = {"shards": {"kind": "shard", "sources": [str(tmp_path / "videos")]}, "vae": vae}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "workspace": str(tmp_path / "ws"), "stages": stages}))
    with pytest.raises(UserError, match=r"stage vae: run\.observer: cuda:9, but this machine has 0 GPUs"):
        CliRunner().invoke(
            cli, ["run", str(path), *(["--dry-run"] if dry else [])], catch_exceptions=False, standalone_mode=False
        )
    assert not (tmp_path / "ws" / "shards").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run": {"observer": "gpu"}}, "'gpu' is no device; give cpu or a GPU by its number, such as cuda:7"),
        (
            {"recompute": 1.5, "parent": "models:/a/1"},
            "1.5 is no share of blocks; give true, false, or a number from 0 to 1",
        ),
    ],
)
def test_a_setting_of_two_kinds_says_what_it_takes(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    stages = {"vae": {"kind": "pretrain_vae", "dataset": "s3://nowhere/shards"} | changes}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "workspace": str(tmp_path / "ws"), "stages": stages}))
    with pytest.raises(UserError) as raised:
        graph.build(recipe.load(str(path), ()))
    assert says in str(raised.value)
