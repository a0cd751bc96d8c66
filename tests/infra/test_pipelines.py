"""Pipelines of other libraries: registered as copies or where they lie, shown, pulled, loaded by part, and known in recipes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import letters
import pytest
import spoken
import tiny_encoders
import tiny_foreign
import torch
from click.testing import CliRunner

import longtake
from longtake.datasets.captions import Caption
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.latents import encoder_digest, read_latents
from longtake.infra import graph, recipe
from longtake.infra.cli import cli
from longtake.pipeline.stages import cache_latents, cache_text
from longtake.training import registry
from longtake.training.foreign.files import _sha256
from longtake.training.foreign.folder import digest_of, part_of
from longtake.training.models.common.codec import load_codec
from longtake.training.pictures import load_image_encoder
from longtake.training.registry import disk, lineage, pipelines

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "diffusion_pytorch_model.safetensors"
URIS = ("models:/copied@champion", "models:/lying/1")
TEXTS = ["a red square moves left", ""]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline with a text encoder and an image encoder."""
    folder = tiny_foreign.pipeline_folder(tmp_path_factory.mktemp("pipelines") / "wan")
    tiny_encoders.model("clip").save_pretrained(folder / "image_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"image_encoder": ["transformers", "CLIPModel"]}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def store(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new store with the pipeline as a copy and where it lies, and its autoencoder alone; the cache is empty."""
    import mlflow

    place = tmp_path_factory.mktemp("store") / "new"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
        patched.setenv("LONGTAKE_CACHE", str(place.parent / "cache"))
        said("models", "import", str(wan), "--name", "copied")
        said("models", "import", str(wan), "--name", "lying", "--by-reference")
        said("models", "import", str(wan / "vae"), "--name", "vae")
        said("models", "import", str(wan / "vae"), "--name", "lying-vae", "--by-reference")
        yield place
        mlflow.set_tracking_uri(None)


@pytest.fixture
def spoiled(wan: Path) -> Iterator[Path]:
    """The folder, which a test may change."""
    kept = shutil.copytree(wan, wan.with_name("kept"))
    yield wan
    shutil.rmtree(wan, ignore_errors=True)
    kept.rename(wan)


def said(*arguments: str) -> str:
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stdout.strip()


def refused(*arguments: str) -> str:
    with pytest.raises((UserError, Failure)) as e:
        said(*arguments)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("uri", URIS)
def test_the_parts_of_a_registered_pipeline_are_those_of_its_folder(wan: Path, uri: str) -> None:
    for part in ("vae", "transformer"):
        ours, facts = registry.load_with_facts(uri, part)
        theirs, expected = registry.load_with_facts(str(wan), part)
        state = theirs.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
        assert {**facts, "foreign": 0} == {**expected, "foreign": 0}, (
            "but for the folder, a part is the same everywhere"
        )
    registered, folder = longtake.text_encoder(uri), longtake.text_encoder(str(wan))
    assert registered.digest == folder.digest
    assert all(map(torch.equal, registered.encode(TEXTS), folder.encode(TEXTS)))
    assert registered.describe()["encoder"] == longtake.resolve(uri)
    assert load_image_encoder(uri).digest == load_image_encoder(str(wan)).digest


def test_the_second_text_encoder_of_a_pipeline_has_its_own_tokenizer(tmp_path: Path) -> None:
    folder = tiny_foreign.pipeline_folder(tmp_path / "hunyuan", "hunyuan")
    second = longtake.text_encoder(str(folder / "text_encoder_2"))
    # CLIP's tokens end in </s>, those of Llama begin with <s> alone
    assert second.count(["a"]) == [3] and longtake.text_encoder(str(folder)).count(["a"]) == [2]


def test_a_served_prior_of_foreign_latents_needs_the_library(wan: Path, store: Path, tmp_path: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    longtake.load("models:/vae/1", "vae")  # as its training has done
    folder = letters.save_priors(tmp_path / "priors") / "latte"
    content = json.loads((folder / "config.json").read_text())
    for vae, needs in ((str(wan), True), ("models:/vae/1", True), (content["vae"]["uri"], False)):
        (folder / "config.json").write_text(json.dumps(content | {"vae": content["vae"] | {"uri": vae}}))
        run = client.create_run(client.get_experiment_by_name("imported models").experiment_id)
        uri = registry.register(folder, "latte", run.info.run_id)
        requirements = Path(mlflow.artifacts.download_artifacts(f"{uri}/requirements.txt")).read_text()
        assert ("diffusers==" in requirements) == needs


@pytest.mark.parametrize("uri", ["models:/vae/1", "models:/lying-vae@champion"])
def test_a_part_alone_is_registered_as_that_part(wan: Path, uri: str) -> None:
    codec = load_codec(uri)
    assert all(
        torch.equal(value, codec.state_dict()[name]) for name, value in load_codec(str(wan)).state_dict().items()
    )
    with pytest.raises(UserError, match=r"and no transformer|has no transformer; its parts are vae"):
        longtake.load(uri, "transformer")


@pytest.mark.parametrize("name", ["copied", "lying"])
def test_what_is_registered_is_shown_with_its_parts(wan: Path, store: Path, name: str) -> None:
    facts = json.loads(said("models", "show", name, "--json"))
    assert facts["model"] == "pipeline" and facts["problem"] is None and facts["aliases"] == ["champion"]
    assert facts["parameters"] == {"class_name": "WanPipeline"}
    assert sorted(facts["parts"]) == ["image_encoder", "text_encoder", "transformer", "vae"]
    vae = registry.load(str(wan), "vae")
    assert facts["parts"]["vae"] == {
        "class_name": "AutoencoderKLWan",
        "parameters": sum(each.numel() for each in vae.state_dict().values()),
        "bytes": sum(path.stat().st_size for path in (wan / "vae").iterdir()),
    }
    assert facts["bytes"] == sum(path.stat().st_size for path in wan.rglob("*") if path.is_file())
    assert facts["location"].startswith(str(wan if name == "lying" else store / "artifacts"))
    shown = said("models", "show", name)
    assert (
        "transformer    WanTransformer3DModel  22,168 parameters" in shown and f"location: {facts['location']}" in shown
    )


def test_a_copy_is_pulled_as_a_folder_that_other_tools_read_and_a_reference_as_its_own(
    wan: Path, tmp_path: Path
) -> None:
    import diffusers

    pulled = Path(said("models", "pull", "copied@champion", "--to", str(tmp_path / "copy")))
    for path in wan.rglob("*.*"):
        assert (pulled / path.relative_to(wan)).read_bytes() == path.read_bytes()
    assert diffusers.AutoencoderKLWan.from_pretrained(pulled, subfolder="vae").config.z_dim == 4
    assert digest_of(part_of(pulled, "vae")) == digest_of(part_of(wan, "vae"))
    (pulled / "vae" / WEIGHTS).write_bytes((pulled / "transformer" / WEIGHTS).read_bytes())
    with pytest.raises(Failure, match=f"^{pulled}/vae/{WEIGHTS}: is not what was registered"):
        longtake.load(str(pulled), "vae")
    assert said("models", "pull", "lying@champion") == str(wan)
    assert f"is registered by reference, and lies in {wan}; copy it" in refused(
        "models", "pull", "lying@champion", "--to", str(tmp_path / "x")
    )


def test_a_reference_has_the_files_that_were_registered_or_is_refused(spoiled: Path) -> None:
    path = spoiled / "vae" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    line = f"^{path}: is not what was registered as models:/lying@champion; bring it back, or register it again$"
    with pytest.raises(Failure, match=line):
        longtake.load("models:/lying@champion", "vae")
    with pytest.raises(Failure, match=line):
        said("models", "pull", "lying@champion")
    longtake.load("models:/lying@champion", "transformer")  # another part, which has not changed
    scheduler = spoiled / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("3.0", "5.0"))
    with pytest.raises(Failure, match=f"^{scheduler}: is not what was registered"):
        longtake.load("models:/lying@champion", "transformer")
    path.unlink()
    with pytest.raises(Failure, match="is not there any more; bring it back"):
        longtake.load("models:/lying@champion", "vae")
    shutil.rmtree(spoiled)
    with pytest.raises(
        UserError, match=f"by reference, and its folder {spoiled} is not on this machine; mount or copy it"
    ):
        longtake.load("models:/lying@champion", "vae")


def test_a_pulled_copy_is_there_without_store_and_folder_and_its_damage_is_mended(
    spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(spoiled)
    cached = Path(said("models", "pull", "copied@champion"))
    for part in ("vae", "transformer"):
        (cached / part / WEIGHTS).write_bytes(b"damaged")
    longtake.load("models:/copied@champion", "vae")
    assert (cached / "transformer" / WEIGHTS).read_bytes() != b"damaged", "all that is damaged comes again"
    monkeypatch.setenv("LONGTAKE_OFFLINE", "1")
    longtake.load("models:/copied@champion", "transformer")
    (cached / "transformer" / WEIGHTS).write_bytes(b"damaged")
    longtake.load("models:/copied@champion", "vae")  # what is not asked for is not read
    with pytest.raises(Failure, match=f"{cached}/transformer/{WEIGHTS}: is damaged or gone"):
        longtake.load("models:/copied@champion", "transformer")
    monkeypatch.delenv("LONGTAKE_OFFLINE")
    longtake.load("models:/copied@champion", "transformer")


@pytest.mark.parametrize("uri", URIS)
def test_each_file_of_a_part_is_read_for_its_digest_once_a_load(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    longtake.load(uri, "vae")
    read = Counter[str]()
    digest = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        read["/".join(Path(file.name).parts[-2:])] += file.name.endswith(".safetensors")
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    _sha256.cache_clear()
    longtake.load(uri, "vae")
    assert +read == {f"vae/{WEIGHTS}": 1}, "and no other weights"


def test_a_pipeline_is_taken_for_nothing_else_and_nothing_else_for_one(wan: Path, store: Path, tmp_path: Path) -> None:
    line = r": is a pipeline of another library.*; name it as the `encoder` of a `cache_latents` or `cache_text` stage"
    for uri in (*URIS, str(wan)):
        with pytest.raises(UserError, match=line):
            longtake.load(uri)  # as `parent`, `vqgan` and the others are
    with pytest.raises(UserError, match="is no folder of this machine; copy it here, or name models:/NAME@ALIAS"):
        longtake.load("s3://bucket/wan", "vae")
    said("models", "import", str(wan), "--as", "text_encoder", "--name", "umt5")
    with pytest.raises(UserError, match="is a text encoder, and no model of videos"):
        longtake.load("models:/umt5@champion", "vae")
    with pytest.raises(UserError, match="umt5@champion: is no pipeline; name a folder in the layout of diffusers"):
        pipelines.found("models:/umt5@champion")
    assert pipelines.found("models:/lying/1").folder == wan == pipelines.found(f"file://{wan}").folder
    own = tmp_path / "own"
    with pytest.raises(UserError, match="own: no such folder"):
        load_codec(str(own))


def test_what_cannot_be_registered_is_one_line(wan: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(wan, tmp_path / "wan"))
    import_ = ("models", "import", str(broken), "--name", "x")
    outside = (broken / "vae" / WEIGHTS).rename(tmp_path / "weights")
    (broken / "vae" / WEIGHTS).symlink_to(outside)
    assert f"vae/{WEIGHTS}: is a link out of {broken}, which is not followed" in refused(*import_)
    assert said(*import_, "--by-reference") == "models:/x/1"
    (broken / "vae" / WEIGHTS).unlink()
    outside.rename(broken / "vae" / "diffusion_pytorch_model.bin")
    assert "diffusion_pytorch_model.bin, a pickle, which may run code" in refused(*import_)
    shutil.rmtree(broken / "vae")
    assert "model_index.json names vae, which is not there" in refused(*import_)
    (broken / "model_index.json").write_text(json.dumps({"text_encoder": ["transformers", "UMT5EncoderModel"]}))
    assert "has UMT5EncoderModel, none of which is known here; there are AutoencoderKLWan" in refused(*import_)
    weights = str(wan / "vae" / WEIGHTS)
    assert "is a single file in another layout; convert it" in refused("models", "import", weights, "--name", "x")
    umt5 = ("models", "import", str(wan), "--as", "text_encoder", "--name", "x", "--by-reference")
    assert "is a text encoder, which is copied; leave it out" in refused(*umt5)
    assert "copied: has versions of another kind" in refused(
        "models", "import", str(wan), "--as", "text_encoder", "--name", "copied"
    )


def test_a_snapshot_of_the_hub_is_registered_with_the_blobs_that_its_links_name(wan: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--wan" / "snapshots" / "0123", tmp_path / "models--wan" / "blobs"
    shutil.copytree(wan, snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(Path(os.path.relpath(blobs / str(number), path.parent)))
    assert said("models", "import", str(snapshot), "--name", "copied") == "models:/copied/1", (
        "these files are registered"
    )


@pytest.mark.slow
def test_latents_and_states_are_the_same_column_by_a_folder_and_a_registered_one(
    wan: Path, dataset: str, tmp_path: Path, ray_session: None
) -> None:
    root = str(shutil.copytree(dataset, tmp_path / "dataset"))
    spoken.describe(root, lambda key: [Caption("a red square")])
    inputs = {"dataset": root, "captions": spoken.record(tmp_path / "captions", root)}
    made: dict[str, Counter[str]] = {"latents": Counter(), "text": Counter()}
    for number, uri in enumerate((str(wan), f"file://{wan}/vae", *URIS)):
        latents = cache_latents.Config(
            kind="cache_latents", dataset="x", encoder="x", size=(16, 16), run={"workers": 1}
        )
        result = cache_latents.run(latents, {**inputs, "encoder": uri}, str(tmp_path / f"latents{number}"))
        made["latents"][result["column"]] += int(result["metrics"]["encoded_shards"])
        record = read_latents(result["uri"])
        assert record.encoder["uri"] == longtake.resolve(uri)
        assert encoder_digest(load_codec(record.encoder["uri"])) == record.encoder["digest"]
        if uri.startswith("file://"):
            continue
        text = cache_text.Config(
            kind="cache_text", dataset="x", captions="x", encoder=uri, length=8, run={"workers": 1}
        )
        result = cache_text.run(text, inputs, str(tmp_path / f"text{number}"))
        made["text"][result["column"]] += int(result["metrics"]["encoded_shards"])
    shards = len(list(Path(root).glob("*/*.latent-*.tar")))
    assert shards and list(made["latents"].values()) == [shards] == list(made["text"].values())


RECIPE = """
name: r
workspace: {place}/work
stages:
  text: {{kind: cache_text, dataset: {place}/d, captions: {place}/c, encoder: {wan}}}
  latents: {{kind: cache_latents, dataset: {place}/d, encoder: {wan}}}
  alone: {{kind: cache_latents, dataset: {place}/d, encoder: file://{wan}/vae}}
  registered: {{kind: cache_latents, dataset: {place}/d, encoder: "models:/lying/1"}}
"""


def test_other_weights_in_a_folder_are_another_stage_of_a_recipe(spoiled: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.format(place=tmp_path, wan=spoiled))
    loaded = recipe.load(str(tmp_path / "r.yaml"))

    def keys() -> dict[str, tuple[str, str]]:
        return {node.name: (node.fingerprint, node.output) for node in graph.build(graph.pin(loaded))}

    before = keys()
    assert keys() == before
    (spoiled / "transformer" / WEIGHTS).touch()
    (spoiled / "README.md").touch()
    assert keys() == before, "of a pipeline only what a stage names counts"
    path = spoiled / "vae" / WEIGHTS
    os.utime(path, (1, 1))
    after = keys()
    assert {name for name, key in after.items() if key != before[name]} == {"latents", "alone"}
    assert after["latents"][1] != before["latents"][1], "a training would not go on from the other weights"
    (spoiled / "text_encoder" / "model.safetensors").touch()
    assert {name for name, key in keys().items() if key != after[name]} == {"text"}
    (spoiled / "vae" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="has no weights"):
        keys()
    # a machine that only submits a recipe may not see the folder, and every process takes what was pinned
    pinned = recipe.load(str(tmp_path / "r.yaml"))
    shutil.rmtree(spoiled)
    assert not graph.pin(pinned).outside.keys() & {"latents.encoder", "alone.encoder"}
    assert cache_text.outside(pinned.stages["text"]) == ""  # type: ignore[arg-type]


def test_lineage_has_the_digest_of_the_part_that_is_named_and_notices_another(spoiled: Path, tmp_path: Path) -> None:
    inputs = {"vae": str(spoiled), "base": f"file://{spoiled}", "parent": "models:/lying@champion"}
    found = lineage.record(inputs)["inputs"]
    for field, part in (("vae", "vae"), ("base", "transformer")):
        digest = digest_of(part_of(spoiled, part))
        assert found[field] == {"uri": inputs[field], "sha256": digest}
        assert digest == disk.digest(registry.load_with_facts(inputs[field], part)[1])
    assert found["parent"]["uri"] == "models:/lying/1"
    assert lineage.pinned(inputs, tmp_path)["base"] == inputs["base"]
    (spoiled / "transformer" / WEIGHTS).write_bytes((spoiled / "vae" / WEIGHTS).read_bytes())
    with pytest.raises(
        UserError, match=f"^base: file://{spoiled} is another model than when this training began; bring it"
    ):
        lineage.pinned(inputs, tmp_path)
