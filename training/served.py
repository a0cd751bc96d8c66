"""The MLflow pyfunc of our models, which MLflow runs as code; on a GPU where there is one.

An autoencoder takes uint8 videos (B, T, H, W, 3) and gives its reconstruction of them. A prior takes a table of `seed`,
and if wanted `class` and `frames`, and gives a generated video for each row, uint8 (N, T, H, W, 3).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from longtake.training import registry, sampling


class Videos(PythonModel):
    """Loads a model folder. What `predict` gets is checked here, not by MLflow."""

    def load_context(self, context: Any) -> None:
        folder = context.artifacts["model"]
        self.model: Any
        self.generates = registry.read_config(Path(folder))["model"] == "latte"
        if self.generates:
            self.model = sampling.load_prior(folder)
        else:
            self.model = registry.load_folder(Path(folder)).to("cuda" if torch.cuda.is_available() else "cpu")

    def predict(self, context, model_input, params=None) -> np.ndarray:  # MLflow would read hints
        if self.generates:
            return sampling.serve(self.model, model_input, params)
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


set_model(Videos())
