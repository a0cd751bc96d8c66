"""A picture or a text as a vector to search by, from the encoder that made a column.

The record of a stage, which came with the dataset, says which encoder that was. So a search opens only a folder of this
machine, whose weights are data; TorchScript, which is code, and what lies elsewhere must be named by who searches.
"""

from pathlib import Path

import numpy as np
from pydantic import ValidationError

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.datasets.scores import Column
from longtake.pipeline.scorers import embedding, torchscript
from longtake.pipeline.scorers.one_by_one import OneByOne
from longtake.pipeline.scorers.pictures import picture

Config = embedding.Config | torchscript.Config


def of_text(column: Column, text: str, encoder: str | None = None) -> np.ndarray:
    """The vector (D,) float32 of length 1 of a text.

    Args:
        encoder: where the files of the column's encoder are, for one that is not opened unasked.

    Raises:
        UserError: as `encoder_of`, or the column's encoder takes no such text.
    """
    from longtake.datasets import dual

    if not text.strip():
        raise UserError("--text: says nothing; write what is to be seen")
    if column.scorer != "embedding":
        raise UserError(
            f"{column.column}: made by `{column.scorer}`, which encodes no texts; score by `embedding` with a CLIP"
        )
    config = encoder_of(column, encoder)
    assert isinstance(config, embedding.Config)
    return dual.encode_text(config.model, text)


def of_picture(column: Column, field: str, path: str, encoder: str | None = None) -> np.ndarray:
    """The vector (D,) of a picture, as of a clip of one frame. Raises as `of_text`, and UserError where it is no picture."""
    config = encoder_of(column, encoder)
    if isinstance(config, embedding.Config):
        # the vector alone
        looker = embedding.SCORER.load(config.model_copy(update={"head": None, "likeness": {}}), "cpu")
    else:
        looker = torchscript.SCORER.load(config, "cpu")
    assert isinstance(looker, OneByOne)
    vector = looker.look(picture(path, path, looker.size)[None, None])[0][field]
    return np.asarray(vector, np.float32).reshape(-1, np.shape(vector)[-1]).mean(0)


def encoder_of(column: Column, encoder: str | None = None) -> Config:
    """The settings of what made a column, of which no file but those of a folder of this machine was opened unasked.

    Raises:
        UserError: it is not opened unasked, its files are other ones by now, or it is no encoder.
    """
    kind = {"embedding": embedding, "torchscript": torchscript}.get(column.scorer)
    if kind is None:
        raise UserError(f"{column.column}: made by `{column.scorer}`, which encodes no pictures; name a clip's key")
    key = "model" if kind is embedding else "file"
    noted = column.settings if encoder is None else {**column.settings, key: encoder}
    if key not in noted:
        raise UserError(
            f"{column.column}: no record beside the dataset says where its encoder is; name that by --encoder, or name a"
            " clip's key"
        )
    if kind is embedding and len(column.fields) > 1 and "head" not in noted:
        raise UserError(
            f"{column.column}: no record beside the dataset says where its head and pictures are, which are part of its"
            " digest; copy the record of its stage there, or name a clip's key"
        )
    try:
        config: Config = kind.Config.model_validate(dict(noted))
    except ValidationError as e:
        raise UserError(f"{column.column}: its notes are no settings of `{column.scorer}`; score again") from e
    place = config.model if isinstance(config, embedding.Config) else config.file
    shown = storage.printable(place)
    if encoder is None and not (storage.is_local(place) and Path(place).is_dir()):
        raise UserError(
            f"{column.column}: made by {shown}, which is no folder of safetensors here and may be anything: it is not"
            " opened unasked; if you trust it, name it by --encoder, or name a clip's key"
        )
    if isinstance(config, embedding.Config):
        # they are part of the digest
        for path in (*([config.head] if config.head else []), *config.likeness.values()):
            if not (storage.is_local(path) and Path(path).is_file()):
                raise UserError(
                    f"{column.column}: its encoder stands beside {storage.printable(path)}, which is no file here and is"
                    " not opened; copy it here and score again, or name a clip's key"
                )
    if kind.SCORER.digest(config) != column.digest:
        raise UserError(
            f"{column.column}: {shown}: other files than those that made it; copy them back, or score again"
        )
    return config
