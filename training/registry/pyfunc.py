"""The MLflow pyfunc of our models, which MLflow runs as code; on a GPU where there is one.

A kind that generates takes a table of `seed`, and if wanted `class`, `frames` and, where it accepts them, `storyboard`,
`prompt` and `negative`, and gives a video for each row, uint8 (N, T, H, W, 3). One that fills gaps takes a table of
`before`, `after`, `frames` and `seed`, and if wanted `prompt` and `negative`, and gives the frames of each gap, uint8
(N, frames, H, W, 3). The text encoder that prompts need is a package among the requirements, or a folder, which
LONGTAKE_TEXT_ENCODER names where it is not the one of the training; it is loaded with the first prompt.
LONGTAKE_IMAGE_ENCODER does the same for the encoder of the frames beside a gap. Any other kind takes uint8 videos
(B, T, H, W, 3) and answers with as many: an autoencoder with their reconstruction, a memory that is trained to retrieve
with what it has kept of them.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from longtake.training.models import kind_of
from longtake.training.models.common.pictures import with_served_image_encoder
from longtake.training.models.common.prompts import with_served_encoder
from longtake.training.registry import disk
from longtake.training.registry.gaps import pixels_of, serve_gaps
from longtake.training.registry.requests import serve


class Videos(PythonModel):
    """Loads a model folder. What `predict` gets is checked here, not by MLflow."""

    def load_context(self, context: Any) -> None:
        folder = context.artifacts["model"]
        facts = with_served_image_encoder(with_served_encoder(disk.read_config(Path(folder))))
        kind = kind_of(facts)
        self.takes_table = True
        if kind.generator:
            generator = kind.generator(folder, disk.load(Path(folder)), facts, None, torch.float32)
            self.answer: Any = partial(serve, generator)
        elif kind.infiller:
            infiller = kind.infiller(folder, disk.load(Path(folder)), facts, None, torch.float32)
            self.answer = partial(serve_gaps, infiller)
        else:
            assert kind.answer is not None
            self.answer, self.takes_table = kind.answer(folder), False

    def predict(self, context, model_input, params=None) -> np.ndarray:  # MLflow would read hints
        return self.answer(model_input, params) if self.takes_table else self.answer(pixels_of(model_input))


set_model(Videos())
