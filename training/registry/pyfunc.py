"""The MLflow pyfunc of our models, which MLflow runs as code; on a GPU where there is one.

An autoencoder takes uint8 videos (B, T, H, W, 3) and gives its reconstruction of them. A prior takes a table of `seed`,
and if wanted `class` and `frames`, and gives a generated video for each row, uint8 (N, T, H, W, 3); one with a memory
takes `storyboard` as well. A memory that is trained to retrieve takes videos and gives what it has kept of them.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from longtake.training import registry
from longtake.training.models.common import sampling
from longtake.training.models.memory import prior as recall
from longtake.training.registry import requests as serving


class Videos(PythonModel):
    """Loads a model folder. What `predict` gets is checked here, not by MLflow."""

    def load_context(self, context: Any) -> None:
        folder = context.artifacts["model"]
        facts = registry.read_config(Path(folder))
        kind = facts["model"]
        self.tables = kind == "latte" or (kind == "memory_dit" and facts["stage"] == "generation")
        if kind == "latte":
            self.answer = partial(serving.serve, sampling.load_prior(folder))
        elif self.tables:
            self.answer = partial(serving.serve, recall.load_prior(folder, "generation"))
        elif kind == "memory_dit":
            self.answer = partial(serving.serve_recall, recall.load_prior(folder, "retrieval"))
        else:
            model = registry.load_folder(Path(folder)).to("cuda" if torch.cuda.is_available() else "cpu")
            self.answer = partial(registry.reconstruct, model)

    def predict(self, context, model_input, params=None) -> np.ndarray:  # MLflow would read hints
        return self.answer(model_input, params) if self.tables else self.answer(_pixels(model_input))


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
