"""The MLflow pyfunc of our models, which MLflow runs as code; on a GPU where there is one.

A kind that generates takes a table of `seed`, and if wanted `class`, `frames` and, where it accepts them, `storyboard`,
`prompt` and `negative`, and gives a video for each row, uint8 (N, T, H, W, 3). The text encoder that prompts need is a
package among the requirements, or a folder, which LONGTAKE_TEXT_ENCODER names where it is not the one of the training; it
is loaded with the first prompt. Any other takes uint8 videos (B, T, H, W, 3) and answers with as many: an
autoencoder with their reconstruction, a memory that is trained to retrieve with what it has kept of them.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from longtake.training.models import kind_of
from longtake.training.models.common.prompts import with_served_encoder
from longtake.training.registry import disk
from longtake.training.registry.requests import serve


class Videos(PythonModel):
    """Loads a model folder. What `predict` gets is checked here, not by MLflow."""

    def load_context(self, context: Any) -> None:
        folder = context.artifacts["model"]
        facts = with_served_encoder(disk.read_config(Path(folder)))
        kind = kind_of(facts)
        self.generates = kind.generator is not None
        if kind.generator:
            model = disk.load(Path(folder))
            self.answer: Any = partial(serve, kind.generator(folder, model, facts, None, torch.float32))
        else:
            assert kind.answer is not None
            self.answer = kind.answer(folder)

    def predict(self, context, model_input, params=None) -> np.ndarray:  # MLflow would read hints
        return self.answer(model_input, params) if self.generates else self.answer(_pixels(model_input))


def _pixels(video: Any) -> Any:
    """Nested lists of 0..255, as JSON brings them over HTTP, as an array; anything else as it is."""
    if not isinstance(video, list):
        return video
    try:
        values = np.array(video)
    except ValueError:
        return video
    fits = values.dtype.kind in "iu" and values.size and values.min() >= 0 and values.max() <= 255
    return values.astype(np.uint8) if fits else values


set_model(Videos())
