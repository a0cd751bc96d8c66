"""Models of other libraries in the registry: their files as they are, below a config.json of ours that has their digests.

None of them is a module of ours. A new kind is a row of `FOREIGN`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets.errors import UserError


class Foreign(NamedTuple):
    """A kind of foreign model.

    what     noun for messages
    use      what such a model is for, and where it is named
    files    the names that its files have below config.json
    checked  name of the module whose `checked(folder)` returns what config.json says of a model, and its files by these
             names; UserError where the folder has no such model
    """

    what: str
    use: str
    files: re.Pattern[str]
    checked: str


# name in config.json -> row
FOREIGN = {
    "text_encoder": Foreign(
        "text encoder",
        "name it as the `encoder` of a `cache_text` stage",
        re.compile(r"(text_encoder|tokenizer)/\w[\w.-]*\.(safetensors|json)"),
        "longtake.training.text.candidate",
    )
}


def check_ours(where: Path | str, content: Mapping[str, Any]) -> None:
    """Raise UserError where a config.json is that of a foreign model."""
    if row := FOREIGN.get(content["model"]):
        raise UserError(f"{where}: is a {row.what}, and no model of videos; {row.use}")
