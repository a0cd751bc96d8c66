"""The MLflow pyfunc of a video model: uint8 (B, T, H, W, 3) in, its reconstruction out. MLflow runs this file as code."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from longtake.training import registry


class Reconstruction(PythonModel):
    """Loads config.json + model.safetensors; on a GPU where there is one."""

    def load_context(self, context: Any) -> None:
        self.model = registry.load_folder(Path(context.artifacts["model"])).to(
            "cuda" if torch.cuda.is_available() else "cpu"
        )

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        return registry.reconstruct(self.model, model_input)


set_model(Reconstruction())
