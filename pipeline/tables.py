"""Files of rows as Arrow batches: CSV, TSV, JSON, JSON Lines and Parquet, streamed in constant memory.

Each batch comes with `extra`: all columns but uri, bytes and etag as one JSON object a row, without empty cells; but an empty
`caption` is one, except in CSV, which has no other word for none. What no JSON and no UTF-8 has a word for becomes null or a
replacement; in captions it stays, so that they are refused with their row. Who wrote a file need not be trusted: rows have bounds on
their size and depth.
"""

import codecs
import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from json.encoder import encode_basestring_ascii
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from longtake.datasets.captions import NAMES as CAPTIONS

SOURCE_COLUMNS = ("uri", "bytes", "etag")
_CAPTION = "caption"  # the column whose empty texts count
ROW_BYTES = 1 << 20

DELIMITERS = {"csv": ",", "tsv": "\t"}
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_OTHER_CONTENTS = {
    b"PK\x03\x04": "a workbook or zip",
    b"\xd0\xcf\x11\xe0": "a workbook",
    b"PAR1": "Parquet",
    b"%PDF": "a PDF",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"<": "HTML or XML",
}
_SPACE = re.compile(r"[ \t\n\r]*")
_HEAD_BYTES = 1 << 12
_BATCH_ROWS = 1 << 16
_BLOCK_BYTES = 1 << 22
_BATCH_BYTES = 1 << 24
_DEPTH = 32

Open = Callable[[], Any]  # a context manager that gives the file from its beginning
Batch = tuple[pa.RecordBatch, Any]  # with the rows' `extra`, a string array


def read_parquet(open_file: Open, constants: Mapping[str, str | None]) -> Iterator[Batch]:
    """The batches of a Parquet file, with further columns that have one value each."""
    with open_file() as f:
        # buffered, all that is still to come would be in memory
        file = pq.ParquetFile(f, pre_buffer=False)
        names = _unique(file.schema_arrow.names)
        for rows in file.iter_batches(_BATCH_ROWS):
            rows.validate(full=True)  # texts are UTF-8
            batch = rows
            for name in constants.keys() - {*names}:
                batch = batch.append_column(name, pa.array([constants[name]] * len(batch), pa.string()))
            yield batch, _objects(batch, {_CAPTION})


def read_text(open_file: Open, kind: str) -> Iterator[Batch]:
    """The batches of a file of CSV, TSV, JSON or JSON Lines (by its suffix, `kind`), perhaps compressed.

    Raises:
        ValueError: its content is of another kind, or no row can be made of it.
    """
    with open_file() as f:
        head = f.read(_HEAD_BYTES)
    compression = next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), None)

    @contextmanager
    def open_text() -> Iterator[Any]:
        with open_file() as f:
            yield pa.CompressedInputStream(f, compression) if compression else f

    with open_text() as f:
        head = f.read(_HEAD_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    # by its content: a page for those who have to log in is often called list.csv
    content = next((name for magic, name in _OTHER_CONTENTS.items() if head.startswith(magic)), "")
    if content or b"\0" in head:
        raise ValueError(f"it is {content or 'binary'}")
    if not head:
        return
    if kind in DELIMITERS:
        yield from _csv(open_text, DELIMITERS[kind])
        return
    with open_text() as f:
        yield from _json(_list_entries(_blocks(f)) if head.startswith(b"[") else _lines(_blocks(f)))


def _csv(open_text: Open, delimiter: str) -> Iterator[Batch]:
    """All columns are text: types that were guessed from the first rows would fail later ones."""
    options = (
        pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES),
        pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
    )
    with open_text() as f:
        header = pyarrow.csv.open_csv(_LineEnds(f, delimiter), *options).schema.names
    names = _unique([name.strip() for name in header])
    types = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()))
    with open_text() as f:
        for rows in pyarrow.csv.open_csv(_LineEnds(f, delimiter), *options, types):
            batch = rows.rename_columns(names)
            yield batch, _objects(batch)


class _LineEnds(io.RawIOBase):
    """A file of CSV whose rows end with an LF, in blocks that neither begin nor end with a CR.

    Arrow refuses some rows that end with a CR, and at a block's border it drops the LF after a CR, and a row's end.
    Raises ValueError where a quote is not closed: what follows would be one cell.
    """

    def __init__(self, f: Any, delimiter: str) -> None:
        self._f, self._rest, self._starts = f, b"", (b"\n", b"\r", delimiter.encode())
        self._before = b"\n"  # the byte before a block
        self._closed = False  # whether a closing quote ends the block before
        self._cell: bytes | None = None  # the beginning of a quoted cell that continues in the next block
        self._length = 0  # of that cell so far

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        # whole blocks: Arrow refuses a row that spans three
        data: bytes = self._rest
        while len(data) < size and (more := self._f.read(size - len(data))):
            data += more
        last = len(data.rstrip(b"\r\n")) - 1
        # the rest begins with the byte before the line ends; at the end of the file there is none
        self._rest = data[last:] if len(data) == size and data.endswith(b"\r") and last > 0 else b""
        data = data[: len(data) - len(self._rest)]
        if self._cell is not None and (not data or self._length > ROW_BYTES):
            raise ValueError(f"the quote before {self._cell.decode('utf-8', 'replace')!r} is never closed")
        if not self._before:
            data, self._before = data.removeprefix(codecs.BOM_UTF8), b"\n"
        return b'"'.join(self._pieces(data))

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """The text between quotes, with LF for each CR outside of cells; the empty rows of a CRLF are not read."""
        for number, piece in enumerate(data.split(b'"')):
            if number and self._cell is not None:
                self._cell, self._closed = None, True
            elif number and (self._closed or self._before in self._starts):
                # right after a closing quote it is a doubled one, and the cell continues
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


def _json(entries: Iterator[tuple[str, Any]]) -> Iterator[Batch]:
    """The batches of named JSON objects, each of which may have other keys."""
    rows: list[dict[str, str | None]] = []
    extra: list[str | None] = []
    size = 0

    def batch() -> Batch:
        names = [name for name in SOURCE_COLUMNS if any(name in row for row in rows)]
        if not names:
            keys = ", ".join([*json.loads(extra[-1] or "{}")][:10])
            raise ValueError(f"{where} has no `uri`; it has {keys or 'nothing'}")
        columns = {name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}
        return pa.RecordBatch.from_pydict(columns), pa.array(extra, pa.string())

    for where, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is no JSON object")
        row = {name: entry.pop(name) for name in SOURCE_COLUMNS if name in entry}
        if not isinstance(row.get("uri", ""), str):
            raise ValueError(f"{where}: its uri is no text")
        said = ((name, _said(value, name in CAPTIONS, where)) for name, value in entry.items())
        cells = {name: value for name, value in said if value is not None and (value != "" or name == _CAPTION)}
        rows.append({name: None if value is None else str(value) for name, value in row.items()})
        extra.append(json.dumps(cells, sort_keys=True) if cells else None)
        size += len(extra[-1] or "")
        if len(rows) == _BATCH_ROWS or size > _BATCH_BYTES:
            yield batch()
            rows, extra, size = [], [], 0
    if rows:
        yield batch()


def _blocks(f: Any) -> Iterator[str]:
    """A file's text in pieces, with a line break at its end."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while data := f.read(_BLOCK_BYTES):
        yield decoder.decode(data)
    yield decoder.decode(b"", True) + "\n"


def _lines(blocks: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The name of each line that is not empty, and its value."""
    number, rest = 0, ""
    for block in blocks:
        # no other line break counts: JSON may have them in its texts
        *lines, rest = (rest + block).split("\n")
        for line in lines:
            number += 1
            if len(line) > ROW_BYTES:
                raise ValueError(f"line {number} has more than {ROW_BYTES} characters")
            if line.strip():
                try:
                    yield f"line {number}", _DECODER.decode(line)
                except (ValueError, RecursionError) as e:
                    raise ValueError(f"line {number}: {e}") from e
        if len(rest) > ROW_BYTES:
            raise ValueError(f"line {number + 1} has more than {ROW_BYTES} characters")


def _list_entries(blocks: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The name of each object of a JSON list, and the object."""
    text, number, due = "", 1, "["
    for block in blocks:
        text, position = text + block, 0
        while (position := _SPACE.match(text, position).end()) < len(text):  # type: ignore[union-attr]
            mark, where = text[position], f"entry {number}"
            if due == "{" and mark == "{":
                try:
                    value, position = _DECODER.raw_decode(text, position)
                except json.JSONDecodeError as e:
                    # perhaps it continues in the next block
                    if len(text) - position > ROW_BYTES:
                        raise ValueError(f"{where}: {e.msg}, or more than {ROW_BYTES} characters") from e
                    break
                except (ValueError, RecursionError) as e:
                    raise ValueError(f"{where}: {e}") from e
                yield where, value
                number, due = number + 1, ","
            elif mark == "]" and (due == "," or (due == "{" and number == 1)):
                position, due = position + 1, "end"
            elif mark == due and mark in "[,":
                position, due = position + 1, "{"
            else:
                raise ValueError(f"{where}: {mark!r} where {due} is due")
        text = text[position:]
    if due != "end":
        raise ValueError(f"entry {number}: the list breaks off")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        _unique([name for name, _ in pairs])
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _said(value: Any, exact: bool, where: str = "a cell", depth: int = 1) -> Any:
    """A value with null for NaN and infinities, for which RFC 8259 has no word; `exact` only where they are all of a cell.

    Raises ValueError: it is nested too deep.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) or (exact and depth > 1) else None
    if isinstance(value, dict | list | tuple) and depth > _DEPTH:
        raise ValueError(f"{where} is nested more than {_DEPTH} deep")
    if isinstance(value, dict):
        return {name: _said(inner, exact, where, depth + 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_said(inner, exact, where, depth + 1) for inner in value]
    return value


def _unique(names: Sequence[str]) -> Sequence[str]:
    """The names. Raises ValueError where one is there twice."""
    if repeats := [name for n, name in enumerate(names) if name in names[:n]]:
        raise ValueError(f"column `{repeats[0]}` is there twice; name each once")
    return names


def texts(column: Any) -> Any:
    """A column as text, null for empty cells."""
    text = column.cast(pa.string())
    return pc.if_else(pc.equal(text, ""), None, text)


def _objects(batch: pa.RecordBatch, with_empty: Collection[str] = ()) -> Any:
    """All columns but those of the source as a JSON object a row, without empty cells; null for an empty object.

    Built from columns, since a million small dicts take many seconds.

    Args:
        with_empty: columns whose empty texts stay.
    """
    names = sorted(name for name in batch.schema.names if name not in SOURCE_COLUMNS)
    if not names:
        return pa.nulls(len(batch), pa.string())
    values = [_values(batch[name], name in with_empty, name in CAPTIONS) for name in names]
    cells = [
        pc.binary_join_element_wise(f", {json.dumps(name)}: ", value, "")
        for name, value in zip(names, values, strict=True)
    ]
    joined = pc.binary_join_element_wise(*(pc.fill_null(cell, "") for cell in cells), "}", "")
    objects = pc.binary_replace_slice(joined, 0, 2, "{")
    return pc.if_else(pc.equal(joined, "}"), None, objects)


def _values(column: Any, with_empty: bool, exact: bool) -> Any:
    """A column as JSON values, null for empty cells; `with_empty` only for those that are null. `exact` as in `_said`."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    if pa.types.is_integer(column.type):
        return column.cast(pa.string())
    if pa.types.is_string(column.type):
        text = pc.binary_join_element_wise('"', column if with_empty else texts(column), '"', "")
        special = pc.fill_null(pc.match_substring_regex(column, r'["\\\x00-\x1f]'), False)
        if pc.any(special).as_py():
            text = pc.replace_with_mask(text, special, _quoted(column.filter(special)))
        return text
    values = [_said(value, exact) for value in column.to_pylist()]
    text_of = partial(_text_of, errors="surrogateescape" if exact else "replace")
    return pa.array([None if v is None else json.dumps(v, default=text_of) for v in values], pa.string())


def _quoted(texts: Any) -> Any:
    """Texts as JSON strings, in ASCII. Where quotes and backslashes are all there is to escape, a column at a time."""
    if pc.any(pc.match_substring_regex(texts, "[^ -~]")).as_py():
        return pa.array([encode_basestring_ascii(text) for text in texts.to_pylist()], pa.string())
    escaped = pc.replace_substring(pc.replace_substring(texts, "\\", "\\\\"), '"', '\\"')
    return pc.binary_join_element_wise('"', escaped, '"', "")


def _text_of(value: Any, errors: str) -> str:
    return value.decode("utf-8", errors) if isinstance(value, bytes) else str(value)
