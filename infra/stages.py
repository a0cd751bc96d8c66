"""The table of stages. A new stage is a file and a line here; its module is imported only when a recipe uses it."""

import importlib
from typing import Any

STAGES = {
    "shard": "longtake.pipeline.stages.shard",
    "curate": "longtake.pipeline.stages.curate",
    "score": "longtake.pipeline.stages.score",
    "cluster": "longtake.pipeline.stages.cluster",
    "caption": "longtake.pipeline.stages.caption",
    "cache_text": "longtake.pipeline.stages.cache_text",
    "cache_audio": "longtake.pipeline.stages.cache_audio",
    "cache_latents": "longtake.pipeline.stages.cache_latents",
    "cache_tokens": "longtake.pipeline.stages.cache_tokens",
    "pretrain_vae": "longtake.training.models.pv_vae.pretrain",
    "finetune_latte": "longtake.training.models.latte.finetune",
    "pretrain_tats": "longtake.training.models.tats.train",
    "pretrain_memory": "longtake.training.models.memory.pretrain",
    "finetune_memory_prior": "longtake.training.models.memory.finetune",
    "pretrain_vqgan": "longtake.training.models.tats.pretrain",
    "pretrain_sound_vqgan": "longtake.training.models.tats.sound.pretrain",
    "pretrain_encgan3": "longtake.training.models.encgan3.pretrain",
    "finetune_mavin": "longtake.training.models.mavin.finetune",
    "finetune_backbone": "longtake.training.models.backbone.finetune",
    "evaluate": "longtake.training.evaluation.evaluate",
    "promote": "longtake.training.registry.promote",
}


def load(kind: str) -> Any:
    """The module of a stage: `Config`, `VERSION`, `PRODUCES`, `run`, and what else `longtake.datasets.stage` names."""
    return importlib.import_module(STAGES[kind])
