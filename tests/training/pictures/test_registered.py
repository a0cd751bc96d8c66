"""CLIP's model of pictures in the registry: imported from a folder, named by alias, pinned by a training, told from others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
from click.testing import CliRunner

import longtake
from longtake.datasets.errors import Failure, UserError
from longtake.infra.cli import cli
from longtake.training import registry, stage
from longtake.training.models.mavin import finetune
from longtake.training.models.mavin.guidance import load_learned
from longtake.training.pictures import load_image_encoder
from longtake.training.registry import lineage

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread", "group")

FRAMES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


def eyes(folder: Path, seed: int, **options: Any) -> None:
    """CLIP's model of pictures with its projection, with random weights, beside what is none of its files."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=6)
    transformers.CLIPVisionModelWithProjection(settings).save_pretrained(folder, **options)
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`, `two` and, in several files, `split`; `both`, a whole CLIP; `parts`, as diffusers lays them out."""
    root = tmp_path_factory.mktemp("encoders")
    eyes(root / "one", 0)
    eyes(root / "two", 1)
    eyes(root / "split", 2, max_shard_size="4KB")
    tiny_encoders.encoder("clip", root / "both")
    tiny_encoders.encoder("umt5", root / "umt5")
    shutil.copytree(root / "umt5", root / "parts" / "text_encoder")
    shutil.copytree(root / "one", root / "parts" / "image_encoder")
    return root


@pytest.fixture(scope="module", autouse=True)
def store(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new store with versions 1 and 2 of eyes, split, and a text encoder; the cache is empty."""
    import mlflow

    place = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
        patched.setenv("LONGTAKE_CACHE", str(place / "cache"))
        patched.setenv("HF_HUB_OFFLINE", "1")
        for folder, name in (("one", "eyes"), ("two", "eyes"), ("split", "split"), ("umt5", "umt5")):
            said("models", "import", str(folders / folder), "--name", name)
        yield
        mlflow.set_tracking_uri(None)


def said(*arguments: str) -> str:
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stdout.strip()


def config(**changes: Any) -> finetune.Config:
    model = {"preset": "mavin_tiny", "depth": 2, "width": 16, "heads": 2, "patch": 4}
    sizes: dict[str, Any] = {"frames": 7, "size": (16, 16), "run": {"workers": 0}}
    return finetune.Config(kind="finetune_mavin", dataset="dataset", model=model, **sizes | changes)


@pytest.mark.parametrize(
    ("uri", "folder"),
    [("models:/eyes/1", "one"), ("models:/eyes@champion", "two"), ("models:/split/latest", "split")],
)
@torch.no_grad()
def test_a_registered_encoder_is_that_of_the_folder(folders: Path, uri: str, folder: str, tmp_path: Path) -> None:
    ours = load_image_encoder(str(folders / folder))
    pulled = said("models", "pull", uri, "--to", str(tmp_path / "pulled"))
    for registered in map(load_image_encoder, (uri, pulled)):
        assert registered.digest == ours.digest and registered.pooling == "projected"
        assert torch.equal(registered.tokens(FRAMES), ours.tokens(FRAMES))
        assert torch.equal(registered.embeddings(FRAMES), ours.embeddings(FRAMES))


def test_only_weights_their_index_and_config_are_registered(folders: Path, tmp_path: Path) -> None:
    facts = json.loads(said("models", "show", "eyes@champion", "--json"))
    known = {"model_type": "clip_vision_model", "width": 16, "pixels": 8, "pooling": "projected"}
    assert facts["model"] == "image_encoder" and facts["parameters"] == known and facts["problem"] is None
    one, split = (Path(said("models", "pull", uri)) for uri in ("models:/eyes/1", "models:/split/1"))
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*.*"))
    assert names == ["config.json", "image_encoder/config.json", "image_encoder/model.safetensors"]
    assert (split / "image_encoder" / "model.safetensors.index.json").is_file()
    # and what was pulled can be registered elsewhere, as the same version
    assert said("models", "import", str(split), "--name", "split") == "models:/split/1"


def test_what_has_texts_and_pictures_is_registered_as_which_of_them_is_said(folders: Path) -> None:
    for folder in ("both", "parts"):
        with pytest.raises(UserError, match=r"say which with --as text_encoder or --as image_encoder$"):
            said("models", "import", str(folders / folder), "--name", f"{folder}-x")
        assert said("models", "import", str(folders / folder), "--as", "text_encoder", "--name", f"{folder}-t")
        assert said("models", "import", str(folders / folder), "--as", "image_encoder", "--name", f"{folder}-i")
        ours = load_image_encoder(str(folders / ("one" if folder == "parts" else folder)))
        assert load_image_encoder(f"models:/{folder}-i/1").digest == ours.digest
        assert longtake.text_encoder(f"models:/{folder}-t/1").width == 32
        assert "tokenizer.json" not in {path.name for path in Path(said("models", "pull", f"{folder}-i/1")).rglob("*")}


def test_a_training_keeps_the_version_that_the_alias_named_when_it_began(
    dataset: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, inputs = config(image="models:/eyes@champion"), {"dataset": dataset}
    assert finetune.outside(chosen) == "", "a recipe is resolved without the store"
    # it begins, and is stopped; then the alias moves
    monkeypatch.setattr(stage.launch, "run", lambda *_: False)
    finetune.run(chosen, inputs, str(tmp_path))
    said("rollback", "eyes")
    try:
        folder, two = tmp_path / "checkpoints", load_image_encoder(str(folders / "two"))
        setup = finetune.prepare(chosen, lineage.pinned(inputs, folder), folder)
        assert setup.encoder and setup.encoder.digest == two.digest
        assert load_image_encoder("models:/eyes@champion").digest != two.digest
    finally:
        said("rollback", "eyes")
    record = lineage.read(folder)
    facts = finetune.facts(chosen, setup, record)
    assert record["inputs"]["image"]["uri"] == "models:/eyes/2" and len(record["inputs"]["image"]["sha256"]) == 64
    assert facts["image"] == {"encoder": "models:/eyes/2", "digest": two.digest}

    # a model finds it by that version, without the store too, and takes no other for it
    monkeypatch.setenv("LONGTAKE_OFFLINE", "1")
    assert load_learned("m", facts["image"], "cpu", "").digest == two.digest
    with pytest.raises(UserError, match="m: has learned from another image encoder than models:/eyes/1"):
        load_learned("m", facts["image"] | {"encoder": "models:/eyes/1"}, "cpu", "say where it is")
    monkeypatch.setenv("LONGTAKE_CACHE", str(tmp_path / "empty"))
    with pytest.raises(Failure, match="LONGTAKE_OFFLINE is set, and it was never pulled"):
        load_learned("m", facts["image"], "cpu", "")


@pytest.mark.slow
def test_a_model_is_trained_and_served_with_a_registered_encoder(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    run = client.create_run(client.create_experiment("gaps", f"{tmp_path}/artifacts")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run)
    quick: dict[str, Any] = {"steps": 2, "batch": 2, "ema_half_lives": [], "sample_steps": 2, "eval_clips": 2}
    chosen = config(image="models:/eyes@champion", embedder="models:/eyes/1", eval_videos=1, **quick)
    uri = finetune.run(chosen, {"dataset": dataset}, str(tmp_path / "out"))["uri"]
    _, facts = registry.load_with_facts(uri)
    assert facts["image"]["encoder"] == facts["lineage"]["inputs"]["image"]["uri"] == "models:/eyes/2"
    assert "transformers" in Path(mlflow.artifacts.download_artifacts(f"{uri}/requirements.txt")).read_text()
    monkeypatch.setenv("LONGTAKE_CACHE", str(tmp_path / "cache"))
    beside = np.zeros((3, 16, 16, 3), np.uint8)
    rows = [{"before": beside, "after": beside, "frames": 2, "seed": 1}]
    assert mlflow.pyfunc.load_model(uri).predict(rows).shape == (1, 2, 16, 16, 3)


def test_frames_are_compared_by_a_registered_encoder(dataset: str, folders: Path, tmp_path: Path) -> None:
    chosen = config(embedder="models:/eyes@champion")
    assert finetune.outside(chosen) == "" and not finetune.registered(chosen)
    setup = finetune.prepare(chosen, {"dataset": dataset}, tmp_path)
    embedder = finetune.plan_of(chosen, setup).judges.embedder
    assert embedder and embedder.digest == load_image_encoder(str(folders / "two")).digest


def test_what_is_no_image_encoder_is_said_in_one_line(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = shutil.copytree(folders / "umt5", tmp_path / "blind")
    dark = shutil.copytree(folders / "one", tmp_path / "dark")
    from safetensors.torch import load_file, save_file

    zeros = {name: 0 * weights for name, weights in load_file(dark / "model.safetensors").items()}
    save_file(zeros, dark / "model.safetensors", {"format": "pt"})
    pickled = shutil.copytree(folders / "one", tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    said_of = {
        (str(dark),): "gives two different pictures the same tokens",
        (str(pickled),): "^image: .*pytorch_model.bin, which may run code when it is read; convert them",
        (
            str(blind),
            "--as",
            "image_encoder",
        ): "^image: .*blind: is a umt5; name a folder with CLIP's model of pictures$",
        (str(folders / "one"), "--as", "text_encoder"): "^encoder: .*one: has no tokenizer.json",
    }
    for arguments, why in said_of.items():
        with pytest.raises(UserError, match=why) as e:
            said("models", "import", *arguments, "--name", "x")
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"^umt5: has versions of another kind of model; choose another name$"):
        said("models", "import", str(folders / "one"), "--name", "umt5")

    for uri, why in (
        ("models:/umt5/1", "^image: models:/umt5/1: is a text encoder, and no image encoder; register one by"),
        ("models:/eyes/7", "^image: models:/eyes/7: no such version or alias of eyes .* versions: 2, 1"),
        ("models:/none@champion", "^image: models:/none@champion: no model 'none' is registered"),
    ):
        with pytest.raises(UserError, match=why) as e:
            load_image_encoder(uri)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"^encoder: models:/eyes/1: is an image encoder, and no text encoder"):
        longtake.text_encoder("models:/eyes/1")
    line = "eyes/1: is an image encoder, and no model of videos; name it as the `image` or `embedder` of a `finetune_mavin`"
    with pytest.raises(UserError, match=line):
        longtake.load("models:/eyes/1")
