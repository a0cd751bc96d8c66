"""The rows of models with a memory (see `longtake.training.models.kind`)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from longtake.training.models.common.prompts import accepted
from longtake.training.models.kind import Kind
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.models.memory.foreign import MemoryBackbone, MemoryBackboneConfig
from longtake.training.models.memory.model import MemoryModel
from longtake.training.models.memory.model_config import MemoryModelConfig
from longtake.training.models.memory.prior import ACCEPTS, load_prior, prior_of
from longtake.training.models.memory.recall import recall_each, retriever_of

_CLASSES: dict[str, tuple[type[MemoryModelConfig], type[MemoryModel]]] = {
    "memory_dit": (MemoryDiTConfig, MemoryDiT),
    "memory_backbone": (MemoryBackboneConfig, MemoryBackbone),
}


def kind(facts: Mapping[str, Any]) -> Kind:
    """The row of a model that was trained to continue a history, or of one that was trained to retrieve it."""
    config, module = _CLASSES[facts["model"]]
    row = Kind(
        f"{module.__name__} that does {facts.get('stage')}",
        config,
        module,
        "longtake.training.models.memory.judge",
    )
    if facts.get("stage") == "retrieval":
        return row._replace(answer=_answer, retriever=retriever_of)
    return row._replace(generator=prior_of, accepts=ACCEPTS | accepted(facts))


def _answer(folder: str) -> Callable[[np.ndarray], np.ndarray]:
    return partial(recall_each, load_prior(folder, "retrieval"))
