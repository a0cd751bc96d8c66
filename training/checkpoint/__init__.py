"""Checkpoints: written under a temporary name, synced, renamed, then `latest` is flipped. A kill costs nothing older.

A checkpoint is a folder: one DeepSpeed checkpoint an engine, `weights-RANK.safetensors` (the lead module's weights in fp32
and their averages, as fragments; other modules' weights are in a folder of their name), `meta.json` (step, loader state,
seeds, run, recipe, settings, lineage, the objective's state). DeepSpeed's files are pickles: they are read back only from
the stage's own folder or its own copies, never from a registry. Nobody else may write there.

Training pauses while the state is written to the operating system. Syncing, renaming, pruning and uploading run beside
it, in a thread of each rank.
"""

from longtake.training.checkpoint.folder import (
    Place,
    copies_of,
    differences,
    former_place,
    latest,
    locked,
    meta,
    place_of,
)
from longtake.training.checkpoint.resume import beside, changes, for_world, load, trained
from longtake.training.checkpoint.save import Checkpoints
from longtake.training.checkpoint.weights import RAW, Weights

__all__ = [
    "RAW",
    "Checkpoints",
    "Place",
    "Weights",
    "beside",
    "changes",
    "copies_of",
    "differences",
    "for_world",
    "former_place",
    "latest",
    "load",
    "locked",
    "meta",
    "place_of",
    "trained",
]
