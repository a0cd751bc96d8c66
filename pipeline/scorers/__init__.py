"""The table of scorers. A new one is a file with a `SCORER` and a line here; it is imported only when a recipe names it."""

import importlib

from longtake.datasets.errors import UserError, in_short
from longtake.pipeline.scorers.scorer import Scorer

SCORERS = {
    # of every frame
    "motion": "longtake.pipeline.scorers.motion",
    "cadence": "longtake.pipeline.scorers.cadence",
    "light": "longtake.pipeline.scorers.light",
    "focus": "longtake.pipeline.scorers.focus",
    "coding": "longtake.pipeline.scorers.coding",
    "bars": "longtake.pipeline.scorers.bars",
    "overlay": "longtake.pipeline.scorers.overlay",
    # of some frames, by a network that a package ships
    "text": "longtake.pipeline.scorers.text",
    "faces": "longtake.pipeline.scorers.faces",
    "people": "longtake.pipeline.scorers.people",
    # of some frames, by a network of the user's
    "torchscript": "longtake.pipeline.scorers.torchscript",
    "classifier": "longtake.pipeline.scorers.classifier",
    "embedding": "longtake.pipeline.scorers.embedding",
    "prompt": "longtake.pipeline.scorers.prompt",
}

# those that need nothing from a user: asked where a recipe names none
PACK = ("motion", "cadence", "light", "focus", "coding", "bars", "overlay", "text", "faces", "people")


def load(name: str) -> Scorer:
    """The scorer of a name in the table."""
    return of_module(SCORERS[name])


def of_module(module: str) -> Scorer:
    """The scorer of a module. Raises UserError where a package is missing that it imports."""
    try:
        scorer: Scorer = importlib.import_module(module).SCORER
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("longtake"):
            raise
        raise UserError(f"{e.name} is not installed: pip install 'longtake[curation]'") from e
    except ImportError as e:
        # such as a library of the system that OpenCV needs
        raise UserError(
            f"{e.name or module} cannot be imported ({in_short(e)}): pip install --force-reinstall 'longtake[curation]'"
        ) from e
    return scorer
