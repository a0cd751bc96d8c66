"""Manifests: lists of sources with what is known of them, streamed in constant memory as Arrow batches.

Read are CSV as RFC 4180 has it and TSV, JSON (a list of objects, or an object a line), all in UTF-8 and perhaps packed,
and Parquet (a file, or a folder of parts). Who wrote it need not be trusted: a row has bounds on its size and depth.
"""

import codecs
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from json.encoder import encode_basestring_ascii
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown

KINDS = ".csv, .tsv, .json, .jsonl or .ndjson (also .gz or .zst of these), or .parquet (a file or a folder of parts)"
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_TEXTS = frozenset((*_DELIMITERS, "json", "jsonl", "ndjson"))
_PACKED = ("gz", "zst")
_PACKINGS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_OTHERS = """7z arrow avro bz2 doc docx feather gz htm html ods orc pdf rar tar tgz txt xls xlsx xml xz yaml yml zip
zst"""
_OTHER_LISTS = frozenset(_OTHERS.split())
_LOOKS = {
    b"PK\x03\x04": "a workbook or zip",
    b"\xd0\xcf\x11\xe0": "a workbook",
    b"PAR1": "Parquet",
    b"%PDF": "a PDF",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"<": "HTML or XML",
}
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_SPACE = re.compile(r"[ \t\n\r]*")
_HEAD_BYTES = 1 << 12
_BATCH_ROWS = 1 << 16
_BLOCK_BYTES = 1 << 22
_BATCH_BYTES = 1 << 24
_ROW_BYTES = 1 << 20
_DEPTH = 32
_OURS = ("uri", "bytes", "etag")
_ADDRESS = re.compile(r"https?://[^?#]*", re.IGNORECASE)

# What is known of a source before it is read. `etag`: the store's own content tag, where it has one.
FOUND = pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("etag", pa.string()), ("extra", pa.string())])


def is_manifest(name: str) -> bool:
    return _kind(name) in {*_TEXTS, "parquet"}


def is_other_list(name: str) -> bool:
    """Whether a name is that of a list, document or archive that is not read, and of no video."""
    return suffix(name) in _OTHER_LISTS and not is_manifest(name)


def suffix(name: str) -> str:
    stem, dot, ending = _place(name).rsplit("/", 1)[-1].rpartition(".")
    return ending.lower() if dot and stem else ""


def _place(name: str) -> str:
    """A name without the query of its address, which may be a signature."""
    address = _ADDRESS.match(name)
    return address[0] if address else name


def _kind(name: str) -> str:
    """The suffix, that of what is packed where it is packed."""
    name = _place(name).rstrip("/")
    ending = suffix(name)
    inner = suffix(name[: -len(ending) - 1]) if ending in _PACKED else ""
    return inner if inner in _TEXTS else ending


def read(url: str) -> Iterator[pa.RecordBatch]:
    """The rows of a manifest as batches of FOUND, `bytes` null where it does not say.

    `extra` has the row's other columns (see annotations.py). A relative URI counts from the folder that the manifest is
    or lies in.

    Raises:
        UserError: it is missing, empty, of another kind, not readable, or has no column `uri`.
        Failure: its store does not give it whole.
    """
    fs, path = storage.filesystem(url.rstrip("/"))
    kind, count, at = _kind(url), 0, url
    try:
        for file, parts in _files(fs, path, url):
            base = url if file == path else f"{url.rstrip('/')}/"
            at = url if file == path else base + file.removeprefix(path).lstrip("/")
            opened = partial(storage.retrying, at, partial(fs.open, file, "rb"))
            for batch, extra in _parquet(opened, parts) if kind == "parquet" else _text(opened, kind):
                count += len(batch)
                yield _as_found(batch, extra, at, base)
    except FileNotFoundError as e:
        raise UserError(f"sources: {at}: no such manifest") from e
    except PermissionError as e:
        raise UserError(f"sources: {e.filename or at}: may not be read ({e.strerror or e})") from e
    except (UserError, Failure):
        raise
    except Exception as e:
        if storage.of_network(e):
            raise Failure(f"{at}: did not come whole ({e}); run the same command again") from e
        if not isinstance(e, pa.ArrowException | OSError | ValueError | OverflowError):
            raise
        what = shown(" ".join(str(e).split()))
        raise UserError(f"sources: {at}: not a readable manifest ({what[:300]}); manifests are {KINDS}") from e
    if not count:
        raise UserError(f"sources: {url}: a manifest without rows; manifests are {KINDS}, with a column `uri`")


def _files(fs: Any, path: str, url: str) -> Iterator[tuple[str, Mapping[str, str | None]]]:
    """The files of a manifest, and the columns that folders named `column=value` give to their rows."""
    asked = storage.is_local(url) or _kind(url) == "parquet"
    type_ = storage.retrying(url, partial(fs.info, path))["type"] if asked else "file"
    if type_ not in ("file", "directory"):
        raise ValueError("neither a file nor a folder")
    if type_ == "file" or _kind(url) != "parquet":
        yield path, {}
        return
    for file in sorted(_below(fs, path, url)):
        *folders, name = file.removeprefix(path).strip("/").split("/")
        # writers leave notes of their own beside the parts
        if not any(part.startswith(("_", ".")) and "=" not in part for part in (*folders, name)):
            pairs = (folder.partition("=") for folder in folders if "=" in folder)
            yield file, {unquote(key): None if value == _NO_VALUE else unquote(value) for key, _, value in pairs}


def _below(fs: Any, folder: str, url: str) -> Iterator[str]:
    """All files of a folder. `fs.find` and `fs.walk` would pass over what they may not list."""
    for entry in storage.retrying(url, partial(fs.ls, folder, detail=True)):
        if entry["type"] != "directory":
            yield entry["name"]
        elif entry["name"].rstrip("/") != folder.rstrip("/"):
            yield from _below(fs, entry["name"], url)


def _parquet(opened: Callable[[], Any], parts: Mapping[str, str | None]) -> Iterator[tuple[pa.RecordBatch, Any]]:
    with opened() as f:
        file = pq.ParquetFile(f)
        names = _unique(file.schema_arrow.names)
        for part in file.iter_batches(_BATCH_ROWS):
            batch = part
            for name in parts.keys() - {*names}:
                batch = batch.append_column(name, pa.array([parts[name]] * len(batch), pa.string()))
            yield batch, _objects(batch)


def _text(opened: Callable[[], Any], kind: str) -> Iterator[tuple[pa.RecordBatch, Any]]:
    with opened() as f:
        head = f.read(_HEAD_BYTES)
    packing = next((name for magic, name in _PACKINGS.items() if head.startswith(magic)), None)

    @contextmanager
    def unpacked() -> Iterator[Any]:
        with opened() as f:
            yield pa.CompressedInputStream(f, packing) if packing else f

    with unpacked() as f:
        head = f.read(_HEAD_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    # by its content: a page for those who have to log in is often called list.csv
    looks = next((what for magic, what in _LOOKS.items() if head.startswith(magic)), "")
    if looks or b"\0" in head:
        raise ValueError(f"it is {looks or 'binary'}")
    if not head:
        return
    if kind in _DELIMITERS:
        yield from _csv(unpacked, _DELIMITERS[kind])
        return
    with unpacked() as f:
        yield from _json(_listed(_blocks(f)) if head.startswith(b"[") else _lines(_blocks(f)))


def _csv(opened: Callable[[], Any], delimiter: str) -> Iterator[tuple[pa.RecordBatch, Any]]:
    """All columns are text: types that were guessed from the first rows would fail later ones."""
    options = (
        pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES),
        pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
    )
    with opened() as f:
        given = pyarrow.csv.open_csv(_LineEnds(f, delimiter), *options).schema.names
    names = _unique([name.strip() for name in given])
    types = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(given, pa.string()))
    with opened() as f:
        for part in pyarrow.csv.open_csv(_LineEnds(f, delimiter), *options, types):
            batch = part.rename_columns(names)
            yield batch, _objects(batch)


class _LineEnds(io.RawIOBase):
    """A file of CSV whose rows end with an LF, in blocks of which none ends with a CR or begins with one.

    Of rows that end with a CR Arrow refuses some, and at a block's border it drops the LF after a CR, and a row's end.
    Raises ValueError where a quote is not closed: what follows would be one cell.
    """

    def __init__(self, f: Any, delimiter: str) -> None:
        self._f, self._held, self._starts = f, b"", (b"\n", b"\r", delimiter.encode())
        self._before = b"\n"  # the byte before a block
        self._closed = False  # whether a closing quote ends the block before
        self._cell: bytes | None = None  # the beginning of the quoted cell that goes on in the next block, if one does
        self._length = 0  # what that cell has so far

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        # whole blocks: Arrow refuses a row that lies in three
        data: bytes = self._held
        while len(data) < size and (more := self._f.read(size - len(data))):
            data += more
        whole = len(data.rstrip(b"\r\n")) - 1
        # what is held begins with the byte before the line ends; where the file ends, nothing is
        self._held = data[whole:] if len(data) == size and data.endswith(b"\r") and whole > 0 else b""
        data = data[: len(data) - len(self._held)]
        if self._cell is not None and (not data or self._length > _ROW_BYTES):
            raise ValueError(f"the quote before {self._cell.decode('utf-8', 'replace')!r} is never closed")
        if not self._before:
            data, self._before = data.removeprefix(codecs.BOM_UTF8), b"\n"
        return b'"'.join(self._pieces(data))

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """What lies between quotes, outside of cells with LF for each CR: of the empty rows of a CRLF nothing is read."""
        for number, piece in enumerate(data.split(b'"')):
            if number and self._cell is not None:
                self._cell, self._closed = None, True
            elif number and (self._closed or self._before in self._starts):
                # one at once after a closing one is doubled, and the cell goes on
                self._cell, self._length, self._closed = piece[:40], 0, False
            elif number:
                self._before = b'"'
            if self._cell is None:
                yield piece.replace(b"\r", b"\n")
            else:
                self._length += len(piece)
                yield piece
            if piece:
                self._before, self._closed = piece[-1:], False


def _json(rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[pa.RecordBatch, Any]]:
    """Of named JSON objects, for each may have keys of its own."""
    known: list[dict[str, str | None]] = []
    extra: list[str | None] = []
    size = 0

    def batch() -> tuple[pa.RecordBatch, Any]:
        names = [name for name in _OURS if any(name in row for row in known)]
        if not names:
            raise ValueError(
                f"{where} has no `uri`; it has {', '.join([*json.loads(extra[-1] or '{}')][:10]) or 'nothing'}"
            )
        columns = {name: pa.array([row.get(name) for row in known], pa.string()) for name in names}
        return pa.RecordBatch.from_pydict(columns), pa.array(extra, pa.string())

    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object")
        ours = {name: row.pop(name) for name in _OURS if name in row}
        if not isinstance(ours.get("uri", ""), str):
            raise ValueError(f"{where}: its uri is no text")
        plain = ((name, _plain(value, where)) for name, value in row.items())
        cells = {name: value for name, value in plain if value is not None and value != ""}
        known.append({name: None if value is None else str(value) for name, value in ours.items()})
        extra.append(json.dumps(cells, sort_keys=True) if cells else None)
        size += len(extra[-1] or "")
        if len(known) == _BATCH_ROWS or size > _BATCH_BYTES:
            yield batch()
            known, extra, size = [], [], 0
    if known:
        yield batch()


def _blocks(f: Any) -> Iterator[str]:
    """A file's text in pieces, with a line break at its end."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while data := f.read(_BLOCK_BYTES):
        yield decoder.decode(data)
    yield decoder.decode(b"", True) + "\n"


def _lines(blocks: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The value on each line that is not empty, and the line's name."""
    number, rest = 0, ""
    for block in blocks:
        # no other line break counts: JSON may have them in its texts
        *lines, rest = (rest + block).split("\n")
        for line in lines:
            number += 1
            if len(line) > _ROW_BYTES:
                raise ValueError(f"line {number} has more than {_ROW_BYTES} characters")
            if line.strip():
                try:
                    yield f"line {number}", _DECODER.decode(line)
                except (ValueError, RecursionError) as e:
                    raise ValueError(f"line {number}: {e}") from e
        if len(rest) > _ROW_BYTES:
            raise ValueError(f"line {number + 1} has more than {_ROW_BYTES} characters")


def _listed(blocks: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The objects of a JSON list, and the name of each."""
    text, number, due = "", 1, "["
    for block in blocks:
        text, at = text + block, 0
        while (at := _SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]
            mark, where = text[at], f"entry {number}"
            if due == "{" and mark == "{":
                try:
                    value, at = _DECODER.raw_decode(text, at)
                except json.JSONDecodeError as e:
                    # perhaps it goes on in the next block
                    if len(text) - at > _ROW_BYTES:
                        raise ValueError(f"{where}: {e.msg}, or more than {_ROW_BYTES} characters") from e
                    break
                except (ValueError, RecursionError) as e:
                    raise ValueError(f"{where}: {e}") from e
                yield where, value
                number, due = number + 1, ","
            elif mark == "]" and (due == "," or (due == "{" and number == 1)):
                at, due = at + 1, "end"
            elif mark == due and mark in "[,":
                at, due = at + 1, "{"
            else:
                raise ValueError(f"{where}: {mark!r} where {due} is due")
        text = text[at:]
    if due != "end":
        raise ValueError(f"entry {number}: the list breaks off")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        _unique([name for name, _ in pairs])
    return out


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _plain(value: Any, where: str = "a cell", depth: int = 1) -> Any:
    """What RFC 8259 has a word for: NaN and infinities are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict | list | tuple) and depth > _DEPTH:
        raise ValueError(f"{where} is nested more than {_DEPTH} deep")
    if isinstance(value, dict):
        return {name: _plain(inner, where, depth + 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, where, depth + 1) for inner in value]
    return value


def _unique(names: Sequence[str]) -> Sequence[str]:
    if twice := [name for n, name in enumerate(names) if name in names[:n]]:
        raise ValueError(f"column `{twice[0]}` is there twice; name each once")
    return names


def _as_found(batch: pa.RecordBatch, extra: Any, url: str, base: str) -> pa.RecordBatch:
    names = batch.schema.names
    if "uri" not in names:
        there = ", ".join(name[:40] for name in names[:10])
        raise UserError(f"sources: {url}: no column `uri`; there are {there}")
    uris = _texts(batch["uri"])
    if uris.null_count:
        raise UserError(f"sources: {url}: {uris.null_count} rows have no uri")
    if (longest := pc.max(pc.binary_length(extra)).as_py() or 0) > _ROW_BYTES:
        uri = uris[pc.index(pc.binary_length(extra), longest).as_py()]
        raise ValueError(f"the row of {str(uri)[:200]} has {longest} bytes; {_ROW_BYTES} are allowed")
    columns = {
        "uri": _resolved(uris, base),
        "bytes": _sizes(batch["bytes"]) if "bytes" in names else pa.nulls(len(batch), pa.int64()),
        "etag": _texts(batch["etag"]) if "etag" in names else pa.nulls(len(batch), pa.string()),
        "extra": extra,
    }
    return pa.RecordBatch.from_pydict(columns, schema=FOUND)


def _texts(column: Any) -> Any:
    text = column.cast(pa.string())
    return pc.if_else(pc.equal(text, ""), None, text)


def _sizes(column: Any) -> Any:
    """Whole numbers, null where there is none: pandas writes 12.0 where others of the column are missing."""
    if not pa.types.is_integer(column.type):
        try:
            numbers = (column if pa.types.is_floating(column.type) else _texts(column)).cast(pa.float64())
            column = pc.if_else(pc.is_finite(numbers), numbers, None)
        except pa.ArrowInvalid as e:
            raise ValueError(f"column `bytes`: {e}") from e
    sizes = column.cast(pa.int64())
    return pc.if_else(pc.less(sizes, 0), None, sizes)


def _resolved(uris: Any, base: str) -> Any:
    """Relative URIs count from `base` up to its last slash; a local file has one name, however its URL is written."""
    local = storage.is_local(base)
    path = storage.filesystem(base)[1] + "/" * base.endswith("/") if local else base
    if path.startswith("http"):
        path = path.partition("?")[0]
    folder = path.rpartition("/")[0] + "/"
    relative = pc.invert(pc.match_substring_regex(uris, r"^(/|[A-Za-z][A-Za-z0-9+.-]+://|(?i:file|local):/)"))
    odd = pc.match_substring_regex(uris, r"^(?i:file|local):/|[\x00-\x1f\x7f-\x{9f}\x{2028}\x{2029}]")
    if local and storage.named(folder) != folder:
        odd = pc.or_(odd, relative)
    elif pc.any(relative).as_py():
        uris = pc.if_else(relative, pc.binary_join_element_wise(folder, uris, ""), uris)
    if not pc.any(odd).as_py():
        return uris
    names = [_named(uri, folder) for uri in uris.filter(odd).to_pylist()]
    return pc.replace_with_mask(uris, odd, pa.array(names, pa.string()))


def _named(uri: str, folder: str) -> str:
    if not storage.is_local(uri):
        return uri
    return storage.named(storage.filesystem(uri)[1] if uri.startswith("/") or ":/" in uri else folder + uri)


def _objects(batch: pa.RecordBatch) -> Any:
    """All columns but our own as a JSON object a row, without cells that say nothing; null where none says anything.

    Built from columns, since a million small dicts take many seconds.
    """
    names = sorted(name for name in batch.schema.names if name not in _OURS)
    if not names:
        return pa.nulls(len(batch), pa.string())
    cells = [pc.binary_join_element_wise(f", {json.dumps(name)}: ", _values(batch[name]), "") for name in names]
    joined = pc.binary_join_element_wise(*(pc.fill_null(cell, "") for cell in cells), "}", "")
    objects = pc.binary_replace_slice(joined, 0, 2, "{")
    return pc.if_else(pc.equal(joined, "}"), None, objects)


def _values(column: Any) -> Any:
    """A column of JSON values, null where there is none."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    if pa.types.is_integer(column.type):
        return column.cast(pa.string())
    if pa.types.is_string(column.type):
        text = pc.binary_join_element_wise('"', _texts(column), '"', "")
        special = pc.fill_null(pc.match_substring_regex(column, r'["\\\x00-\x1f]'), False)
        if pc.any(special).as_py():
            escaped = [encode_basestring_ascii(value) for value in column.filter(special).to_pylist()]
            text = pc.replace_with_mask(text, special, pa.array(escaped, pa.string()))
        return text
    plain = [_plain(value) for value in column.to_pylist()]
    return pa.array([None if v is None else json.dumps(v, default=_written) for v in plain], pa.string())


def _written(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
