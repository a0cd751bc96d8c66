"""`longtake clean`: what goes and what never does, told by a workspace with the traces of many runs."""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from flat import nested

from longtake.datasets import clusters, scores, storage
from longtake.datasets import latents as column
from longtake.datasets.captions import Captions, write_captions
from longtake.datasets.errors import Interrupted
from longtake.datasets.scores import Column, Scores, write_scores
from longtake.datasets.text import Text, TextConfig, write_text
from longtake.datasets.tokens import Tokens, write_tokens
from longtake.infra import graph, recipe, runner, runs
from longtake.infra.cli.housekeeping import clean as command
from longtake.infra.upkeep import clean
from longtake.infra.upkeep.debris import Item, Kept

TRAINING = {
    "kind": "pretrain_vae", "phase": "image", "dataset": "shards", "view": "view", "name": "tidy",
    "model": {"preset": "pv_vae_tiny"}, "sizes": [[32, 32]], "frames": 1, "lambda_gan": 0, "steps": 6, "batch": 2,
    "checkpoint_every": 1, "keep_checkpoints": 10, "log_every": 1, "sample_every": 0, "workers": 0, "eval_clips": 1,
    "ema_half_lives": [],
}  # fmt: skip
OLD = 7200.0  # seconds

pytestmark = pytest.mark.usefixtures("own_store")


class Workspace:
    """A recipe whose stages have been run by hand: their traces in MLflow and on the disk, without the work."""

    def __init__(self, folder: Path, workspace: str) -> None:
        self.folder, self.workspace = folder, workspace
        self.more: dict[str, Any] = {}  # stages beside the usual ones
        (folder / "videos").mkdir(parents=True)
        (folder / "videos" / "a.mp4").write_bytes(b"1")

    def write(self, **vae: Any) -> str:
        stages = {
            "shards": {"kind": "shard", "sources": [str(self.folder / "videos")]},
            "view": {"kind": "curate", "dataset": "shards"},
            "vae": nested(TRAINING | vae),
            "latents": {"kind": "cache_latents", "dataset": "shards", "encoder": "vae"},
            **self.more,
        }
        path = self.folder / "r.yaml"
        path.write_text(yaml.safe_dump({"name": "tidy", "workspace": self.workspace, "stages": stages}))
        return str(path)

    def open(self, **vae: Any) -> tuple[recipe.Recipe, dict[str, graph.Node], runs.Runs]:
        loaded = graph.pin(recipe.load(self.write(**vae)))
        return loaded, {n.name: n for n in graph.build(loaded)}, runs.connect(loaded)

    def ran(
        self, stage: str, status: str, steps: int = 0, uri: str = "", fresh: bool = False, **vae: Any
    ) -> tuple[str, str]:
        """A run of a stage with these settings, which ended so and left so many checkpoints; (run id, output)."""
        _, nodes, store = self.open(**vae)
        run, output = store.open(nodes[stage], None, fresh)
        for step in range(1, steps + 1):
            checkpoint(Path(output) / "checkpoints", step, run)
        if status == "FINISHED":
            store.finish(run, {"uri": uri or output})
        elif status != "RUNNING":
            store.end(run, status, "")
        return run, output

    def find(self, *kinds: str, older: float = 3600, **vae: Any) -> tuple[dict[str, Item], dict[str, str]]:
        """The items to delete and those that stay, by their place in the workspace."""
        loaded, nodes, store = self.open(**vae)
        found = list(clean.find(loaded, list(nodes.values()), store, kinds or clean.USUAL, older))

        def place(url: str) -> str:
            return url.removeprefix(f"{self.workspace}/")

        items = {place(f.where): f for f in found if isinstance(f, Item)}
        return items, {place(f.where): f.reason for f in found if isinstance(f, Kept)}

    def grow(self) -> None:
        """Another video: all stages run again."""
        (self.folder / "videos" / "b.mp4").write_bytes(b"2")

    def registered(self, alias: str | None = None) -> str:
        """A version of the model `tidy`; its URI."""
        _, _, store = self.open()
        names = [m.name for m in store.client.search_registered_models()]
        if "tidy" not in names:
            store.client.create_registered_model("tidy")
        version = store.client.create_model_version("tidy", source="file:///nowhere")
        if alias:
            store.client.set_registered_model_alias("tidy", alias, version.version)
        return f"models:/tidy/{version.version}"


def checkpoint(folder: Path, step: int, run: str) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "model.pt").write_bytes(b"0" * 1000)
    (path / "meta.json").write_text(json.dumps({"step": step, "run": run}))
    (folder / "latest").write_text(path.name)
    return path


def aged(path: Path) -> Path:
    for inside in [*path.rglob("*"), path]:
        os.utime(inside, (time.time() - OLD,) * 2, follow_symlinks=False)
    return path


def tree(folder: Path) -> set[str]:
    """Every file and folder, but for those of the store and of locks, which looking changes."""
    skipped = ("mlflow.db", "lock")
    return {
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if not p.name.startswith(skipped[0]) and p.name != skipped[1]
    }


@pytest.fixture
def here(tmp_path: Path, with_store: Callable[[Path], None]) -> Workspace:
    with_store(tmp_path / "ws")
    return Workspace(tmp_path, str(tmp_path / "ws"))


def test_of_a_finished_training_all_checkpoints_go_but_the_last_and_those_that_are_kept_for_good(
    here: Workspace,
) -> None:
    _, output = here.ran("vae", "FINISHED", steps=5, keep_every=2)
    items, _ = here.find(keep_every=2)
    folder = output.removeprefix(here.workspace + "/")
    assert set(items) == {f"{folder}/checkpoints/step-0000000{n}" for n in (1, 3)}
    assert all(i.bytes > 1000 and "step-00000005 is the last" in i.reason for i in items.values())


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_what_an_unfinished_training_would_go_on_from_stays(here: Workspace, status: str) -> None:
    here.ran("vae", status, steps=3)
    here.ran("vae", status, steps=3, lr=0.5)  # settings that the recipe has no more, but may have again
    assert not here.find()[0]


def test_settings_that_are_gone_lose_their_checkpoints_once_their_model_is_registered(here: Workspace) -> None:
    _, output = here.ran("vae", "FINISHED", steps=2, uri=here.registered(), lr=0.5)
    items, _ = here.find()
    assert [Path(where).name for where in items] == ["step-00000001", "step-00000002"]
    _, other = here.ran("vae", "FINISHED", steps=1, uri="models:/tidy/99", lr=0.25)
    assert not any(where.startswith(other.removeprefix(here.workspace + "/")) for where in here.find()[0])
    _, _, store = here.open()
    for item in items.values():
        clean.remove(item, store)
    # no `latest` that names nothing
    assert {p.name for p in (Path(output) / "checkpoints").iterdir()} == {"lock"}


def test_a_killed_run_goes_where_another_has_finished_the_same(here: Workspace) -> None:
    here.ran("vae", "FINISHED", steps=1)
    _, again = here.ran("vae", "KILLED", steps=2, fresh=True)
    items, _ = here.find()
    assert len(items) == 2 and all(again in item.paths[-1] for item in items.values())
    run, _ = here.ran("vae", "RUNNING", fresh=True)
    moved = json.dumps({"step": 1, "run": run})
    (Path(again) / "checkpoints" / "step-00000001" / "meta.json").write_text(moved)
    items, kept = here.find()
    assert [Path(item.paths[-1]).name for item in items.values()] == ["step-00000002"]
    assert f"run {run} is RUNNING" in "".join(kept.values())


def test_a_training_that_holds_its_lock_keeps_all_and_so_does_one_that_begins_meanwhile(here: Workspace) -> None:
    _, output = here.ran("vae", "FINISHED", steps=3)
    item = next(iter(here.find()[0].values()))
    with (Path(output) / "checkpoints" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        items, kept = here.find()
        assert not items and "at work" in "".join(kept.values())
        with pytest.raises(ValueError, match="a training has begun there"):
            clean.remove(item, here.open()[2])
    assert Path(item.paths[-1]).is_dir() and here.find()[0]


def test_in_a_folder_that_the_recipe_names_the_last_checkpoint_stays_for_whoever_goes_on(here: Workspace) -> None:
    folder = here.folder / "named"
    run, _ = here.ran("vae", "FINISHED", checkpoints=str(folder))
    for step in (1, 2):
        checkpoint(folder, step, run)
    checkpoint(folder, 3, "anothers")
    items, kept = here.find(checkpoints=str(folder))
    assert [Path(item.paths[-1]).name for item in items.values()] == ["step-00000001", "step-00000002"]
    assert "no run of this recipe's experiment" in kept[str(folder / "step-00000003")]
    # whose settings the recipe has no more, and whose model is registered
    old, _ = here.ran("vae", "FINISHED", uri=here.registered(), checkpoints=str(folder), lr=0.5)
    shutil.rmtree(folder)
    checkpoint(folder, 1, old)
    assert not here.find(checkpoints=str(folder))[0]


def test_a_workspace_with_an_apostrophe_in_its_path_loses_the_same(
    tmp_path: Path, with_store: Callable[[Path], None]
) -> None:
    with_store(tmp_path / "it's" / "ws")
    here = Workspace(tmp_path / "it's", f"{tmp_path}/it's/ws")
    here.ran("vae", "FINISHED", steps=2)
    assert [Path(item.paths[-1]).name for item in here.find()[0].values()] == ["step-00000001"]


def test_in_the_parts_of_a_named_folder_and_of_its_copies_what_a_stage_would_go_on_from_stays(here: Workspace) -> None:
    named, far = here.folder / "named", here.folder / "far"
    places = {"checkpoints": str(named), "upload": str(far)}
    made = {}
    for lr in (0.5, 0.25):
        run, output = here.ran("vae", "FINISHED", uri=here.registered(), lr=lr, **places)
        made[lr] = Path(output).name
        for step in (1, 2):
            checkpoint(named / made[lr], step, run)
        checkpoint(far / made[lr], 2, run)
    items, _ = here.find(lr=0.25, steps=9, **places)
    assert {*items} == {
        f"{named}/{made[0.25]}/step-00000001",
        *(f"{named}/{made[0.5]}/step-0000000{step}" for step in (1, 2)),
        f"{far}/{made[0.5]}",
    }
    for item in items.values():
        clean.remove(item, here.open()[2])
    assert [path.name for path in far.iterdir()] == [made[0.25]]
    assert not here.find(lr=0.25, steps=9, **places)[0]


def test_in_a_named_folder_half_checkpoints_go_and_copies_without_a_name_too_and_a_store_that_fails_keeps_no_other(
    here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, far = here.folder / "named", here.folder / "far"
    places = {"checkpoints": str(named), "upload": str(far)}
    run, output = here.ran("vae", "FINISHED", uri=here.registered(), lr=0.5, **places)
    part = Path(output).name
    checkpoint(far / part, 2, run)
    # a deletion was stopped
    (far / part / "latest").unlink()
    half = named / part / ".step-00000002.tmp"
    half.mkdir(parents=True)
    (half / "model.pt").write_bytes(b"0" * 1000)
    aged(half)
    expected = {f"{far}/{part}", str(half)}
    assert {*here.find(lr=0.25, **places)[0]} == expected

    names = storage.names

    def refuse(url: str) -> list[str]:
        if url == str(far):
            raise PermissionError(13, "Access Denied", url)
        return names(url)

    monkeypatch.setattr(storage, "names", refuse)
    items, kept = here.find(lr=0.25, **places)
    assert {*items} == {str(half)} and "Access Denied" in kept[str(far)]


def test_what_another_run_goes_on_from_in_the_same_output_stays(here: Workspace) -> None:
    _, output = here.ran("vae", "FINISHED", steps=2, uri=here.registered())
    last = f"{output.removeprefix(here.workspace + '/')}/checkpoints/step-00000002"
    assert last in here.find(lr=0.25)[0]
    # it ended before its first checkpoint
    assert here.ran("vae", "KILLED", skip_nonfinite=3)[1] == output
    assert last not in here.find(lr=0.25)[0]


def test_links_are_not_followed(here: Workspace) -> None:
    _, output = here.ran("vae", "FINISHED", steps=2)
    outside = here.folder / "outside"
    shutil.move(output, outside)
    Path(output).symlink_to(outside)
    (outside / f".x~{socket.gethostname()}@999999999~ab.tmp").write_bytes(b"1")
    aged(outside)
    before = tree(outside)
    assert not here.find()[0]
    assert tree(outside) == before


def test_debris_goes_when_its_writer_is_dead_and_it_is_old(here: Workspace) -> None:
    _, output = here.ran("shards", "KILLED")
    host = socket.gethostname()
    made = {
        "old": Path(output) / f".a~{host}@999999999~ab.tmp",
        "young": Path(output) / f".b~{host}@999999999~ab.tmp",
        "alive": Path(output) / f".c~{host}@{os.getpid()}~ab.tmp",
        "foreign": Path(output) / ".d~elsewhere@1~ab.tmp",
        "named alike": Path(output) / "notes.tmp",
    }
    for path in made.values():
        path.mkdir(parents=True)
        (path / "part").write_bytes(b"0" * 100)
        aged(path)
    os.utime(made["young"] / "part")  # written to just now
    items, _ = here.find("debris")
    assert [item.paths for item in items.values()] == [(str(made["old"]),)]
    assert items[str(made["old"]).removeprefix(here.workspace + "/")].bytes == 100


def test_half_a_checkpoint_of_a_killed_training_goes(here: Workspace) -> None:
    _, output = here.ran("vae", "KILLED", steps=1)
    scratch = Path(output) / "checkpoints" / ".step-00000002.tmp"
    scratch.mkdir()
    aged(scratch)
    assert [item.paths for item in here.find()[0].values()] == [(str(scratch),)]


def test_outputs_that_no_run_names_go_unless_they_may_hold_shards_or_are_anothers(here: Workspace) -> None:
    _, _, store = here.open()
    orphan, dataset, strange, foreign = (
        Path(here.workspace) / name
        for name in ("vae/0123456789ab", "shards/0123456789ab", "vae/ba9876543210-01234567", "mine/notes")
    )
    checkpoint(orphan / "checkpoints", 1, "gone")
    for folder, name in ((dataset, "dataset.json"), (strange, "thesis.pdf"), (foreign, "todo")):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(b"1")
    aged(Path(here.workspace) / "vae")
    items, kept = here.find()
    assert not items and "is MLFLOW_TRACKING_URI right?" in kept["vae/0123456789ab"], "a store that knows no run here"
    here.ran("view", "FINISHED")
    items, kept = here.find()
    assert set(items) == {"vae/0123456789ab"}
    assert set(kept) == {"shards/0123456789ab", "vae/ba9876543210-01234567"}
    clean.remove(items["vae/0123456789ab"], store)
    assert not orphan.exists() and foreign.exists() and (strange / "thesis.pdf").exists()


def latents(dataset: str, name: str, uri: str, output: str) -> None:
    column.write_latents(
        output,
        column.Latents(
            dataset, name, {"uri": uri, "digest": "d", "model": "PVVAE", "config": {}}, 4, 4, 8, None, "fp32", "float16",
            1, (0.0,), (1.0,), (1.0,), None, {},
        ),
    )  # fmt: skip
    for part, ending in (("train", "parquet"), ("train", "tar"), ("val", "parquet"), ("val", "tar")):
        storage.write(storage.join(dataset, part, f"00000.{name}.{ending}"), b"0" * 100)
    storage.write(storage.join(dataset, "compact", f"train.{name}.json"), b"0" * 100)


def with_latents(here: Workspace) -> tuple[str, Callable[[str, str], str]]:
    _, dataset = here.ran("shards", "FINISHED")
    for name in ("train/00000.tar", "train/00000.parquet", "dataset.json", "sources/0.parquet", "views/v.parquet"):
        storage.write(storage.join(dataset, name), b"1")

    def make(name: str, uri: str) -> str:
        """A column of an encoder, by a run whose settings the recipe has no more; its output."""
        _, output = here.ran("latents", "FINISHED", lr=len(name) / 7 + int(name[-1], 16))
        latents(dataset, name, uri, output)
        return output

    return dataset, make


def test_latents_go_whose_encoder_nobody_names_and_shards_and_views_never_do(here: Workspace) -> None:
    dataset, make = with_latents(here)
    for number, alias in enumerate(("champion", "candidate", "previous", None)):
        make(f"latent-a{number}", here.registered(alias))
    vae = here.registered()
    here.ran("vae", "FINISHED", uri=vae)
    make("latent-b4", vae)  # with settings of old, of an encoder that a stage makes
    _, output = here.ran("latents", "FINISHED")
    latents(dataset, "latent-c5", here.registered(), output)  # what the recipe's own stage has made
    storage.write(storage.join(dataset, "train", "00000.latent-dd.tar"), b"1")  # what nobody has described yet
    items, kept = here.find("latents")
    [item] = items.values()
    assert item.where.endswith("latent-a3") and item.bytes == 500 and "has no alias" in item.reason
    stay = {where.rpartition(" ")[2]: reason for where, reason in kept.items()}
    assert {name: reason.split()[-1] for name, reason in stay.items()} == {
        "latent-a0": "champion",
        "latent-a1": "candidate",
        "latent-a2": "previous",
        "latent-b4": vae,
        "latent-dd": "has",
    }
    before = tree(Path(dataset))
    clean.remove(item, here.open()[2])
    gone = before - tree(Path(dataset))
    assert len(gone) == 5 and all("latent-a3" in name for name in gone)


def test_latents_stay_while_a_run_may_read_them_or_another_experiment_has_made_them_too(here: Workspace) -> None:
    dataset, make = with_latents(here)
    make("latent-a1", here.registered())
    assert len(here.find("latents")[0]) == 1
    run, _ = here.ran("vae", "RUNNING", lr=0.125)
    items, kept = here.find("latents")
    assert not items and f"run {run} is RUNNING" in "".join(kept.values())
    _, _, store = here.open()
    store.client.set_terminated(run, "KILLED")
    other = store.client.create_experiment("other")
    tags = {"longtake.kind": "cache_latents", "longtake.output": str(here.folder / "elsewhere")}
    latents(dataset, "latent-a1", "models:/tidy/1", tags["longtake.output"])
    store.client.create_run(other, tags=tags)
    items, kept = here.find("latents")
    assert not items and "another experiment" in "".join(kept.values())


def test_a_column_stays_that_a_stage_names_by_its_output(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    _, make = with_latents(here)
    named, _ = make("latent-a1", here.registered()), make("latent-a2", here.registered())
    monkeypatch.chdir(here.folder)
    for output in (named, named.removeprefix(f"{here.folder}/"), f"file://{named}"):
        prior = {"kind": "finetune_latte", "dataset": "shards", "latents": output, "frames": 9}
        here.more = {"prior": prior | {"model": {"preset": "latte_tiny"}}}
        assert [where.rpartition(" ")[2] for where in here.find("latents")[0]] == ["latent-a2"]


def test_tokens_go_whose_encoder_nobody_names(here: Workspace) -> None:
    here.more["tokens"] = {"kind": "cache_tokens", "dataset": "shards", "encoder": "vae", "size": [64, 64]}
    _, dataset = here.ran("shards", "FINISHED")
    for name, alias, lr in (("tokens-a0", "champion", 0.25), ("tokens-a1", None, 0.5), ("tokens-a2", None, 1e-4)):
        _, output = here.ran("tokens", "FINISHED", **({} if lr == 1e-4 else {"lr": lr}))
        made_by = {"uri": here.registered(alias), "digest": "d", "config": {}}
        record = Tokens(dataset, name, made_by, 64, 16, 1, 16, (64, 64), (4, 8, 8), None, {}, 1.0, 6.0)
        write_tokens(output, record)
        storage.write(storage.join(dataset, "train", f"00000.{name}.tar"), b"0" * 100)
    items, kept = here.find()
    assert [(item.kind, item.where.rpartition(" ")[2]) for item in items.values()] == [("tokens", "tokens-a1")]
    assert "is champion" in "".join(kept.values()), "the recipe's own are not even looked at"


def test_texts_go_that_no_stage_of_the_recipe_makes(here: Workspace) -> None:
    import torch

    dataset, _ = with_latents(here)

    def make(name: str, length: int) -> None:
        """A column of token states, by a stage with texts of this length."""
        here.more = {"text": {"kind": "cache_text", "dataset": "shards", "captions": "/captions", "length": length}}
        _, output = here.ran("text", "FINISHED")
        encoder = TextConfig(length=length).model_dump() | {"digest": "d", "width": 1}
        write_text(output, Text(dataset, name, encoder, "caption-1", None, {}, {}, {}), torch.zeros(1, 1))
        for split, ending in (("train", "parquet"), ("train", "tar"), ("val", "parquet"), ("val", "tar")):
            storage.write(storage.join(dataset, split, f"00000.{name}.{ending}"), b"0" * 100)

    make("text-a1", 77)
    make("text-b2", 99)
    storage.write(storage.join(dataset, "train", "00000.text-dd.tar"), b"1")  # what nobody has described yet
    for kinds in ((), ("text",)):
        items, kept = here.find(*kinds)
        (item,) = (found for where, found in items.items() if "text-" in where)
        assert item.where.endswith("text-a1") and item.bytes == 400 and "no stage of the recipe makes" in item.reason
        assert [where.rpartition(" ")[2] for where in kept if "text-" in where] == ["text-dd"]
    here.grow()
    assert [item.where.rpartition(" ")[2] for item in here.find("text")[0].values()] == ["text-a1"], (
        "it would be reused"
    )
    run, _ = here.ran("vae", "RUNNING")
    items, kept = here.find("text")
    assert not items and any(f"run {run} is RUNNING" in reason for reason in kept.values())


def test_captions_go_only_where_asked_for_and_no_stage_uses_them_or_names_their_captioner(here: Workspace) -> None:
    _, dataset = here.ran("shards", "FINISHED")

    def make(name: str, model: str | None, prompt: str) -> None:
        here.more = {"captions": {"kind": "caption", "dataset": "shards", "prompt": prompt}}
        _, output = here.ran("captions", "FINISHED")
        captioner = {"model": model} if model else {}
        write_captions(output, Captions(dataset, name, captioner, None, {}, {}))
        for split in ("train", "val"):
            storage.write(storage.join(dataset, split, f"00000.{name}.parquet"), b"0" * 100)
        storage.write(storage.join(dataset, "answers", f"train-00001.{name}.ab12.json"), b"0" * 50)

    make("caption-a1", None, "old")
    make("caption-b2", "vlm", "older")
    make("caption-c3", None, "now")
    assert not any("caption" in where for where in here.find()[0])
    items, kept = here.find("captions")
    assert {where.rpartition(" ")[2] for where in items} == {"caption-a1", "caption-b2"} and not kept
    assert all(item.bytes == 250 for item in items.values())
    here.more["captions"] |= {"model": "vlm", "endpoint": "http://host/v1"}
    items, kept = here.find("captions")
    assert {where.rpartition(" ")[2] for where in items} == {"caption-a1", "caption-c3"}
    assert ["names its captioner vlm" in reason for reason in kept.values()] == [True]
    gone = next(item for item in items.values() if item.where.endswith("a1"))
    before = tree(Path(dataset))
    clean.remove(gone, here.open()[2])
    files = {f"{split}/00000.caption-a1.parquet" for split in ("train", "val")}
    assert before - tree(Path(dataset)) == files | {"answers/train-00001.caption-a1.ab12.json"}


def test_scores_go_that_no_stage_of_the_recipe_makes_or_names(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    _, dataset = here.ran("shards", "FINISHED")

    def make(quantile: float) -> tuple[str, str]:
        """A column by a stage with these settings, of which one column is the same for all; its name, and its record."""
        here.more = {"scores": {"kind": "score", "dataset": "shards", "scorers": {"light": {}, "bars": {}}}}
        here.more["scores"]["view"] = f"/views/{quantile}.parquet"
        _, output = here.ran("scores", "FINISHED")
        names = {"light": f"score-light-{quantile * 100:02.0f}", "bars": "score-bars-aa"}
        columns = {name: Column(column, name, {}, "", ()) for name, column in names.items()}
        write_scores(output, Scores(dataset, columns, None, {}))
        for split in ("train", "val"):
            storage.write(storage.join(dataset, split, f"00000.{names['light']}.parquet"), b"0" * 100)
        storage.write(storage.join(dataset, "train", "00000.score-bars-aa.parquet"), b"0")
        storage.write(storage.join(dataset, "compact", f"train.{names['light']}.arrow"), b"0" * 50)
        return names["light"], output

    old, _ = make(0.1)
    named, record = make(0.2)
    make(0.3)
    for kinds in ((), ("scores",)):
        items, _ = here.find(*kinds)
        gone = {where.rpartition(" ")[2]: item for where, item in items.items() if "score-" in where}
        assert gone.keys() == {old, named} and gone[old].bytes == 250
        assert "no stage of the recipe scores bars, light with" in gone[old].reason
    monkeypatch.setattr(clean, "inputs_of", lambda config: {"scores": (record, "scores")})
    items, _ = here.find("scores")
    assert [where.rpartition(" ")[2] for where in items] == [old], "a stage may name a record"


def test_columns_that_a_run_would_reuse_after_new_sources_stay(here: Workspace) -> None:
    """Whatever else is asked for beside them."""
    _, dataset = here.ran("shards", "FINISHED")
    here.more = {"scores": {"kind": "score", "dataset": "shards", "scorers": {"light": {}}}}
    _, output = here.ran("scores", "FINISHED")
    write_scores(output, Scores(dataset, {"light": Column("score-light-aa", "light", {}, "", ())}, None, {}))
    storage.write(storage.join(dataset, "train", "00000.score-light-aa.parquet"), b"0" * 100)
    assert not here.find("scores")[0]
    here.grow()
    assert not here.find("scores")[0]
    here.more["scores"]["scorers"] = {"light": {}, "bars": {}}
    assert not here.find("scores")[0]
    here.more["scores"]["view"] = "/views/other.parquet"
    assert len(here.find("scores")[0]) == 1
    del here.more["scores"]["view"]
    here.ran("scores", "FINISHED")
    assert len(here.find("scores")[0]) == 1, "it has found no use for it"


def test_clusters_go_that_no_stage_of_the_recipe_makes(here: Workspace) -> None:
    _, dataset = here.ran("shards", "FINISHED")

    def make(seed: int, similarity: float) -> str:
        """Clusters by a stage with these settings; the name of their column."""
        here.more = {
            "clusters": {"kind": "cluster", "dataset": "shards", "scores": "/scores", "embedding": "clip.vector"}
        }
        here.more["clusters"] |= {"seed": seed, "similarity": similarity}
        _, output = here.ran("clusters", "FINISHED")
        column = scores.Column(f"score-cluster-{seed}{seed}", "cluster", {}, "", clusters.FIELDS)
        embedding = {"column": "score-clip-aa", "field": "vector", "width": 4}
        folder = f"clusters/{seed}{seed}"
        record = clusters.Clusters(dataset, folder, column.plain(), embedding, None, similarity, {}, {}, {}, {})
        clusters.write_clusters(output, record)
        storage.write(storage.join(dataset, "train", f"00000.{column.column}.parquet"), b"0" * 10)
        for name in ("centroids.safetensors", "vectors/train-00000.safetensors", f"pairs-{similarity}/00000.parquet"):
            storage.write(storage.join(dataset, folder, name), b"0" * 100)
        return column.column

    old = make(1, 0.9)
    make(2, 0.95)
    live = make(2, 0.9)
    items, _ = here.find()
    gone = {where.partition(": ")[2]: item for where, item in items.items() if "score-" in where}
    assert {name: item.bytes for name, item in gone.items()} == {
        old: 210,
        f"{old} pairs-0.9": 100,
        f"{live} pairs-0.95": 100,
    }
    assert "no stage of the recipe makes clusters of score-clip-aa" in gone[old].reason
    for item in gone.values():
        assert clean.remove(item, here.open()[2]) is None
    inside = {"centroids.safetensors", "vectors/train-00000.safetensors", "pairs-0.9/00000.parquet"}
    left = {path for path in tree(Path(dataset)) if "cluster" in path and Path(dataset, path).is_file()}
    assert left == {f"train/00000.{live}.parquet", *(f"clusters/22/{name}" for name in inside)}


def test_half_models_of_killed_runs_go_and_whole_ones_stay(here: Workspace) -> None:
    run, _ = here.ran("vae", "KILLED")
    _, _, store = here.open()
    half, whole = (
        store.client.create_logged_model(store.experiment, source_run_id=run, tags={"sha256": "x"}) for _ in range(2)
    )
    store.client.finalize_logged_model(whole.model_id, "READY")
    place = Path(half.artifact_location.removeprefix("file://"))
    place.mkdir(parents=True)
    (place / "weights").write_bytes(b"0" * 300)
    assert not here.find("debris")[0], "it may be at work this minute"
    [item] = here.find("debris", older=-1)[0].values()
    assert half.model_id in item.where and item.bytes == 300

    def cannot(*_: Any) -> None:
        raise NotImplementedError  # as the base class of MLflow's repositories does for stores such as SFTP

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlflow.store.artifact.local_artifact_repo.LocalArtifactRepository.delete_artifacts", cannot)
        done = CliRunner().invoke(command, [here.write(), "--debris", "--older", "-1", "--yes"])
    assert done.exit_code == 0 and "0 of 0 B deleted" in done.output, done.output
    assert f"its store cannot delete {half.artifact_location}: delete that by hand" in done.output and place.exists()
    assert clean.remove(item, store) is None
    assert not place.exists()
    assert [m.model_id for m in store.client.search_logged_models([store.experiment])] == [whole.model_id]
    store.client.update_run(run, status="RUNNING")
    store.client.create_logged_model(store.experiment, source_run_id=run, tags={"sha256": "x"})
    items, kept = here.find("debris", older=-1)
    assert not items and "RUNNING" in "".join(kept.values())


def test_pulled_models_that_no_ref_names_go(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = here.folder / "cache"
    monkeypatch.setenv("LONGTAKE_CACHE", str(cache))
    named, unnamed = "a" * 64, "b" * 64
    for sha256 in (named, unnamed, "c" * 64 + ".partial"):
        (cache / "models" / sha256).mkdir(parents=True)
        (cache / "models" / sha256 / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "r.json").write_text(json.dumps({"sha256": named}))
    assert not here.find("cache")[0], "just pulled, before its ref is written"
    aged(cache)
    assert [Path(i.paths[0]).name for i in here.find("cache")[0].values()] == [unnamed]


def test_nothing_is_touched_without_yes_and_the_command_says_what_and_why(here: Workspace) -> None:
    here.ran("vae", "FINISHED", steps=3)
    before = tree(Path(here.workspace))
    said = CliRunner().invoke(command, [here.write()], catch_exceptions=False).output
    assert said.count("would go  ") == 2 and "is the last" in said and "add --yes" in said.splitlines()[-1], said
    assert tree(Path(here.workspace)) == before
    said = CliRunner().invoke(command, [here.write(), "--latents"], catch_exceptions=False).output
    assert said.startswith("0 of 0 B would go")
    said = CliRunner().invoke(command, [here.write(), "--yes"], catch_exceptions=False).output
    assert said.count("gone  ") == 2 and said.splitlines()[-1].startswith("2 of ") and said.endswith(" deleted\n")
    assert len(before - tree(Path(here.workspace))) == 6
    assert CliRunner().invoke(command, [here.write(), "--yes"]).output.startswith("0 of 0 B deleted")


def test_a_remote_workspace_loses_dead_latents_and_orphans_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_variables: dict[str, str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    fs = storage.filesystem("s3://lake")[0]
    fs.mkdir("lake")
    here = Workspace(tmp_path, "s3://lake/ws")
    _, make = with_latents(here)
    make("latent-a1", here.registered("champion"))
    make("latent-a2", here.registered())
    storage.write("s3://lake/ws/latents/0123456789ab/latents.json", b"{}")
    before = set(fs.find("lake"))
    items, _ = here.find(older=-10)
    assert {item.kind for item in items.values()} == {"latents", "output"}
    for item in items.values():
        clean.remove(item, here.open()[2])
    fs.invalidate_cache()
    gone = before - set(fs.find("lake"))
    assert len(gone) == 6 and all("latent-a2" in name or "0123456789ab" in name for name in gone)


@pytest.mark.slow
def test_after_a_clean_nothing_runs_again_and_a_stopped_training_goes_on_where_it_was(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    from longtake.training import launch

    made = tmp_path / "dataset"
    shutil.copytree(dataset, made)
    stages = {
        "view": {"kind": "curate", "dataset": str(made), "rules": {}},
        "vae": nested(TRAINING | {"dataset": str(made)}),
        "next": nested(TRAINING | {"dataset": str(made), "parent": "vae", "seed": 1}),
    }
    del stages["next"]["model"]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"name": "whole", "workspace": str(tmp_path / "ws"), "stages": stages}))
    loaded = graph.pin(recipe.load(str(path)))
    for name in ("view", "vae"):
        runner.run_stage(loaded, name)
    asked = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(launch, "stop_requested", lambda: next(asked) >= 3)
        with pytest.raises(Interrupted):
            runner.run_stage(loaded, "next")

    nodes, store = graph.build(loaded), runs.connect(loaded)
    stopped = store.find(nodes[-1].fingerprint)
    assert stopped and stopped.status == "KILLED"
    plan = runner.plan(loaded, nodes, store, runner.Choice())
    assert plan == {"view": False, "vae": False, "next": True}
    left = store.client.get_run(stopped.id).data.tags["longtake.output"]
    kept = sorted(p.name for p in Path(left).glob("checkpoints/step-*"))
    gone = [item for item in clean.find(loaded, nodes, store, older=0) if isinstance(item, Item)]
    assert len(gone) == 5, "of the finished training's six checkpoints"
    for item in gone:
        clean.remove(item, store)
    assert runner.plan(loaded, nodes, store, runner.Choice()) == plan
    assert kept and sorted(p.name for p in Path(left).glob("checkpoints/step-*")) == kept

    runner.run_stage(loaded, "next")
    assert not any(runner.plan(loaded, nodes, store, runner.Choice()).values())
    logged = [m.step for m in store.client.get_metric_history(stopped.id, "loss")]
    assert sorted(logged) == list(range(1, TRAINING["steps"] + 1)), "each step once: it did not start again"
