"""What a plain `pip install longtake` can do: fetch, load and run models, without any package of the extras."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution, version
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from longtake.training import registry
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.registry import disk

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import importlib.util as u
import numpy as np
from longtake.training import registry
from longtake.training.models.common.codec import reconstruct_arrays
from longtake.datasets.errors import UserError

absent = [n for n in ("ray", "deepspeed", "av", "decord", "matplotlib", "sqlalchemy", "sklearn") if u.find_spec(n)]
assert not absent, absent
video = np.load(sys.argv[2])
made = [reconstruct_arrays(registry.load(uri), video) for uri in (sys.argv[3], "models:/pv-vae@candidate")]
import longtake
made.append(reconstruct_arrays(longtake.load("models:/pv-vae@candidate"), video))
assert longtake.__version__ == sys.argv[4]
import mlflow
made.append(mlflow.pyfunc.load_model("models:/pv-vae@candidate").predict(video))
assert all((made[0] == other).all() for other in made)
np.save(sys.argv[2], made[0])
mlflow.set_tracking_uri("sqlite:///nowhere.db")
try:
    registry.load("models:/pv-vae@candidate")
except UserError as e:
    print(len(made), e)
"""

COMMAND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from longtake.infra import cli
from longtake.infra.cli import models
cli.cli.add_command(models.models)
cli.main()
"""


def closure(needed: list[str]) -> set[str]:
    """The distributions that come with these requirements."""
    seen: set[tuple[str, str]] = set()
    todo = [(r.name.lower(), extra) for r in map(Requirement, needed) for extra in ("", *r.extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) not in seen:
            seen.add((name, extra))
            for r in map(Requirement, distribution(name).requires or ()):
                if r.marker is None or r.marker.evaluate({"extra": extra}):
                    todo += [(r.name.lower(), e) for e in ("", *r.extras)]
    return {name for name, _ in seen}


def install(folder: Path, names: set[str]) -> Path:
    """A folder for sys.path with links to the files of these distributions and no others."""
    for name in names:
        for file in distribution(name).files or ():
            if file.suffix != ".pth" and not {"..", "include"} & set(file.parts):
                link = folder / file
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to(Path(str(file.locate())))
    return folder


def install_longtake(folder: Path) -> None:
    (folder / "longtake").mkdir(parents=True)
    (folder / "longtake" / "__init__.py").symlink_to(ROOT / "infra" / "public" / "__init__.py")
    for part in ("datasets", "infra", "pipeline", "training"):
        (folder / "longtake" / part).symlink_to(ROOT / part)
    described = folder / f"longtake-{version('longtake')}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: longtake\nVersion: {version('longtake')}\n")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with `model`, and the environment of a store that has it as pv-vae@candidate and needs no database."""
    import mlflow

    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    vae = PVVAE(config_from_preset("pv_vae_tiny"))
    disk.save(folder / "model", "pv_vae", vae.config.model_dump(mode="json"), vae.state_dict(), {})
    store = {"MLFLOW_TRACKING_URI": f"file://{folder}/store", "MLFLOW_ALLOW_FILE_STORE": "true"}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in store.items():
            patched.setenv(name, value)
        mlflow.set_tracking_uri(store["MLFLOW_TRACKING_URI"])
        client = mlflow.MlflowClient()
        run = client.create_run(client.create_experiment("e")).info.run_id
        registry.register(folder / "model", "pv-vae", run)
        yield folder, store
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path with longtake and what a plain install of it brings."""
    folder = tmp_path_factory.mktemp("installed")
    install_longtake(folder)
    names = closure(PROJECT["project"]["dependencies"])
    assert {"mlflow-skinny", "torch"} <= names and not {"ray", "deepspeed", "mlflow", "av"} & names
    return install(folder, names)


@pytest.mark.slow
def test_the_base_install_loads_and_runs_models(
    served: tuple[Path, dict[str, str]], installed: Path, tmp_path: Path
) -> None:
    folder, store = served
    file = tmp_path / "video.npy"
    video = np.random.default_rng(0).integers(0, 256, (1, 5, 32, 32, 3), dtype=np.uint8)
    np.save(file, video)
    command = [sys.executable, "-S", "-I", "-c", SCRIPT]
    command += [str(installed), str(file), str(folder / "model"), version("longtake")]
    environment = os.environ | store | {"LONGTAKE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = np.load(file)
    assert made.shape == video.shape and (made != video).any()
    assert done.stdout.strip() == (
        "4 models:/pv-vae@candidate: the store sqlite:///nowhere.db needs all of MLflow:"
        " pip install mlflow, or name a server"
    )


@pytest.mark.slow
def test_the_base_install_has_the_commands_of_the_registry(
    served: tuple[Path, dict[str, str]], installed: Path, tmp_path: Path
) -> None:
    folder, store = served
    environment = os.environ | store | {"LONGTAKE_CACHE": str(tmp_path / "cache")}

    def said(*arguments: str) -> str:
        command = [sys.executable, "-S", "-I", "-c", COMMAND, str(installed), *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "models" in said("--help")
    assert said("models", "list").splitlines()[1].split()[:4] == ["pv-vae", "1", "-", "1"]
    assert '"model": "pv_vae"' in said("models", "show", "pv-vae", "--json")
    pulled = Path(said("models", "pull", "pv-vae@candidate").strip())
    assert (pulled / "model.safetensors").read_bytes() == (folder / "model" / "model.safetensors").read_bytes()
