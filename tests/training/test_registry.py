import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longtake.datasets.errors import Failure, UserError
from longtake.training import registry
from longtake.training.models.pv_vae import PVVAE, config_from_preset


@pytest.fixture(scope="module")
def vae() -> PVVAE:
    torch.manual_seed(0)
    return PVVAE(config_from_preset("pv_vae_tiny")).eval()


@pytest.fixture
def folder(vae: PVVAE, tmp_path: Path) -> Path:
    registry.save(tmp_path / "model", "pv_vae", vae.config.model_dump(mode="json"), vae.state_dict(), {"lineage": {}})
    return tmp_path / "model"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An MLflow store with an open run; returns the run's id."""
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    return client.create_run(client.create_experiment("e", f"{tmp_path}/artifacts")).info.run_id


def test_a_model_is_two_files_and_comes_back_bit_for_bit(vae: PVVAE, folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = registry.load(str(folder))
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), vae.state_dict().values(), strict=True))


def test_damaged_or_foreign_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(Failure, match=r"not the weights that config\.json describes"):
        registry.load(str(folder))


def test_a_pickle_in_place_of_weights_is_never_opened(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (os.system, (f"touch {tmp_path}/exploded",))

    import hashlib

    data = pickle.dumps(Bomb())
    (folder / "model.safetensors").write_bytes(data)
    content = json.loads((folder / "config.json").read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(Failure, match=r"model\.safetensors"):
        registry.load(str(folder))
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_model_of_ours_is_one_line(tmp_path: Path, store: str) -> None:
    with pytest.raises(UserError, match="no longtake model here"):
        registry.load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model": "other"}')
    with pytest.raises(UserError, match="unknown model 'other'; this longtake knows pv_vae"):
        registry.load(str(tmp_path))
    with pytest.raises(UserError, match="models:/nothing@champion"):
        registry.load("models:/nothing@champion")


def test_a_registered_model_serves_numpy_and_torch(
    vae: PVVAE, folder: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    uri = registry.register(folder, "pv-vae", store)
    assert uri == "models:/pv-vae/1"
    assert registry.register(folder, "pv-vae", store) == uri, "the same run does not register the same weights twice"
    registry.promote(uri)
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
    assert np.array_equal(made, registry.reconstruct(loaded, video))
    with pytest.raises(Exception, match="5"):
        served.predict(video[0])
    with pytest.raises(UserError, match=r"need a uint8 array \(B, T, H, W, 3\), got float64"):
        registry.reconstruct(loaded, video.astype(float))


def test_loading_needs_neither_ray_nor_deepspeed(folder: Path) -> None:
    script = (
        "import sys\nfor name in ('ray', 'deepspeed', 'av', 'decord', 'matplotlib'): sys.modules[name] = None\n"
        "from longtake.training.registry import load\nprint(type(load(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script, str(folder)], capture_output=True, text=True)
    assert done.stdout.strip() == "PVVAE", done.stderr
