"""A column of token states: the settings of its encoder, its shards as they are written and read, and its record.

A shard has the states of each distinct caption of its clips once, as SHA.npy: (L, width) uint16, the bits of bfloat16. Its
index has a row a clip with the captions that the column of captions has for it, in the same order.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from longtake.datasets import captions, index, record, schema, storage
from longtake.datasets.errors import Failure
from longtake.datasets.stage import StageConfig, Utf8

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "text-"  # of the names of these columns
WORDS = "words"  # the name of the encoder that is installed with the extra

_EMPTY = "empty.safetensors"
_HEADER = 128  # bytes before the data in a .npy of these shapes
_DTYPE = np.dtype("<u2")
_DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}  # of safetensors


class TextConfig(StageConfig):
    """An encoder of texts, and what it makes of them.

    encoder    "words": packaged embeddings of words; or a folder with a model of transformers, or one that is registered:
               models:/umt5@champion, models:/umt5/3
    layer      whose states are taken: -1 the last, after its norm; -2 the one before it, and so on
    length     tokens of a text that are kept; null: 512, or what the model takes if that is less
    template   a text around each text, which stands at its {}
    crop       tokens that are cut off at the start, such as those of the template before the text
    clean      none, whitespace (collapsed), or wan (and entities resolved, as Wan's models had it)
    side       where texts of a batch are padded; the padding is never kept
    precision  of the encoder; the states are bfloat16
    """

    encoder: str = WORDS
    layer: int = Field(-1, le=-1)
    length: int | None = Field(None, ge=1, le=1 << 20)  # bytes of a manifest's row
    template: Utf8 | None = None
    crop: int = Field(0, ge=0)
    clean: Literal["none", "whitespace", "wan"] = "whitespace"
    side: Literal["right", "left"] = "right"
    precision: Literal["fp32", "bf16"] = "fp32"

    @field_validator("template")
    @classmethod
    def _has_one_place(cls, template: str | None) -> str | None:
        if template is not None and template.count("{}") != 1:
            raise ValueError("must have one {}, where the text stands")
        return template


# States as they are stored.


def packed(states: "Tensor") -> bytes:
    """The .npy of states (L, width) bfloat16."""
    import torch

    buffer = io.BytesIO()
    bits = states.contiguous().view(torch.uint16).numpy().astype(_DTYPE, copy=False)
    np.lib.format.write_array(buffer, bits, version=(1, 0))
    return buffer.getvalue()


def unpacked(data: bytes | memoryview, tokens: int) -> np.ndarray:
    """The bits (L, width) uint16 of states in a .npy of `tokens` of them."""
    return np.frombuffer(data, _DTYPE, offset=_HEADER).reshape(tokens, -1)


class Stored(NamedTuple):
    """Where the states of a text are in a tar."""

    tar: str  # URL
    offset: int
    size: int
    crc32: int
    tokens: int


def stored(dataset: str, shard: index.Shard) -> dict[str, Stored]:
    """Where the states of each text of a shard are, by its sha."""
    tar = storage.join(dataset, shard.split, f"{shard.name}.tar")
    texts = pc.list_flatten(shard.table["texts"])
    names = ("sha", "offset", "size", "crc32", "tokens")
    columns = [pc.struct_field(texts, name).to_pylist() for name in names]
    return {sha: Stored(tar, *place) for sha, *place in zip(*columns, strict=True)}


class Span(NamedTuple):
    """A caption of a clip without its text: the sha of it, and the seconds of the clip that it is about."""

    sha: str
    start: float | None
    end: float | None


def spans_of(row: Sequence[Mapping[str, Any]] | None) -> list[Span] | None:
    """The spans in a row of a column of captions; None where there are none."""
    if row is None:
        return None
    return [Span(captions.sha_of(one["text"]), one["start"], one["end"]) for one in row]


# The record.


@dataclass(frozen=True)
class Text:
    """A column of token states."""

    dataset: str  # URL
    column: str  # for `Loader(columns=...)`: "text-DIGEST"
    # the fields of TextConfig, the encoder's `digest`, the `width` of a state, and as `probe` the first values of those of ""
    encoder: Mapping[str, Any]
    captions: str  # the column of captions that these are of
    view: str | None  # URL; only the captions of the clips that it keeps have states
    digests: Mapping[str, str]  # of the splits' base shards when this was written (see `compact.Rows`)
    captions_digests: Mapping[str, str]  # of the splits' shards of captions then
    counts: Mapping[str, int]  # clips, clips_without, captions, distinct, texts_cut, tokens
    uri: str = ""  # where it was read

    @property
    def width(self) -> int:
        """Values in the state of a token."""
        return int(self.encoder["width"])

    def config(self) -> TextConfig:
        """The settings of the encoder."""
        return TextConfig(**{name: self.encoder[name] for name in TextConfig.model_fields})

    def empty(self) -> np.ndarray:
        """The states of an empty text, (L, width) float32.

        Raises:
            Failure: they are missing or damaged.
        """
        from safetensors import SafetensorError, deserialize

        url = storage.join(self.uri, _EMPTY)
        try:
            found = dict(deserialize(storage.read(url)))["empty"]
            # by numpy: a plan asks for them within a trace, whose tensors have no values
            states = np.frombuffer(found["data"], _DTYPES[found["dtype"]]).reshape(found["shape"])
        except (FileNotFoundError, SafetensorError, KeyError) as e:
            raise Failure(f"{url}: is missing or damaged; run its `cache_text` stage again") from e
        if states.ndim != 2 or states.shape[1] != self.width:
            raise Failure(f"{url}: has states of another encoder; run its `cache_text` stage again")
        if found["dtype"] == "BF16":
            # the upper half of an fp32 number
            states = (states.astype("<u4") << 16).view("<f4")
        return np.array(states, np.float32)


def write_text(uri: str, text: Text, empty: "Tensor") -> None:
    """Write a record and the states (L, width) of an empty text."""
    from safetensors.torch import save

    content = {name: value for name, value in asdict(text).items() if name != "uri"}
    storage.write(storage.join(uri, _EMPTY), save({"empty": empty.contiguous()}))
    record.write(uri, "text", content)


def read_text(uri: str) -> Text:
    """The record that a `cache_text` stage has written. Raises UserError, Failure: see `record.read`."""
    return record.read(uri, "text", "cache_text", partial(Text, uri=uri))


# Verification.


def problems(dataset: str, shard: index.Shard) -> Iterator[str]:
    """A line for each contradiction in the index of a shard of token states, or between it and its captions."""
    url = storage.join(dataset, shard.split, f"{shard.name}.parquet")
    remedy = "delete it and run its `cache_text` stage again"
    if shard.table.schema.remove_metadata() != schema.TEXT_INDEX:
        yield f"{url}: not an index of token states; {remedy}"
        return
    try:
        notes = index.read_notes(dataset, shard)
        width, of = int(notes["width"]), str(notes["captions"])
    except (Failure, KeyError, ValueError, TypeError) as e:
        yield str(e) if isinstance(e, Failure) else f"{url}: its notes are not those of token states; {remedy}"
        return
    for row in shard.table.to_pylist():
        for text in row["texts"] or ():
            if not text["tokens"] or text["size"] != _HEADER + 2 * text["tokens"] * width:
                yield f"{url}: {row['key']}: the size of {text['sha']} is not that of its tokens; {remedy}"
                return
    name = f"{shard.name.partition('.')[0]}.{of}"
    if not storage.exists(storage.join(dataset, shard.split, f"{name}.parquet")):
        return
    try:
        spoken = index.read_shard(dataset, shard.split, name).table["captions"].to_pylist()
    except (Failure, KeyError):
        return  # a problem of the captions, which is reported with them
    if len(spoken) != len(shard.table) or any(
        texts != [] and _plain(texts) != spans_of(row)
        for texts, row in zip(shard.table["texts"].to_pylist(), spoken, strict=True)
    ):
        yield f"{url}: is of other captions than {of} has now; run its `cache_text` stage again"


def _plain(texts: Sequence[Mapping[str, Any]] | None) -> list[Span] | None:
    return None if texts is None else [Span(text["sha"], text["start"], text["end"]) for text in texts]


def rows_of(
    base: pa.Table, spans: Sequence[Sequence[Span] | None], places: Mapping[str, Stored]
) -> list[dict[str, Any]]:
    """The rows of schema.TEXT_INDEX, given where the states of each text are; an empty list where a view left a clip out."""
    keys, shas = (base[name].to_pylist() for name in ("key", "sha256"))
    return [
        {"key": key, "base_sha256": sha256, "texts": None if row is None else [_entry(s, places[s.sha]) for s in row]}
        for key, sha256, row in zip(keys, shas, spans, strict=True)
    ]


def _entry(span: Span, place: Stored) -> dict[str, Any]:
    return span._asdict() | {name: getattr(place, name) for name in ("offset", "size", "crc32", "tokens")}
