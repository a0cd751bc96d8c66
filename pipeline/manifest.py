"""Manifests: lists of sources with what is known of them, streamed in constant memory as Arrow batches.

A manifest is CSV as in RFC 4180, TSV, JSON (a list of objects, or an object a line), all in UTF-8 and perhaps
compressed, or Parquet (a file, or a folder of parts).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import captions, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown
from longtake.pipeline.tables import DELIMITERS, ROW_BYTES, read_parquet, read_text, texts

KINDS = ".csv, .tsv, .json, .jsonl or .ndjson (also .gz or .zst of these), or .parquet (a file or a folder of parts)"
_TEXTS = frozenset((*DELIMITERS, "json", "jsonl", "ndjson"))
_COMPRESSED = ("gz", "zst")
_OTHERS = """7z arrow avro bz2 doc docx feather gz htm html ods orc pdf rar tar tgz txt xls xlsx xml xz yaml yml zip
zst"""
_OTHER_LISTS = frozenset(_OTHERS.split())
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
# rows that may have captions which are none: of another form than a plain text, or with a half of a pair of surrogates
_CAPTIONS = r'"(captions|shots)": |"caption": [^"]|\\ud[89a-f]'
_ADDRESS = re.compile(r"https?://[^?#]*", re.IGNORECASE)

# A source as it is listed, before it is read. `etag`: the store's own content tag, where it has one.
LISTING = pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("etag", pa.string()), ("extra", pa.string())])


def is_manifest(name: str) -> bool:
    return _kind(name) in {*_TEXTS, "parquet"}


def is_other_list(name: str) -> bool:
    """Whether a name is that of a list, document or archive that is not read, and of no video."""
    return suffix(name) in _OTHER_LISTS and not is_manifest(name)


def suffix(name: str) -> str:
    stem, dot, ending = _without_query(name).rsplit("/", 1)[-1].rpartition(".")
    return ending.lower() if dot and stem else ""


def _without_query(name: str) -> str:
    """A name without the query of its address, which may be a signature."""
    address = _ADDRESS.match(name)
    return address[0] if address else name


def _kind(name: str) -> str:
    """The suffix; for a compressed text, the suffix of the text."""
    name = _without_query(name).rstrip("/")
    ending = suffix(name)
    inner = suffix(name[: -len(ending) - 1]) if ending in _COMPRESSED else ""
    return inner if inner in _TEXTS else ending


def read(url: str) -> Iterator[pa.RecordBatch]:
    """The rows of a manifest as batches of LISTING, `bytes` null where the manifest has none.

    `extra` has the row's other columns (see annotations.py). A relative URI counts from the folder of the manifest, or
    from the manifest where that is a folder.

    Raises:
        UserError: it is missing, empty, of another kind, not readable, or has no column `uri`.
        Failure: its store does not give it whole.
    """
    fs, path = storage.filesystem(url.rstrip("/"))
    kind, count, part = _kind(url), 0, url
    try:
        for file, constants in _files(fs, path, url):
            base = url if file == path else f"{url.rstrip('/')}/"
            part = url if file == path else base + file.removeprefix(path).lstrip("/")
            open_file = partial(storage.retrying, part, partial(fs.open, file, "rb"))
            rows = read_parquet(open_file, constants) if kind == "parquet" else read_text(open_file, kind)
            for batch, extra in rows:
                count += len(batch)
                yield _listing(batch, extra, part, base)
    except FileNotFoundError as e:
        raise UserError(f"sources: {part}: no such manifest") from e
    except PermissionError as e:
        raise UserError(f"sources: {e.filename or part}: may not be read ({e.strerror or e})") from e
    except (UserError, Failure):
        raise
    except Exception as e:
        if storage.of_network(e):
            raise Failure(f"{part}: did not come whole ({e}); run the same command again") from e
        if not isinstance(e, pa.ArrowException | OSError | ValueError | OverflowError):
            raise
        message = shown(" ".join(str(e).split()))
        raise UserError(f"sources: {part}: not a readable manifest ({message[:300]}); manifests are {KINDS}") from e
    if not count:
        raise UserError(f"sources: {url}: a manifest without rows; manifests are {KINDS}, with a column `uri`")


def parts(url: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The names of the files of a manifest, and what opens each. Raises OSError, ValueError, UserError, Failure."""
    fs, path = storage.filesystem(url.rstrip("/"))
    for file, _ in _files(fs, path, url):
        yield file, partial(storage.retrying, url, partial(fs.open, file, "rb"))


def _files(fs: Any, path: str, url: str) -> Iterator[tuple[str, Mapping[str, str | None]]]:
    """The files of a manifest, and the columns that folders named `column=value` give to their rows."""
    may_be_folder = storage.is_local(url) or _kind(url) == "parquet"
    type_ = storage.retrying(url, partial(fs.info, path))["type"] if may_be_folder else "file"
    if type_ not in ("file", "directory"):
        raise ValueError("neither a file nor a folder")
    if type_ == "file" or _kind(url) != "parquet":
        yield path, {}
        return
    for file in sorted(_below(fs, path, url)):
        *folders, name = file.removeprefix(path).strip("/").split("/")
        # writers leave their notes beside the parts
        if not any(part.startswith(("_", ".")) and "=" not in part for part in (*folders, name)):
            pairs = (folder.partition("=") for folder in folders if "=" in folder)
            yield file, {unquote(key): None if value == _NO_VALUE else unquote(value) for key, _, value in pairs}


def _below(fs: Any, folder: str, url: str) -> Iterator[str]:
    """All files below a folder. `fs.find` and `fs.walk` would skip folders that may not be listed."""
    for entry in storage.retrying(url, partial(fs.ls, folder, detail=True)):
        if entry["type"] != "directory":
            yield entry["name"]
        elif entry["name"].rstrip("/") != folder.rstrip("/"):
            yield from _below(fs, entry["name"], url)


def _listing(batch: pa.RecordBatch, extra: Any, url: str, base: str) -> pa.RecordBatch:
    """A batch of LISTING from a batch of rows and their `extra`. Raises UserError, ValueError: a row is not allowed."""
    names = batch.schema.names
    if "uri" not in names:
        present = ", ".join(name[:40] for name in names[:10])
        raise UserError(f"sources: {url}: no column `uri`; there are {present}")
    uris = texts(batch["uri"])
    if uris.null_count:
        raise UserError(f"sources: {url}: {uris.null_count} rows have no uri")
    if (longest := pc.max(pc.binary_length(extra)).as_py() or 0) > ROW_BYTES:
        uri = uris[pc.index(pc.binary_length(extra), longest).as_py()]
        raise ValueError(f"the row of {str(uri)[:200]} has {longest} bytes; {ROW_BYTES} are allowed")
    _check_captions(uris, extra)
    columns = {
        "uri": _resolved(uris, base),
        "bytes": _sizes(batch["bytes"]) if "bytes" in names else pa.nulls(len(batch), pa.int64()),
        "etag": texts(batch["etag"]) if "etag" in names else pa.nulls(len(batch), pa.string()),
        "extra": extra,
    }
    return pa.RecordBatch.from_pydict(columns, schema=LISTING)


def _check_captions(uris: Any, extra: Any) -> None:
    """Raise ValueError for the first row whose captions are none, by its uri."""
    suspects = pc.fill_null(pc.match_substring_regex(extra, _CAPTIONS), False)
    if not pc.any(suspects).as_py():
        return
    for uri, text in zip(uris.filter(suspects).to_pylist(), extra.filter(suspects).to_pylist(), strict=True):
        try:
            captions.of_annotations(text)
        except ValueError as e:
            raise ValueError(f"the row of {str(uri)[:200]}: {e}") from e


def _sizes(column: Any) -> Any:
    """A column as int64, null for empty, infinite and negative cells: pandas writes 12.0 where a column has empty cells."""
    if not pa.types.is_integer(column.type):
        try:
            numbers = (column if pa.types.is_floating(column.type) else texts(column)).cast(pa.float64())
            column = pc.if_else(pc.is_finite(numbers), numbers, None)
        except pa.ArrowInvalid as e:
            raise ValueError(f"column `bytes`: {e}") from e
    sizes = column.cast(pa.int64())
    return pc.if_else(pc.less(sizes, 0), None, sizes)


def _resolved(uris: Any, base: str) -> Any:
    """URIs where relative ones count from `base` up to its last slash; a local file has one name, however it is written."""
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
    names = [_local_name(uri, folder) for uri in uris.filter(odd).to_pylist()]
    return pc.replace_with_mask(uris, odd, pa.array(names, pa.string()))


def _local_name(uri: str, folder: str) -> str:
    """The one name of a local file; any other URI as it is."""
    if not storage.is_local(uri):
        return uri
    return storage.named(storage.filesystem(uri)[1] if uri.startswith("/") or ":/" in uri else folder + uri)
