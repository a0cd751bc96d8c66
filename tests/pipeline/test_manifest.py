import csv
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from longtake.datasets import captions
from longtake.datasets.errors import UserError
from longtake.pipeline import discover, manifest, tables


def rows_of(*patterns: str) -> list[dict[str, Any]]:
    return [row for batch in discover.find(patterns) for row in batch.to_pylist()]


def extras(path: Path) -> list[Any]:
    rows = [row for batch in manifest.read(str(path)) for row in batch.to_pylist()]
    return [row["extra"] and json.loads(row["extra"], parse_constant=refused) for row in rows]


def refused(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_manifest_names_sources_and_carries_its_columns(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"12345")
    rows = [
        {"uri": "a.mp4", "label": "cat", "caption": "a cat, sitting"},
        {"uri": f"{tmp_path}/gone.mp4", "label": "dog", "caption": ""},
    ]
    table, path = pa.Table.from_pylist(rows), tmp_path / f"list.{suffix}"
    if suffix in ("csv", "tsv"):
        delimiter = "," if suffix == "csv" else "\t"
        pyarrow.csv.write_csv(table, path, pyarrow.csv.WriteOptions(delimiter=delimiter))
    elif suffix == "parquet":
        pq.write_table(table, path)
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(r) + "\n" for r in rows))
    listed = rows_of(str(path))
    assert [(r["uri"], r["bytes"] or 0) for r in listed] == [(f"{tmp_path}/a.mp4", 5), (f"{tmp_path}/gone.mp4", 0)]
    # an empty caption is one, but where there is no other word for none
    last = {"label": "dog"} if suffix in ("csv", "tsv") else {"label": "dog", "caption": ""}
    assert [json.loads(r["extra"]) for r in listed] == [{"label": "cat", "caption": "a cat, sitting"}, last]


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = {
    "text": TEXT,
    "whole": st.integers(-(2**63), 2**63 - 1),
    "real": st.floats(),
    "flag": st.booleans(),
    "list": st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=3),
}


def says(row: dict[str, Any]) -> dict[str, Any] | None:
    """The cells that say something."""
    return {k: v for k, v in row.items() if plain(v) not in (None, "")} or None


@given(st.lists(st.fixed_dictionaries({name: st.none() | value for name, value in VALUES.items()}), min_size=1))
def test_every_value_of_a_manifest_comes_through(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("m") / "list.parquet"
    types = [pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.list_(pa.string())]
    named = [row | {"uri": f"s3://b/{n}", "bytes": 1} for n, row in enumerate(rows)]
    columns = [("uri", pa.string()), ("bytes", pa.int64()), *zip(VALUES, types, strict=True)]
    pq.write_table(pa.Table.from_pylist(named, schema=pa.schema(columns)), path)
    assert extras(path) == [says(row) for row in rows]


CAPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "caption": st.none() | TEXT | st.sampled_from(["👩‍👩‍👧", "two\nlines", "שלום", "\u202e", ""]),
        "captions": st.none() | st.lists(TEXT, max_size=3),
        "shots": st.none() | st.lists(st.tuples(st.floats(0, 5), st.floats(6, 9), TEXT).map(list), max_size=2),
    },
)


@given(st.lists(CAPTIONS, min_size=1, max_size=4), st.sampled_from(["json", "jsonl"]))
def test_captions_in_json_come_through(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], suffix: str
) -> None:
    path = tmp_path_factory.mktemp("m") / f"list.{suffix}"
    named = [row | {"uri": f"s3://b/{n}"} for n, row in enumerate(rows)]
    path.write_text(json.dumps(named) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in named))
    found = [row["extra"] for batch in manifest.read(str(path)) for row in batch.to_pylist()]
    for extra, row in zip(found, rows, strict=True):
        said = captions.of_annotations(extra)
        assert said == list(dict.fromkeys(captions.of_source(row)))
        assert (captions.Caption("") in said) == (row.get("caption") == "" or "" in (row.get("captions") or ()))


@pytest.mark.parametrize(
    "typed", [pa.list_(pa.string()), pa.list_(pa.struct([("text", pa.string()), ("end", pa.float64())]))]
)
def test_captions_in_parquet_come_through(tmp_path: Path, typed: Any) -> None:
    entries = ["", "🙂"] if typed.value_type == pa.string() else [{"text": "", "end": None}, {"text": "🙂", "end": 2.0}]
    table = pa.table(
        {
            "uri": ["s3://b/0", "s3://b/1", "s3://b/2"],
            "caption": pa.array(["", None, "x" * 100_000]),
            "captions": pa.array([entries, None, []], typed),
        }
    )
    pq.write_table(table, tmp_path / "list.parquet")
    said = [
        [caption.text for caption in captions.of_annotations(row["extra"])]
        for batch in manifest.read(str(tmp_path / "list.parquet"))
        for row in batch.to_pylist()
    ]
    assert said == [["", "🙂"], [], ["x" * 100_000]]


# what people write into captions, and what trips readers
PIECES = st.sampled_from([*'a,;"\t\r\n |\\é\u2028\ufeff', "\r\n", '""', "uri", "words " * 5])
CELLS = st.lists(PIECES, max_size=6).map("".join)

ROWS_1 = [("", "é"), ("", "aaaaa"), ("", "aaa\u2028\r\n"), ("aaé", "aaa\u2028\u2028")]
ROWS_2 = [("", 'aaa"\r\n\r\n'), ("", "")]
PLAIN: Any = {"quoting": csv.QUOTE_ALL, "delimiter": ",", "packed": False, "cut": False}


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    delimiter=st.sampled_from([",", "\t"]),
    start=st.sampled_from(["", "\ufeff"]),
    packed=st.booleans(),
    empty_lines=st.booleans(),
    cut=st.booleans(),
    block=st.integers(600, 700),
)
# a last row that would lie in three blocks, and a block that would end between a CR and its LF
@example(rows=ROWS_1, end="\r", start="", empty_lines=True, block=600, **PLAIN)
@example(rows=ROWS_2, end="\r\n", start="\ufeff", empty_lines=False, block=650, **PLAIN)
def test_csv_is_read_as_pythons_own_reader_does(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    end: str,
    quoting: Any,
    delimiter: str,
    start: str,
    packed: bool,
    empty_lines: bool,
    cut: bool,
    block: int,
) -> None:
    text = io.StringIO(newline="")
    # before Python 3.13 the writer leaves a CR or LF that is not its own without quotes, which RFC 4180 does not
    lone = any(set(cell) & set("\r\n") for row in rows for cell in row)
    quoting = csv.QUOTE_ALL if lone else quoting
    writer = csv.writer(text, quoting=quoting, lineterminator=end, delimiter=delimiter)
    writer.writerow(["uri", "caption", "note"])
    # copies of the rows fill several blocks, whose borders fall anywhere
    many = [(f"s3://b/{n}.mp4", *rows[n % len(rows)]) for n in range(40)]
    for row in many:
        writer.writerow(row)
        if empty_lines:
            text.write(end)
    content = text.getvalue().removesuffix(end if cut and not empty_lines else "")
    expected = list(csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter))
    path = tmp_path_factory.mktemp("m") / f"list.{'csv' if delimiter == ',' else 'tsv'}{'.gz' * packed}"
    data = (start + content).encode()
    path.write_bytes(gzip.compress(data[:50]) + gzip.compress(data[50:]) if packed else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_BLOCK_BYTES", block)
        read = [row for batch in manifest.read(str(path)) for row in batch.to_pylist()]
    assert [row["uri"] for row in read] == [row["uri"] for row in expected] == [row[0] for row in many]
    mine = [json.loads(row["extra"]) if row["extra"] else None for row in read]
    assert mine == [says({k: row[k] for k in ("caption", "note")}) for row in expected]


UNQUOTED = (
    st.lists(st.sampled_from([*'a"é |', '5" disk', '""']), max_size=6).map("".join).filter(lambda t: t[:1] != '"')
)
QUOTED = CELLS.map(lambda text: '"' + text.replace('"', '""') + '"')


@settings(deadline=None, max_examples=60)
@given(cells=st.lists(UNQUOTED | QUOTED, min_size=20, max_size=40), end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_quotes_inside_cells_without_quotes_are_read_as_pythons_own_reader_does(
    tmp_path_factory: pytest.TempPathFactory, cells: list[str], end: str
) -> None:
    path = tmp_path_factory.mktemp("m") / "list.csv"
    content = end.join(["uri,caption", *(f"s3://b/{n}.mp4,{cell}" for n, cell in enumerate(cells)), ""])
    path.write_bytes(content.encode())
    expected = list(csv.DictReader(io.StringIO(content, newline="")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_BLOCK_BYTES", 600)
        read = [row for batch in manifest.read(str(path)) for row in batch.to_pylist()]
    assert [row["uri"] for row in read] == [row["uri"] for row in expected]
    assert [row["extra"] and json.loads(row["extra"]) for row in read] == [
        {"caption": row["caption"]} if row["caption"] else None for row in expected
    ]


@pytest.mark.parametrize("more", [0, 300_000])
def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path: Path, more: int) -> None:
    (tmp_path / "l.csv").write_text('uri,caption\na.mp4,x\nb.mp4,"open\nc.mp4,y\n' + "d.mp4,some words\n" * more)
    with pytest.raises(UserError, match=r"l\.csv: .*the quote before 'open.nc\.mp4,y.*' is never closed"):
        rows_of(str(tmp_path / "l.csv"))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSONS = st.recursive(
    SCALARS, lambda some: st.lists(some, max_size=3) | st.dictionaries(TEXT, some, max_size=3), max_leaves=8
)


def plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < 2e999 else None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


ROWS_1 = [("", "é"), ("", "aaaaa"), ("", "aaa\u2028\r\n"), ("aaé", "aaa\u2028\u2028")]
ROWS_2 = [("", 'aaa"\r\n\r\n'), ("", "")]
PLAIN: Any = {"quoting": csv.QUOTE_ALL, "delimiter": ",", "packed": False, "cut": False}


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.dictionaries(TEXT, JSONS, max_size=4), min_size=1, max_size=6),
    form=st.sampled_from(["list", "pretty", "lines", "crlf"]),
    ascii_only=st.booleans(),
    start=st.sampled_from(["", "\ufeff"]),
    packed=st.booleans(),
    block=st.integers(1, 40),
)
def test_json_is_read_as_pythons_own_reader_does(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    form: str,
    ascii_only: bool,
    start: str,
    packed: bool,
    block: int,
) -> None:
    named = [row | {"uri": f"s3://b/{n}", "bytes": n} for n, row in enumerate(rows)]
    if form in ("list", "pretty"):
        text = json.dumps(named, indent=1 if form == "pretty" else None, ensure_ascii=ascii_only)
    else:
        text = ("\r\n" if form == "crlf" else "\n").join(json.dumps(row, ensure_ascii=ascii_only) for row in named)
    data = (start + text).encode()
    path = tmp_path_factory.mktemp("m") / f"list.json{'.gz' * packed}"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_BLOCK_BYTES", block)
        read = [row for batch in manifest.read(str(path)) for row in batch.to_pylist()]
    assert [(row["uri"], row["bytes"]) for row in read] == [(f"s3://b/{n}", n) for n in range(len(rows))]
    mine = [row["extra"] and json.loads(row["extra"], parse_constant=refused) for row in read]
    others = [{k: v for k, v in row.items() if k not in ("uri", "bytes", "etag")} for row in rows]
    assert mine == [says(plain(row)) for row in others]


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=200), st.sampled_from(["csv", "tsv", "json", "jsonl", "csv.gz", "json.zst", "parquet"]))
def test_whatever_a_manifest_holds_it_is_read_or_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("m") / f"list.{suffix}"
    path.write_bytes(content)
    try:
        assume(not list(manifest.read(str(path))))
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)


def test_a_long_manifest_in_many_blocks_is_read_whole(tmp_path: Path) -> None:
    rows = [{"uri": f"s3://b/{n}.mp4", "bytes": n, "caption": f"{n}\n{'x' * 300}"} for n in range(20_000)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "m.json").write_text(json.dumps(rows))
    with (tmp_path / "m.csv").open("w") as f:
        writer = csv.DictWriter(f, ["uri", "bytes", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("m.jsonl", "m.json", "m.csv"):
        read = rows_of(str(tmp_path / name))
        assert [row["bytes"] for row in read] == list(range(20_000))
        assert [json.loads(row["extra"])["caption"] for row in read] == [row["caption"] for row in rows]


def test_a_folder_of_parquet_parts_is_one_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "list.parquet"
    for number, place in enumerate(("", "label=dog/", "label=a%20cat/", "label=__HIVE_DEFAULT_PARTITION__/")):
        path = folder / f"{place}part-{number}.snappy.parquet"
        path.parent.mkdir(exist_ok=True, parents=True)
        pq.write_table(pa.table({"uri": [f"clips/{number}.mp4"], "bytes": [1]}), path)
    pq.write_table(pa.table({"uri": pa.array([], pa.string())}), folder / "part-9.parquet")
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.snappy.parquet.crc").write_bytes(b"crc")
    (folder / "_delta_log").mkdir()
    (folder / "_delta_log" / "0.json").write_text("{}")
    for name in (str(folder), f"{folder}/", f"{tmp_path}/*.parquet"):
        read = {row["uri"]: row["extra"] for row in rows_of(name)}
        assert set(read) == {f"{folder}/clips/{n}.mp4" for n in range(4)}
        assert [v and json.loads(v) for v in read.values()].count({"label": "a cat"}) == 1
        assert list(read.values()).count(None) == 2


def test_a_part_that_cannot_be_read_is_named(tmp_path: Path, shut: Callable[[Path], None]) -> None:
    for day in "12":
        (tmp_path / f"l.parquet/day={day}").mkdir(parents=True)
        pq.write_table(pa.table({"uri": [f"{day}.mp4"]}), tmp_path / f"l.parquet/day={day}/p.parquet")
    (tmp_path / "l.parquet/day=2/p.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"l\.parquet/day=2/p\.parquet: not a readable manifest"):
        rows_of(str(tmp_path / "l.parquet"))
    shut(tmp_path / "l.parquet/day=2")
    with pytest.raises(UserError, match="day=2: may not be read"):
        rows_of(str(tmp_path / "l.parquet"))


def test_a_pipe_is_no_manifest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "l.csv")
    with pytest.raises(UserError, match=r"l\.csv: not a readable manifest \(neither a file nor a folder\)"):
        rows_of(str(tmp_path / "l.csv"))


def test_what_is_not_finite_inside_a_map_is_null(tmp_path: Path) -> None:
    column = pa.array([[("k", float("nan"))]], pa.map_(pa.string(), pa.float64()))
    pq.write_table(pa.table({"uri": ["s3://b/a"], "m": column}), tmp_path / "l.parquet")
    assert extras(tmp_path / "l.parquet") == [{"m": [["k", None]]}]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["x", None]).dictionary_encode(),
        pa.array(["x", None], pa.large_string()),
        pa.array([b"x", None], pa.binary()),
    ],
)
def test_texts_of_any_arrow_type_are_texts(tmp_path: Path, column: Any) -> None:
    uris = pa.array(["s3://b/a", "s3://b/b"]).dictionary_encode()
    pq.write_table(pa.table({"uri": uris, "bytes": [1.0, 2.0], "caption": column}), tmp_path / "l.parquet")
    assert extras(tmp_path / "l.parquet") == [{"caption": "x"}, None]


_TIMED = pa.list_(pa.struct([("text", pa.string()), ("start", pa.float64())]))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"uri": "b", "shots": [[1' + "0" * 400 + ', 2, "x"]]}', "shots: entry 1: its start is 1000"),
        (
            '{"uri": "b", "captions": [{"text": "x", "start": 1e999}]}',
            "captions: entry 1: its start is inf, no seconds",
        ),
        ('{"uri": "b", "captions": [{"text": "x", "end": NaN}]}', "captions: entry 1: its end is nan, no seconds"),
        ({"captions": pa.array([[], [{"text": "x", "start": float("nan")}]], _TIMED)}, "entry 1: its start is nan"),
        ({"caption": pa.array([b"fine", b"a\xffb"])}, r"caption: 'a\udcffb' is no UTF-8"),
        ({"captions": pa.array([[], [b"a\xffb"]])}, r"caption: 'a\udcffb' is no UTF-8"),
    ],
)
def test_captions_that_json_or_utf8_cannot_hold_are_refused_with_their_row(
    tmp_path: Path, content: Any, says: str
) -> None:
    path = tmp_path / ("l.jsonl" if isinstance(content, str) else "l.parquet")
    if isinstance(content, str):
        path.write_text('{"uri": "a", "captions": NaN, "other": [NaN]}\n' + content)
    else:
        pq.write_table(pa.table({"uri": ["a", "b"]} | content), path)
    with pytest.raises(UserError) as caught:
        rows_of(str(path))
    assert "the row of b: " in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


def test_texts_of_parquet_are_utf8(tmp_path: Path) -> None:
    texts = pa.StringArray.from_buffers(1, pa.py_buffer(bytes(4) + b"\3\0\0\0"), pa.py_buffer(b"a\xffb"))
    pq.write_table(pa.table({"uri": ["a"], "caption": texts}), tmp_path / "l.parquet")
    with pytest.raises(UserError, match=r"not a readable manifest \(In column 1: Invalid: Invalid UTF8"):
        rows_of(str(tmp_path / "l.parquet"))


def test_sizes_as_pandas_writes_them(tmp_path: Path) -> None:
    (tmp_path / "c.mp4").write_bytes(b"123")
    (tmp_path / "l.csv").write_text("uri,bytes\ns3://b/a,12.0\ns3://b/b,7\nc.mp4,\n")
    (tmp_path / "l.jsonl").write_text('{"uri":"s3://b/a","bytes":12.0}\n{"uri":"s3://b/b","bytes":7}\n{"uri":"c.mp4"}')
    for name in ("l.csv", "l.jsonl"):
        assert [row["bytes"] for row in rows_of(str(tmp_path / name))] == [12, 7, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "url,label\na,b\n", "no column `uri`; there are url, label"),
        ("m.csv", "uri\n", "a manifest without rows"),
        ("m.csv", "", "a manifest without rows; manifests are .csv, .tsv, .json"),
        ("m.json", "[ ]", "a manifest without rows"),
        ("m.csv", "uri,caption,caption\na,b,c\n", "column `caption` is there twice"),
        ("m.csv", "uri,caption\na,b,c\n", "Expected 2 columns, got 3"),
        ("m.csv", "uri,caption\na,\n,c\n", "1 rows have no uri"),
        ("m.csv", "uri,bytes\na,many\n", "column `bytes`: "),
        ("m.csv", "uri,caption\na," + "x" * 1_100_000 + "\n", "has 1100015 bytes; 1048576 are allowed"),
        ("m.csv", b"uri,caption\na,\xff\xfe\n", "not a readable manifest"),
        ("m.csv", "uri\na\n".encode("utf-16"), "it is text in UTF-16; save it as UTF-8"),
        ("m.csv", "\n <!DOCTYPE html><html>", "it is HTML or XML"),
        ("m.csv", b"PK\x03\x04rest", "it is a workbook or zip"),
        ("m.tsv", b"\x01\x00\x02", "it is binary"),
        (
            "m.csv.gz",
            gzip.compress(b"uri\na\nb\n", mtime=0)[:-6],
            "not a readable manifest (Truncated compressed stream",
        ),
        ("m.parquet", "uri\na\n", "not a readable manifest (Parquet"),
        ("m.jsonl", '{"uri":"a"}\n{"uri":"b"', "line 2: "),
        ("m.jsonl", '{"uri":"a"}\n["b"]', "line 2 is no JSON object"),
        ("m.jsonl", '{"uri":"a","label":1,"label":2}', "line 1: column `label` is there twice"),
        ("m.jsonl", '{"uri":["a"]}', "line 1: its uri is no text"),
        ("m.jsonl", '{"uri":"a","x":' + "[" * 40 + "]" * 40 + "}", "line 1 is nested more than 32 deep"),
        ("m.jsonl", '{"uri":"a","x":' + "[" * 100_000 + "]" * 100_000 + "}", "line 1: "),
        ("m.jsonl", '{"uri":"a","x":' + "9" * 5000 + "}", "line 1: Exceeds the limit"),
        ("m.jsonl", '{"uri":"a","captions":"' + "[" * 100_000 + '"}', "the row of a: captions: '[[["),
        ("m.csv", "uri,shots\na," + "[" * 100_000 + "\n", "the row of a: shots: '[[["),
        ("m.jsonl", '{"uri":"a","x":"' + "y" * 1_100_000 + '"}', "line 1 has more than 1048576 characters"),
        ("m.json", '[{"uri":"a"},{"uri":"b"', "entry 2: the list breaks off"),
        ("m.json", '[{"uri":"a"},]', "entry 2: ']' where { is due"),
        ("m.json", '[{"uri":"a"}] x', "entry 2: 'x' where end is due"),
        ("m.json", '[{"uri":"a"}, 3]', "entry 2: '3' where { is due"),
        ("m.json", '{"uri": {"0": "a"}}', "line 1: its uri is no text"),
        ("list.xlsx", b"PK\x03\x04rest", "neither a video nor a manifest that is read; manifests are .csv, .tsv"),
        ("list.txt", "a.mp4\n", "neither a video nor a manifest that is read"),
    ],
)
def test_a_wrong_manifest_is_one_line(tmp_path: Path, name: str, content: Any, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "a").touch()
    with pytest.raises(UserError) as caught:
        rows_of(str(tmp_path / name))
    assert message in str(caught.value) and str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).count("sources:") == 1
