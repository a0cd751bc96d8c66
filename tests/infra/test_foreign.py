"""Text encoders in the registry: imported from a folder, shown, pulled, named by alias, and taken for nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import letters
import numpy as np
import pytest
import spoken
import tiny_encoders
import torch
from click.testing import CliRunner

import longtake
from longtake.datasets.captions import Caption
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.text import read_text
from longtake.infra.cli import cli
from longtake.pipeline.stages import cache_text
from longtake.training import registry
from longtake.training.data import text_facts
from longtake.training.registry import cache, disk, fetch
from longtake.training.text import TextConfig, load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a red square moves left", "", "people walk through the town at night"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders `umt5` and `other`, `split` in several files of weights, `parts` as diffusers lays it out."""
    root = tmp_path_factory.mktemp("encoders")
    tiny_encoders.encoder("umt5", root / "umt5")
    tiny_encoders.encoder("umt5", root / "other", seed=1)
    tiny_encoders.model("bert").save_pretrained(root / "split", max_shard_size="20KB")
    tiny_encoders.tokenizer(root / "split", "<s>", "</s>")
    shutil.copytree(root / "umt5", root / "parts" / "text_encoder")
    (root / "parts" / "tokenizer").mkdir()
    for path in (root / "parts" / "text_encoder").glob("*token*"):
        path.rename(root / "parts" / "tokenizer" / path.name)
    return root


@pytest.fixture(scope="module", autouse=True)
def store(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new store with versions 1 and 2 of umt5, split, parts, and an autoencoder; the cache is empty."""
    import mlflow

    place = tmp_path_factory.mktemp("store") / "new"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
        patched.setenv("LONGTAKE_CACHE", str(place.parent / "cache"))
        patched.setenv("HF_HUB_OFFLINE", "1")
        for folder, name in (("umt5", "umt5"), ("other", "umt5"), ("split", "split"), ("parts", "parts")):
            said("models", "import", str(folders / folder), "--name", name)
        videos = letters.save_priors(place.parent / "videos")
        client = mlflow.MlflowClient()
        run = client.create_run(client.create_experiment("videos", f"{place}/artifacts")).info.run_id
        registry.register(videos / "vae", "vae", run)
        yield place
        mlflow.set_tracking_uri(None)


def said(*arguments: str) -> str:
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stdout.strip()


def same(one: Any, other: Any) -> bool:
    return all(map(torch.equal, one.encode(TEXTS), other.encode(TEXTS)))


@pytest.mark.parametrize(
    ("uri", "folder", "version"),
    [
        ("models:/umt5/1", "umt5", "models:/umt5/1"),
        ("models:/umt5@previous", "umt5", "models:/umt5/1"),
        ("models:/umt5@champion", "other", "models:/umt5/2"),
        ("models:/split@champion", "split", "models:/split/1"),
        ("models:/parts/latest", "parts", "models:/parts/1"),
    ],
)
def test_a_registered_encoder_is_that_of_the_folder_and_knows_its_version(
    folders: Path, uri: str, folder: str, version: str
) -> None:
    registered, ours = longtake.text_encoder(uri, layer=-2), longtake.text_encoder(str(folders / folder), layer=-2)
    assert registered.digest == ours.digest and same(registered, ours)
    assert registered.describe() == ours.describe() | {"encoder": version}
    assert same(load_encoder(TextConfig(**registered.describe())), ours)


def test_what_is_registered_is_shown_and_pulled_as_a_folder_that_is_an_encoder(folders: Path, tmp_path: Path) -> None:
    facts = json.loads(said("models", "show", "umt5@champion", "--json"))
    assert facts["model"] == "text_encoder" and facts["parameters"] == {"model_type": "umt5", "width": 32}
    assert facts["aliases"] == ["champion"] and facts["problem"] is None
    assert facts["bytes"] == sum(
        path.stat().st_size for path in (folders / "other").glob("*.*") if path.name != "generation_config.json"
    )
    for name in ("split", "parts", "umt5"):
        pulled = said("models", "pull", f"{name}@champion", "--to", str(tmp_path / name))
        folder = folders / ("other" if name == "umt5" else name)
        assert longtake.text_encoder(pulled).digest == longtake.text_encoder(str(folder)).digest
        assert {path.suffix for path in Path(pulled).rglob("*.*")} == {".json", ".safetensors"}
    assert len(list((tmp_path / "split" / "text_encoder").glob("model-*.safetensors"))) > 1
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["config.json", "text_encoder", "tokenizer"]


def test_the_same_files_are_registered_once_and_made_the_champion_again(folders: Path, tmp_path: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    copy = str(shutil.copytree(folders / "umt5", tmp_path / "copy"))
    assert said("models", "import", copy, "--name", "umt5") == "models:/umt5/1"
    assert client.get_registered_model("umt5").aliases == {"champion": 1, "previous": 2}
    assert said("models", "import", str(folders / "other"), "--name", "umt5") == "models:/umt5/2"
    assert client.get_registered_model("umt5").aliases == {"champion": 2, "previous": 1}
    runs = client.search_runs([client.get_experiment_by_name("imported models").experiment_id])
    assert len(runs) == 4 and {run.info.status for run in runs} == {"FINISHED"}


def test_a_pulled_encoder_is_there_without_its_store(monkeypatch: pytest.MonkeyPatch, folders: Path) -> None:
    here = longtake.text_encoder("models:/umt5@champion")
    monkeypatch.setenv("LONGTAKE_OFFLINE", "1")
    assert longtake.text_encoder("models:/umt5@champion").describe() == here.describe()
    monkeypatch.setenv("LONGTAKE_CACHE", str(folders / "empty"))
    with pytest.raises(Failure, match="LONGTAKE_OFFLINE is set, and it was never pulled"):
        longtake.text_encoder("models:/umt5@champion")


def test_a_pull_that_was_stopped_goes_on_and_damage_is_mended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folders: Path
) -> None:
    monkeypatch.setenv("LONGTAKE_CACHE", str(tmp_path))
    whole = cache.pull("models:/parts/1")
    (whole / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    assert longtake.text_encoder("models:/parts/1").digest == longtake.text_encoder(str(folders / "parts")).digest
    # stopped within a file, with something else in the folder
    partial = whole.rename(whole.with_name(whole.name + ".partial"))
    weights = partial / "text_encoder" / "model.safetensors"
    weights.with_name("model.safetensors.part").write_bytes(weights.read_bytes()[:1000])
    weights.unlink()
    (partial / "text_encoder" / "odd").mkdir()
    (partial / "text_encoder" / "odd" / "odd.json").touch()
    fetched: list[tuple[str, int]] = []
    fetch_file = fetch.Artifacts.fetch

    def noted(self: Any, name: str, to: Path, bar: Any = None) -> None:
        fetched.append((name, to.stat().st_size if to.exists() else 0))
        fetch_file(self, name, to, bar)

    monkeypatch.setattr(fetch.Artifacts, "fetch", noted)
    assert cache.pull("models:/parts/1") == whole
    assert fetched == [("config.json", 0), ("text_encoder/model.safetensors", 1000)]
    assert not (whole / "text_encoder" / "odd").exists()


def test_a_prompt_is_encoded_by_the_version_that_the_model_has_learned_from(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = longtake.text_encoder("models:/umt5@champion")
    known = encoder.describe() | {"digest": encoder.digest, "width": encoder.width}
    fields = {"text_width": encoder.width, "text_empty": len(encoder.encode([""])[0]), "text_length": encoder.limit}
    models = letters.save_priors(tmp_path / "models", {"uri": "", "digest": "0", "encoder": known}, **fields)
    assert disk.read_config(models / "latte")["text"]["encoder"]["encoder"] == "models:/umt5/2"

    def film(*more: str) -> bytes:
        out = tmp_path / "x.mp4"
        said("generate", str(models / "latte"), "--prompt", "a red square", "--out", str(out), *more)
        return out.read_bytes()

    monkeypatch.setenv("LONGTAKE_CACHE", str(tmp_path / "cache"))  # not there: it is pulled
    made = film()
    assert film("--text-encoder", str(folders / "other")) == made == film("--text-encoder", "models:/umt5@champion")
    for wrong, why in (
        ("models:/umt5/1", "has learned texts by another encoder than models:/umt5/1"),
        ("models:/umt5@none", "no such version or alias of umt5 .* versions: 2, 1"),
        ("models:/vae/1", "encoder: models:/vae/1: is a PVVAE, and no text encoder; register one by `longtake models"),
    ):
        with pytest.raises(UserError, match=why) as e:
            film("--text-encoder", wrong)
        assert "\n" not in str(e.value)


def test_a_stage_encodes_by_the_version_that_the_alias_named_at_its_beginning(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(shutil.copytree(dataset, tmp_path / "dataset"))
    spoken.describe(root, lambda key: [Caption("a red square")])
    inputs = {"dataset": root, "captions": spoken.record(tmp_path / "captions", root)}
    store = os.environ["MLFLOW_TRACKING_URI"]

    def make(stage: str, jobs: Any, task: Any, load: Any, models: Any, arguments: Any) -> Counter[str]:
        """In this process, in place of Ray's: a worker that was started without knowing of the store."""
        said("rollback", "umt5")  # the alias moves while the stage is at work
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        totals, encode = Counter[str](), load("cpu", **arguments)
        for job in jobs:
            keep = np.unpackbits(np.frombuffer(job.keep, np.uint8), count=job.clips).astype(bool)
            totals.update(encode(split=job.split, name=job.name, keep=keep, report=lambda *_: None))
        return totals

    monkeypatch.setattr(cache_text.columns, "make", make)
    encoder = longtake.text_encoder("models:/umt5/2", length=8)
    chosen = cache_text.Config(kind="cache_text", dataset="x", captions="y", encoder="models:/umt5@champion", length=8)
    assert cache_text.outside(chosen) == "", "a recipe is resolved without the store"
    try:
        found = read_text(cache_text.run(chosen, inputs, str(tmp_path / "out"))["uri"])
    finally:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
        said("rollback", "umt5")
    assert found.encoder["encoder"] == "models:/umt5/2" and found.encoder["digest"] == encoder.digest
    (states,) = encoder.encode(["a red square"])
    assert all(
        torch.equal(one, states)
        for all_of_clip in spoken.states(root, found.column).values()
        for one in all_of_clip or ()
    )
    facts = text_facts(found, {"uri": found.uri, "digest": "0"})
    assert facts and facts["encoder"]["encoder"] == "models:/umt5/2"
    # the same weights in a folder are the same column
    again = cache_text.run(
        chosen.model_copy(update={"encoder": str(folder_of("umt5/2"))}), inputs, str(tmp_path / "more")
    )
    assert again["column"] == found.column and again["metrics"]["encoded_shards"] == 0


def folder_of(version: str) -> Path:
    return Path(said("models", "pull", version))


def test_an_encoder_is_taken_for_no_model_of_videos(store: Path, tmp_path: Path) -> None:
    line = (
        r"umt5@champion: is a text encoder, and no model of videos; name it as the `encoder` of a `cache_text` stage$"
    )
    with pytest.raises(UserError, match=line):
        longtake.load("models:/umt5@champion")  # as `base`, `vae`, `parent` and the others are
    with pytest.raises(UserError, match=line):
        said("generate", "models:/umt5@champion", "--out", str(tmp_path / "x.mp4"))
    latte = str(store.parent / "videos" / "latte")
    with pytest.raises(UserError, match=line):
        said("generate", latte, "--vae", "models:/umt5@champion", "--out", str(tmp_path / "x.mp4"))
    pulled = said("models", "pull", "umt5@champion")
    with pytest.raises(UserError, match=f"^{pulled}: is a text encoder, and no model of videos"):
        longtake.load(pulled)
    with pytest.raises(UserError, match=r"^encoder: models:/vae/1: is a PVVAE, and no text encoder; register one by"):
        longtake.text_encoder("models:/vae/1")
    assert not list(tmp_path.iterdir())


def test_what_is_no_encoder_or_has_no_name_for_it_is_said_in_one_line(
    folders: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    umt5, videos = str(folders / "umt5"), str(store.parent / "videos" / "vae")
    pickled = shutil.copytree(umt5, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for folder, name, why in (
        (str(tmp_path / "none"), "x", "encoder: .*none: no such folder"),
        (videos, "x", "is no text encoder"),
        (str(pickled), "x", "pytorch_model.bin, which may run code when it is read; convert them"),
        (umt5, "vae", "^vae: has versions of another kind of model; choose another name$"),
        (umt5, "m-x", "^--name: 'm-x' cannot name a registered model"),
    ):
        with pytest.raises(UserError, match=why) as e:
            said("models", "import", folder, "--name", name)
        assert "\n" not in str(e.value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set; name the store"):
        said("models", "import", umt5, "--name", "x")
    assert not list(Path(os.environ["LONGTAKE_CACHE"]).rglob("*.bin"))
