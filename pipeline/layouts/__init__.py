"""Layouts of other tools: views of datasets written out for them, and theirs read as manifests.

A layout is a module with `export(chosen, split, number, folder)`, which writes the chosen clips of one shard, the file that
makes them count last; `exported(chosen, split, number, folder) -> bool`, whether that has happened; and `rows(folder, beside)`,
which yields a row of a manifest for each video of such a folder. What can be no source as it is, is unpacked to `beside`.
It may have `check(chosen)`, which refuses in one line what it cannot hold, and `finish(chosen, folder)`, which makes the shards
that are there a whole.
"""

import importlib
from typing import Any

LAYOUTS = {
    "webdataset": "longtake.pipeline.layouts.webdataset",
    "huggingface": "longtake.pipeline.layouts.huggingface",
    "lance": "longtake.pipeline.layouts.lance",
    "lerobot": "longtake.pipeline.layouts.lerobot",
}


def load(name: str) -> Any:
    """The module of a layout."""
    return importlib.import_module(LAYOUTS[name])
