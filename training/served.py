"""The MLflow pyfunc of a video model: uint8 (B, T, H, W, 3) in, its reconstruction out. MLflow runs this file as code."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from longtake.training import registry


class Reconstruction(PythonModel):
    """Loads a model folder; on a GPU where there is one. What `predict` gets is checked here, not by MLflow."""

    def load_context(self, context: Any) -> None:
        self.model = registry.load_folder(Path(context.artifacts["model"])).to(
            "cuda" if torch.cuda.is_available() else "cpu"
        )

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        return registry.reconstruct(self.model, _pixels(model_input))


def _pixels(given: Any) -> Any:
    """Nested lists of 0..255, as JSON brings them over HTTP, as an array; anything else as it is."""
    if not isinstance(given, list):
        return given
    try:
        values = np.array(given)
    except ValueError:
        return given
    whole = values.dtype.kind in "iu" and values.size and values.min() >= 0 and values.max() <= 255
    return values.astype(np.uint8) if whole else values


set_model(Reconstruction())
