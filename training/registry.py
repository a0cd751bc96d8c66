"""Models as `config.json` + `model.safetensors`, in a folder or in the MLflow registry. Nothing is ever unpickled."""

import contextlib
import hashlib
import importlib
import io
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longtake.datasets.errors import Failure, UserError

# name in config.json -> where its config and its module are defined
MODELS = {"pv_vae": ("longtake.training.models.pv_vae", "PVVAEConfig", "PVVAE")}
_FORMAT = 1


def save(
    folder: Path, model: str, config: Mapping[str, Any], weights: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write a model folder: config.json (with the weights' sha256 and `facts` such as its lineage) and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    content = {
        "format": _FORMAT,
        "model": model,
        "config": dict(config),
        "sha256": digest,
        "longtake": version("longtake"),
        **facts,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises UserError where there is none."""
    try:
        content = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as e:
        raise UserError(f"{folder}: no longtake model here (no config.json)") from e
    if content.get("model") not in MODELS:
        raise UserError(
            f"{folder}: config.json: unknown model {content.get('model')!r}; this longtake knows {', '.join(MODELS)}"
        )
    return content


def load_folder(folder: Path) -> nn.Module:
    """The torch module of a model folder, on the CPU, in evaluation mode.

    Raises:
        Failure: the weights are damaged or belong to another config.
    """
    content = read_config(folder)
    path = folder / "model.safetensors"
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != content["sha256"]:
        raise Failure(f"{path}: not the weights that config.json describes; fetch the model again")
    where, config, model = MODELS[content["model"]]
    code = importlib.import_module(where)
    module = getattr(code, model)(getattr(code, config)(**content["config"]))
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as e:
        raise Failure(f"{path}: {str(e).splitlines()[0]}") from e
    return module.eval()


def load(uri: str) -> nn.Module:
    """The torch module of a registered model, such as "models:/pv-vae@champion", or of a local model folder.

    The store is MLflow's: set MLFLOW_TRACKING_URI. Raises UserError where there is no such model, version or alias.
    """
    if not uri.startswith(("models:/", "runs:/")):
        return load_folder(Path(uri))
    import mlflow
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as scratch:
        try:
            root = Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch))
        except MlflowException as e:
            raise UserError(f"{uri}: {str(e).splitlines()[0]} (tracking store: {mlflow.get_tracking_uri()})") from e
        found = sorted(root.rglob("config.json"))
        if not found:
            raise UserError(f"{uri}: not a longtake model (no config.json)")
        return load_folder(found[0].parent)


def register(folder: Path, name: str, run_id: str) -> str:
    """Log a model folder to an MLflow run as a pyfunc and register it; returns "models:/NAME/VERSION".

    The version gets the alias `candidate`. A version that this run has registered before is not registered again.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    client = mlflow.MlflowClient()
    digest = read_config(folder)["sha256"]
    known = [
        v
        for v in client.search_model_versions(f"name = '{name}'")
        if v.run_id == run_id and v.tags.get("sha256") == digest
    ]
    if known:
        number = max(int(v.version) for v in known)
    else:
        video = Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1, -1, -1))])
        with _quietly():
            mlflow.start_run(run_id=run_id)
            try:
                logged = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(Path(__file__).with_name("served.py")),
                    artifacts={"model": str(folder)},
                    signature=ModelSignature(inputs=video, outputs=video),
                    pip_requirements=[f"{p}=={version(p)}" for p in ("longtake", "torch", "safetensors", "numpy")],
                    registered_model_name=name,
                )
            finally:
                mlflow.end_run("RUNNING")
        number = int(logged.registered_model_version)
        client.set_model_version_tag(name, str(number), "sha256", digest)
    client.set_registered_model_alias(name, "candidate", str(number))
    return f"models:/{name}/{number}"


def promote(uri: str) -> None:
    """Give a registered version ("models:/NAME/VERSION") the alias `champion`."""
    import mlflow

    name, number = uri.removeprefix("models:/").split("/")
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", number)


def reconstruct(model: nn.Module, video: np.ndarray) -> np.ndarray:
    """What a video model makes of uint8 videos (B, T, H, W, 3): uint8 of the same shape.

    Raises:
        UserError: the array is not of that shape and type, or the model cannot divide it.
    """
    from longtake.datasets.loader import to_model, to_pixels

    if not isinstance(video, np.ndarray) or video.dtype != np.uint8 or video.ndim != 5 or video.shape[-1] != 3:
        got = f"{video.dtype} {video.shape}" if isinstance(video, np.ndarray) else type(video).__name__
        raise UserError(f"videos: need a uint8 array (B, T, H, W, 3), got {got}")
    device = next(model.parameters()).device
    pixels = torch.from_numpy(video).permute(0, 4, 1, 2, 3).to(device)
    with torch.inference_mode():
        made = model.reconstruct(to_model(pixels))  # type: ignore[operator]
    return to_pixels(made).permute(0, 2, 3, 4, 1).cpu().numpy()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide MLflow's advice, which it prints past logging; its errors are exceptions."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
