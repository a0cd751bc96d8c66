"""Model folders and the registry: what is saved comes back, and nothing else is let in."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longtake.datasets import compact, index, schema, storage, view
from longtake.datasets.errors import Failure, UserError
from longtake.training import registry
from longtake.training.models.common.codec import reconstruct_arrays
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.registry import disk, lineage, promotion


@pytest.fixture(scope="module")
def vae() -> PVVAE:
    torch.manual_seed(0)
    return PVVAE(config_from_preset("pv_vae_tiny")).eval()


@pytest.fixture
def folder(vae: PVVAE, tmp_path: Path) -> Path:
    return saved(vae, tmp_path / "model")


@pytest.fixture
def sharded(vae: PVVAE, tmp_path: Path) -> Path:
    largest = max(t.nbytes for t in vae.state_dict().values())
    return saved(vae, tmp_path / "sharded", max_bytes=2 * largest)


def saved(vae: PVVAE, folder: Path, facts: dict[str, Any] | None = None, **options: Any) -> Path:
    config = vae.config.model_dump(mode="json")
    disk.save(folder, "pv_vae", config, vae.state_dict(), facts or {"lineage": {}}, **options)
    return folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An MLflow store with an open run; returns the run's id."""
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    yield client.create_run(client.create_experiment("e", f"{tmp_path}/artifacts")).info.run_id
    mlflow.set_tracking_uri(None)


@pytest.fixture
def dead_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import mlflow

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    yield
    mlflow.set_tracking_uri(None)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def accept(folder: Path) -> None:
    """Make the digests right again, as who wants to harm would."""
    names = json.loads((folder / "config.json").read_text())["sha256"]
    change(folder / "config.json", sha256={n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names})


def test_a_model_is_two_files_and_comes_back_bit_for_bit(vae: PVVAE, folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = registry.load(str(folder))
    assert not loaded.training
    assert same(loaded.state_dict(), vae.state_dict())


def test_a_large_model_is_many_files_as_hugging_face_lays_them_out(vae: PVVAE, sharded: Path) -> None:
    files = sorted(p.name for p in sharded.glob("*.safetensors"))
    count = len(files)
    assert count > 2 and files[0] == f"model-00001-of-{count:05d}.safetensors"
    found = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert found["metadata"]["total_size"] == sum(t.nbytes for t in vae.state_dict().values())
    assert all(name in load_file(sharded / file) for name, file in found["weight_map"].items())
    largest = max(t.nbytes for t in vae.state_dict().values())
    assert all(sum(t.nbytes for t in load_file(sharded / file).values()) <= 2 * largest for file in files)
    assert same(registry.load(str(sharded)).state_dict(), vae.state_dict())


def test_weights_may_be_an_iterator_tied_cast_or_strided(vae: PVVAE, tmp_path: Path) -> None:
    config = vae.config.model_dump(mode="json")
    whole = torch.arange(12.0).view(3, 4)
    pairs = iter([("a", whole.T), ("b", whole), ("c", whole[1:]), ("d", torch.nn.Parameter(whole))])
    disk.save(tmp_path / "m", "pv_vae", config, pairs, {})
    read = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(read["a"], whole.T) and torch.equal(read["c"], whole[1:]) and torch.equal(read["d"], whole)
    with pytest.raises(ValueError, match="a comes twice"):
        disk.save(tmp_path / "n", "pv_vae", config, iter([("a", whole), ("a", whole)]), {})
    assert not (tmp_path / "n").exists()


def test_saving_holds_one_file_in_memory_at_a_time(tmp_path: Path) -> None:
    script = (
        "import resource, sys, torch\nfrom pathlib import Path\nfrom longtake.training.registry import disk\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\nbefore = peak()\n"
        "many = ((f'w{n}', torch.full((1 << 20,), float(n))) for n in range(100))\n"
        "disk.save(Path(sys.argv[1]), 'pv_vae', {}, many, {}, max_bytes=32 << 20)\nprint(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path / "m")], capture_output=True, text=True)
    assert int(done.stdout) < 150, f"400 MB in files of 32 MB took {done.stdout} MB; {done.stderr}"
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 13


def test_a_save_that_is_cut_off_leaves_what_was_there(vae: PVVAE, folder: Path) -> None:
    script = (
        "import os, sys, torch\nfrom pathlib import Path\nfrom longtake.training.registry import disk\n"
        "def dying():\n    yield 'a', torch.zeros(1000)\n    yield 'b', torch.zeros(1000)\n    os.kill(os.getpid(), 9)\n"
        "disk.save(Path(sys.argv[1]), 'pv_vae', {}, dying(), {}, max_bytes=4000)"
    )
    for target in (folder, folder.parent / "new"):
        assert subprocess.run([sys.executable, "-P", "-c", script, str(target)]).returncode == -9
    assert same(registry.load(str(folder)).state_dict(), vae.state_dict())
    assert not (folder.parent / "new").exists()
    saved(vae, folder)
    assert [p.name for p in folder.parent.iterdir()] == ["model"], "what a killed process left is swept up"


def test_saving_replaces_a_model_but_nothing_else(vae: PVVAE, folder: Path, sharded: Path) -> None:
    saved(vae, sharded)
    assert sorted(p.name for p in sharded.iterdir()) == ["config.json", "model.safetensors"]
    (folder / "config.json").unlink()
    (folder / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="is there already and is no model"):
        saved(vae, folder)
    assert (folder / "thesis.txt").exists()


@pytest.mark.parametrize("which", ["model.safetensors", "model-00002-of", "model.safetensors.index.json"])
def test_damaged_weights_are_refused(folder: Path, sharded: Path, which: str) -> None:
    at = folder if which == "model.safetensors" else sharded
    path = next(p for p in at.iterdir() if p.name.startswith(which) and (which in p.name))
    flipped = bytearray(path.read_bytes())
    flipped[-2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(Failure, match=rf"{path.name}: not the weights that config\.json describes"):
        registry.load(str(at))
    path.unlink()
    with pytest.raises(Failure, match=rf"{path.name}: not the weights that config\.json describes"):
        registry.load(str(at))


def test_a_pickle_in_place_of_weights_is_never_opened(folder: Path, sharded: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (os.system, (f"touch {tmp_path}/exploded",))

    for at in (folder, sharded):
        next(at.glob("*.safetensors")).write_bytes(pickle.dumps(Bomb()))
        accept(at)
        with pytest.raises(Failure, match=r"pv_vae: .*header"):
            registry.load(str(at))
        (at / "weights.pt").write_bytes(pickle.dumps(Bomb()))
        change(at / "config.json", sha256={"weights.pt": hashlib.sha256(pickle.dumps(Bomb())).hexdigest()})
        with pytest.raises(Failure, match=r"'weights\.pt' is no weights file"):
            registry.load(str(at))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("outside", ["../model/model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_points_outside_is_refused(folder: Path, sharded: Path, outside: str) -> None:
    path = sharded / "model.safetensors.index.json"
    where = json.loads(path.read_text())["weight_map"]
    change(path, weight_map=where | {next(iter(where)): outside})
    accept(sharded)
    with pytest.raises(Failure, match=r"index\.json: names other files than config\.json"):
        registry.load(str(sharded))
    content = json.loads((sharded / "config.json").read_text())
    change(sharded / "config.json", sha256=content["sha256"] | {outside: "0" * 64})
    with pytest.raises(Failure, match=r"is no weights file of a model folder"):
        registry.load(str(sharded))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json: damaged"),
        ("[" * 100_000, "config.json: damaged"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "config.json: damaged"),
        (" " * (5 << 20), "config.json: damaged .larger than 4194304 bytes"),
        ("[]", "config.json: damaged .not an object"),
        ('{"model": "os.system"}', "unknown model 'os.system'; this longtake knows"),
        ('{"model": ["pv_vae"]}', "unknown model"),
        ('{"model": "pv_vae", "format": 99}', "format 99, but this longtake reads 2"),
        ('{"model": "pv_vae", "format": 2}', "needs the objects config and sha256"),
        ('{"model": "pv_vae", "format": 2, "config": {}, "sha256": {}}', "needs model.safetensors alone"),
    ],
)
def test_a_config_that_is_none_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((UserError, Failure), match=said) as e:
        registry.load(str(tmp_path))
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_weights_of_another_config_are_refused_before_memory_is_taken(folder: Path, vae: PVVAE) -> None:
    config = vae.config.model_dump(mode="json")
    change(folder / "config.json", config=config | {"encoder_width": 1 << 17})
    with pytest.raises(Failure, match=r"tensor \S+ has shape|pv_vae: ") as e:
        registry.load(str(folder))
    assert "\n" not in str(e.value)
    change(folder / "config.json", config=config | {"mystery": 1})
    with pytest.raises(Failure, match=r"pv_vae: .*mystery"):
        registry.load(str(folder))
    change(folder / "config.json", config=config)
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    for wrong, said in (
        ({k: v for k, v in weights.items() if k != name}, f"1 tensors are missing to this config, such as {name}"),
        (weights | {"other": torch.zeros(1)}, "1 tensors are not known to this config, such as other"),
        (weights | {name: torch.zeros(3, 1)}, rf"{name} has shape \[3, 1\], its config needs"),
    ):
        save_file(wrong, folder / "model.safetensors")
        accept(folder)
        with pytest.raises(Failure, match=said):
            registry.load(str(folder))


def test_what_is_no_model_of_ours_is_one_line(tmp_path: Path, store: str) -> None:
    with pytest.raises(UserError, match="no longtake model here"):
        registry.load(str(tmp_path))
    for uri in ("models:/nothing@champion", "models:/nothing/3", f"runs:/{store}/nothing", f"runs:/{'0' * 32}/model"):
        with pytest.raises(UserError, match=uri) as e:
            registry.load(uri)
        assert "\n" not in str(e.value)


def test_a_store_that_is_down_is_a_failure(dead_store: None, folder: Path) -> None:
    for action in (
        lambda: registry.load("models:/pv-vae@champion"),
        lambda: registry.register(folder, "pv-vae", "0" * 32),
        lambda: promotion.promote("models:/pv-vae/1"),
        lambda: lineage.record({"encoder": "models:/pv-vae@champion"}),
    ):
        with pytest.raises(Failure, match=r"127\.0\.0\.1") as e:
            action()
        assert "\n" not in str(e.value)


def test_a_registered_model_serves_numpy_and_torch(folder: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    uri = registry.register(folder, "pv-vae", store)
    assert uri == "models:/pv-vae/1"
    assert registry.register(folder, "pv-vae", store) == uri, "the same run does not register the same weights twice"
    promotion.promote(uri)
    client = mlflow.MlflowClient()
    assert (
        client.get_model_version_by_alias("pv-vae", "candidate").version
        == client.get_model_version_by_alias("pv-vae", "champion").version
    )
    assert client.get_run(store).info.status == "RUNNING", "registering does not end the stage's run"

    loaded = registry.load("models:/pv-vae@champion")
    video = np.random.default_rng(0).integers(0, 256, (2, 5, 32, 48, 3), dtype=np.uint8)
    served = mlflow.pyfunc.load_model("models:/pv-vae@champion")
    made = served.predict(video)
    assert made.dtype == np.uint8 and made.shape == video.shape
    assert np.array_equal(made, reconstruct_arrays(loaded, video))

    signature = served.metadata.signature
    for side in (signature.inputs, signature.outputs):
        assert side.inputs[0].shape == (-1, -1, -1, -1, 3) and side.inputs[0].type == np.uint8
    pinned = (Path(mlflow.artifacts.download_artifacts(uri)) / "requirements.txt").read_text().split()
    assert all("==" in line and "+" not in line for line in pinned)
    assert {"longtake", "torch", "safetensors", "numpy", "pandas", "mlflow"} <= {p.split("==")[0] for p in pinned}


def test_a_wrong_input_is_one_short_line_of_ours(folder: Path, store: str) -> None:
    import mlflow

    served = mlflow.pyfunc.load_model(registry.register(folder, "pv-vae", store))
    video = np.zeros((1, 5, 32, 48, 3), np.uint8)
    for wrong, said in (
        (video[0], r"need a uint8 array \(B, T, H, W, 3\), got uint8 \(5, 32, 48, 3\)"),
        (video[..., :2], r"got uint8 \(1, 5, 32, 48, 2\)"),
        (video.astype(float), r"got float64 \(1, 5, 32, 48, 3\)"),
        (video.tolist()[0], r"got uint8 \(5, 32, 48, 3\)"),
        ([[1], [1, 2]], "got list"),
        ({"video": video}, "got dict"),
        (video[:, :4], "frames"),
        (video[:, :, :30], "30"),
    ):
        with pytest.raises(UserError, match=said) as e:
            served.predict(wrong)
        assert str(e.value).startswith("videos: ") and "\n" not in str(e.value) and len(str(e.value)) < 200
    # as JSON brings it over HTTP
    assert np.array_equal(served.predict(video.tolist()), served.predict(video))


@pytest.mark.slow
def test_registering_that_was_killed_is_done_again_without_leftovers(
    folder: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    logged = tmp_path / "artifacts" / "models"
    script = (
        "import os, sys, mlflow\nfrom pathlib import Path\nfrom longtake.training import registry\n"
        "where, name = sys.argv[3].rsplit('.', 1)\nowner = eval(where)\nreal = getattr(owner, name)\n"
        "def dying(*a, **k):\n    sys.argv[4] == 'after' and real(*a, **k)\n    os.kill(os.getpid(), 9)\n"
        "setattr(owner, name, dying)\nregistry.register(Path(sys.argv[1]), 'pv-vae', sys.argv[2])"
    )
    # half of it is there; then all of it, but unregistered; then registered without its alias
    for place, when in (
        ("mlflow.MlflowClient.log_model_artifacts", "after"),
        ("mlflow.register_model", "before"),
        ("mlflow.MlflowClient.set_registered_model_alias", "before"),
    ):
        done = subprocess.run([sys.executable, "-P", "-c", script, str(folder), store, place, when])
        assert done.returncode == -9
        assert len(list(logged.rglob("model.safetensors"))) == 1
    assert registry.register(folder, "pv-vae", store) == "models:/pv-vae/1"
    client = mlflow.MlflowClient()
    assert len(client.search_model_versions("name = 'pv-vae'")) == 1
    experiment = client.get_run(store).info.experiment_id
    assert [m.status for m in client.search_logged_models([experiment])] == ["READY"]
    assert len(list(logged.rglob("model.safetensors"))) == 1
    assert len(registry.load("models:/pv-vae@candidate").state_dict())


def test_lineage_says_what_a_model_was_made_of(
    folder: Path,
    store: str,
    dataset: str,
    vae: PVVAE,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow

    parent = registry.register(folder, "encoder", store)
    promotion.promote(parent)
    table = compact.table(dataset, "train")
    url = storage.join(str(tmp_path), "view.parquet")
    view.write(url, view.rows("train", table["key"], [None] * len(table)), {})
    monkeypatch.setenv("LONGTAKE_RECIPE", "abc")
    monkeypatch.setenv("MLFLOW_RUN_ID", store)
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)
    assert lineage.record({})["git"] is None
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    found = lineage.record({"dataset": dataset, "view": url, "encoder": "models:/encoder@champion", "own": str(folder)})
    assert found["git"]["dirty"] is False and len(found["git"]["revision"]) == 40
    (repository / "new.txt").touch()
    assert lineage.record({})["git"] == found["git"] | {"dirty": True}
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert found["inputs"]["encoder"] == {"uri": "models:/encoder/1", "sha256": sha256}
    assert found["inputs"]["own"] == {"uri": str(folder), "sha256": sha256}
    assert found["inputs"]["view"] == {"uri": url, "digest": hashlib.sha256(Path(url).read_bytes()).hexdigest()}
    assert found["inputs"]["dataset"]["splits"] == {s: compact.open_split(dataset, s)[0].digest for s in schema.SPLITS}
    assert (found["recipe"], found["run"], found["torch"]) == ("abc", store, torch.__version__)
    with pytest.raises(UserError, match=r"nothing: neither a dataset, a view nor a model"):
        lineage.record({"dataset": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match="no such view"):
        lineage.record({"view": str(tmp_path / "nothing.parquet")})

    saved(vae, tmp_path / "child", {"lineage": found})
    assert disk.read_config(tmp_path / "child")["lineage"] == found
    uri = registry.register(tmp_path / "child", "prior", store)
    registry.register(tmp_path / "child", "prior", store)
    client = mlflow.MlflowClient()
    tags = client.get_model_version("prior", uri.rsplit("/", 1)[1]).tags
    assert tags["parent.encoder"] == "models:/encoder/1" and tags["parent.dataset"] == dataset
    data = {d.dataset.name: d.dataset for d in client.get_run(store).inputs.dataset_inputs}
    assert data.keys() == {"dataset", "view"}
    assert data["dataset"].digest == found["inputs"]["dataset"]["digest"][:32]
    assert dataset in data["dataset"].source


def test_no_login_of_an_input_is_kept_with_a_model(
    store: str, dataset: str, vae: PVVAE, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import fsspec
    import mlflow
    from click.testing import CliRunner

    from longtake.infra import report
    from longtake.infra.cli import models
    from longtake.infra.report.runs import StageRun

    def login(name: str) -> str:
        return f"memory://me:TopSecret@host/{tmp_path.name}/{name}"

    fsspec.filesystem("memory").put(f"{dataset}/", f"{login('clips')}/", recursive=True)
    storage.write(login("view.parquet"), b"rows")
    storage.write(login("latents/latents.json"), b"{}")
    named = {"dataset": login("clips"), "view": login("view.parquet"), "latents": login("latents")}
    found = lineage.record(named)
    assert found["inputs"]["dataset"] == lineage.record({"dataset": dataset})["inputs"]["dataset"] | {
        "uri": f"memory://***@host/{tmp_path.name}/clips"
    }
    saved(vae, tmp_path / "child", {"lineage": found})
    registry.register(tmp_path / "child", "child", store)
    stage = StageRun("vae", "pretrain_vae", "FINISHED", False, 1.0, store, "models:/child/1", {}, {}, named, None)
    page = report.build(tmp_path / "report", "r", [stage], login("clips"), None, "http://me:TopSecret@host:5000")
    assert "memory://***@host" in page.read_text()
    # also config.json, its copy in the store, and the store itself
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) > 5 and not [p for p in written if b"TopSecret" in p.read_bytes()]

    # one that was saved before
    saved(vae, tmp_path / "old", {"lineage": {"inputs": {"view": {"uri": login("view.parquet"), "digest": "0" * 64}}}})
    registry.register(tmp_path / "old", "old", store)
    assert b"TopSecret" not in (tmp_path / "mlflow.db").read_bytes()
    client = mlflow.MlflowClient()
    assert {d.dataset.name for d in client.get_run(store).inputs.dataset_inputs} == named.keys()
    for name in ("child", "old"):
        told = [CliRunner().invoke(models.models, ["show", name, *more]).output for more in ([], ["--json"])]
        assert all("memory://***@host" in text for text in told)
        assert "TopSecret" not in f"{told}{client.get_model_version(name, '1').tags}"
    assert "TopSecret" not in "".join(capfd.readouterr())


def test_a_dataset_with_one_more_shard_has_another_digest(dataset: str, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(dataset, tmp_path / "d")
    before = lineage.record({"dataset": dataset})["inputs"]["dataset"]["digest"]
    assert lineage.record({"dataset": str(tmp_path / "d")})["inputs"]["dataset"]["digest"] == before
    (tmp_path / "d" / "train" / f"{index.shard_names(dataset, 'train')[0]}.parquet").unlink()
    shutil.rmtree(tmp_path / "d" / "compact", ignore_errors=True)
    assert lineage.record({"dataset": str(tmp_path / "d")})["inputs"]["dataset"]["digest"] != before
