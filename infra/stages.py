"""The table of stages. A new stage is a file and a line here; its module is imported only when a recipe uses it."""

import importlib
from typing import Any

STAGES = {
    "shard": "longtake.pipeline.stages.shard",
    "curate": "longtake.pipeline.stages.curate",
    "cache_latents": "longtake.pipeline.stages.cache_latents",
    "pretrain_vae": "longtake.training.stages.pretrain_vae",
    "finetune_latte": "longtake.training.stages.finetune_latte",
    "pretrain_memory": "longtake.training.stages.pretrain_memory",
    "finetune_memory_prior": "longtake.training.stages.finetune_memory_prior",
    "promote": "longtake.training.stages.promote",
}


def load(kind: str) -> Any:
    """The module of a stage: `Config`, `VERSION`, `PRODUCES`, `run` and perhaps `outside` (see longtake.datasets.stage)."""
    return importlib.import_module(STAGES[kind])
