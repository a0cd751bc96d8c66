"""What the server says of a dataset: rows, filters, orders, histograms, clips by range, stills, likeness."""

import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import browsed
import numpy as np
import pyarrow as pa
import pytest
import scored
import vectored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image
from starlette.testclient import TestClient

from longtake.datasets import alike, clip, compact, images, index, score_columns, scores, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.scores import Column, Field
from longtake.infra import runs
from longtake.infra.browse import columns as shown_columns
from longtake.infra.browse import library, likeness, media
from longtake.infra.browse.query import _matches
from longtake.pipeline import column as columns
from longtake.pipeline.stages import cluster

KEPT_QUERIES = 32


def asked(client, **question):
    """All rows that a question is answered with."""
    answer = client.post("/api/query", json=question)
    assert answer.status_code == 200, answer.json()
    name, total = answer.json()["query"], answer.json()["total"]
    pages = [client.get("/api/rows", params={"query": name, "from": n, "count": 200}) for n in range(0, total, 200)]
    rows = [row for page in pages for row in page.json()["rows"]]
    assert len(rows) == total
    return rows


@pytest.fixture(scope="module")
def everything(books):
    """All rows, as the server shows them."""
    return asked(browsed.client_of(books))


def value(row, field):
    return {**row["values"], **row}.get(field) if field != "caption" else row["caption"]


def test_a_dataset_is_described(client, books):
    about = client.get("/api/dataset").json()
    fields = {field["name"]: field for field in about["fields"]}
    assert (about["clips"], about["splits"]) == (600, {"train": 540, "val": 60})
    assert {"motion", "seconds", "label", "source", "caption", "flow.camera", "flow.move"} <= set(fields)
    assert fields["label"]["missing"] == 150
    assert {each["value"] for each in fields["flow.move"]["labels"]} == {"red", "green", "blue"}
    assert about["alike"] == ["clip.vector"]
    assert not about["text"] and not about["writable"]
    calm = next(view for view in about["views"] if view["name"] == "calm")
    assert calm["kept"] + sum(reason["count"] for reason in calm["reasons"]) == 600


def test_rows_are_in_the_order_of_the_shards_with_what_the_index_says(small, everything):
    clips = pa.concat_tables([compact.table(small, split) for split in ("train", "val")])
    assert [row["key"] for row in everything] == clips["key"].to_pylist()
    assert [row["values"]["still"] for row in everything] == pytest.approx(clips["still"].to_pylist())
    table = pa.concat_tables(
        [score_columns.table(small, split, {"flow": score_columns.columns_of(small)[1]}) for split in ("train", "val")]
    )
    assert [row["values"]["flow.move"] for row in everything] == table["flow.move"].to_pylist()


bounds = st.integers(-2, 12).map(lambda n: n / 10)
conditions = st.one_of(
    st.builds(
        lambda field, low, high, missing: {"field": field, "min": low, "max": high} | ({"missing": missing} if missing else {}),
        st.sampled_from(["motion", "still", "flow.camera"]),
        st.none() | bounds,
        st.none() | bounds,
        st.sampled_from([None, "keep", "drop", "only"]),
    ),
    st.builds(
        lambda pair, some, none, missing: {"field": pair[0], "any": some and [some], "none": [none]} | ({"missing": missing} if missing else {}),
        st.sampled_from([("label", browsed.LABELS), ("flow.move", ("red", "green"))]),
        st.sampled_from([None, "surfing", "red"]),
        st.sampled_from(["archery", "blue"]),
        st.sampled_from([None, "keep", "drop", "only"]),
    ),
    st.builds(lambda words: {"field": "caption", "has": words}, st.sampled_from(["RED", "a green", "number 1", "[", "<Script>"])),
    st.builds(lambda view, keep: {"view": view, "keep": keep}, st.sampled_from(["calm", "sharp"]), st.booleans()),
    st.builds(lambda side: {"compare": ["calm", "sharp"], "side": side}, st.sampled_from(["both", "one", "other", "neither"])),
)  # fmt: skip


def holds(row, where):
    """Whether a condition holds, by its definition."""
    if "view" in where:
        return (row["reasons"][where["view"]] is None) == where["keep"]
    if "compare" in where:
        one, other = (row["reasons"][view] is None for view in where["compare"])
        return where["side"] == ("both" if one and other else "one" if one else "other" if other else "neither")
    there = value(row, where["field"])
    if "has" in where:
        return there is not None and where["has"].lower() in there.lower()
    if there is None:
        return where.get("missing", "drop" if where.get("any") else "keep") != "drop"
    if where.get("missing") == "only":
        return False
    if "any" in where:
        return (where["any"] is None or there in where["any"]) and there not in where["none"]
    return (where["min"] is None or there >= where["min"]) and (where["max"] is None or there <= where["max"])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.lists(conditions, max_size=3),
    sort=st.none() | st.fixed_dictionaries({"field": st.sampled_from(["motion", "label", "source", "caption"]), "descending": st.booleans()}),
)  # fmt: skip
def test_a_query_is_answered_with_the_clips_for_which_it_holds_in_order(client, everything, where, sort):
    expected = [row for row in everything if all(holds(row, each) for each in where)]
    if sort:
        there = [row for row in expected if value(row, sort["field"]) is not None]
        there = sorted(there, key=lambda row: value(row, sort["field"]), reverse=sort["descending"])
        rest = [row for row in expected if value(row, sort["field"]) is None]
        expected = there + rest
    assert [row["key"] for row in asked(client, where=where, sort=sort)] == [row["key"] for row in expected]


def test_bounds_are_inclusive_also_of_values_that_are_no_short_decimals(client, everything):
    one = everything[4]
    edge = one["values"]["motion"]
    assert [row["key"] for row in asked(client, where=[{"field": "motion", "min": edge, "max": edge}])] == [one["key"]]
    assert not asked(client, where=[{"field": "motion", "min": np.nextafter(edge, 1), "max": np.nextafter(edge, 1)}])


def test_texts_are_matched_by_expressions_too(client, everything):
    where = [{"field": "caption", "has": "number [0-9]*7$", "regex": True}]
    expected = [row["key"] for row in everything if row["caption"] and row["caption"].endswith("7")]
    assert [row["key"] for row in asked(client, where=where)] == expected
    assert {row["source"] for row in asked(client, where=[{"field": "source", "has": "<script>"}])} == {
        f"/footage/{browsed.HOSTILE}.mp4"
    }


def test_a_reason_of_a_view_is_a_filter(client, everything):
    where = [{"view": "sharp", "keep": False, "reason": "sharpness < 0.3"}]
    expected = [row["key"] for row in everything if row["reasons"]["sharp"] == "sharpness < 0.3"]
    assert [row["key"] for row in asked(client, where=where)] == expected


def test_a_caption_that_is_a_script_stays_a_text_of_json(client, everything):
    hostile = next(row for row in everything if row["caption"] == browsed.HOSTILE)
    answer = client.get("/api/clip", params={"key": hostile["key"]})
    assert answer.headers["content-type"] == "application/json"
    (texts,) = answer.json()["captions"].values()
    assert texts[0]["text"] == browsed.HOSTILE


@pytest.mark.parametrize("field", ["motion", "still", "flow.camera", "seconds"])
def test_a_histogram_counts_all_and_the_chosen(client, everything, field):
    where = [{"field": "motion", "max": 0.4}]
    name = client.post("/api/query", json={"where": where}).json()["query"]
    found = client.get("/api/histogram", params={"query": name, "field": field, "bins": 20}).json()
    values = {key: value(row, field) for key, row in ((row["key"], row) for row in everything)}
    chosen = [values[row["key"]] for row in asked(client, where=where)]
    there = [v for v in values.values() if v is not None]
    assert sum(found["all"]) + found["missing"] == 600
    assert sum(found["chosen"]) + found["missing_chosen"] == len(chosen)
    assert found["missing"] == 600 - len(there)
    assert found["edges"][0] == min(there)
    counts = np.histogram(there, found["edges"])[0]
    assert np.abs(counts - found["all"]).sum() <= 4  # values on an edge may round to either side
    assert all(c <= a for c, a in zip(found["chosen"], found["all"], strict=True))


def test_a_histogram_of_labels_counts_each(client, everything):
    name = client.post("/api/query", json={}).json()["query"]
    found = client.get("/api/histogram", params={"query": name, "field": "label"}).json()
    assert {each["value"]: each["chosen"] for each in found["labels"]} == {
        "archery": 150,
        "juggling": 150,
        "surfing": 150,
    }
    assert found["missing"] == 150


# Clips and stills.


@pytest.fixture(scope="module")
def mp4(small, everything):
    """The key and the bytes of a clip."""
    row = compact.table(small, "train").slice(3, 1).to_pylist()[0]
    return row["key"], storage.read_range(f"{small}/train/{row['shard']}.tar", row["mp4_offset"], row["mp4_size"])


def test_a_clip_is_the_member_of_its_tar(client, mp4, small):
    key, data = mp4
    answer = client.get(f"/clip/{key}.mp4")
    assert (answer.status_code, answer.content) == (200, data)
    assert (answer.headers["content-type"], answer.headers["accept-ranges"]) == ("video/mp4", "bytes")
    with tarfile.open(f"{small}/train/00000.tar") as file:
        assert data in {file.extractfile(name).read() for name in file.getnames()}
    assert clip.decode(answer.content).shape[0] == 24


@given(first=st.integers(0, 4000), length=st.integers(0, 4000), kind=st.sampled_from(["both", "open", "suffix"]))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_range_is_its_bytes(client, mp4, first, length, kind):
    key, data = mp4
    text = {"both": f"{first}-{first + length}", "open": f"{first}-", "suffix": f"-{length}"}[kind]
    expected = {
        "both": data[first : first + length + 1],
        "open": data[first:],
        "suffix": data[max(0, len(data) - length) :],
    }[kind]
    if kind == "suffix" and not length:
        expected = b""
    answer = client.get(f"/clip/{key}.mp4", headers={"Range": f"bytes={text}"})
    if not expected:
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(data)}")
    else:
        assert (answer.status_code, answer.content) == (206, expected)
        start = data.index(expected) if kind != "suffix" else len(data) - len(expected)
        assert answer.headers["content-range"].startswith(f"bytes {first if kind != 'suffix' else start}-")
        assert answer.headers["content-length"] == str(len(expected))


@pytest.mark.parametrize(
    "text", ["bytes=0-1,5-6", "bytes=5-2", "items=0-1", "bytes=-", "bytes=a-b", "bytes=" + "9" * 40 + "-", "x" * 5000]
)
def test_other_ranges_are_ignored(client, mp4, text):
    answer = client.get(f"/clip/{mp4[0]}.mp4", headers={"Range": text})
    assert (answer.status_code, answer.content) == (200, mp4[1])


def test_a_still_is_the_middle_frame(client, mp4):
    answer = client.get(f"/still/{mp4[0]}.jpg", params={"w": 320})
    assert answer.headers["content-type"] == "image/jpeg"
    picture = np.asarray(Image.open(io.BytesIO(answer.content)), float)
    frame = clip.decode(mp4[1], [12])[0]
    assert picture.shape == frame.shape  # never wider than the clip
    assert np.abs(picture - frame).mean() < 6


def test_stills_that_are_kept_have_a_bound(small, books, monkeypatch):
    monkeypatch.setattr(media, "_STILLS_BYTES", 3000)
    stills = media.Stills()
    for row in range(12):
        stills.of(small, "train", books.place(row), 24, 64)
    assert 0 < stills._bytes <= 3000
    assert stills._bytes == sum(map(len, stills._kept.values()))


def test_damage_is_one_line_and_the_rest_goes_on(tmp_path):
    dataset = browsed.make_dataset(tmp_path / "clips", 40)
    (tmp_path / "clips/val/00000.tar").unlink()
    tar = tmp_path / "clips/train/00000.tar"
    books = library.load(dataset)
    client = browsed.client_of(books)
    tar.write_bytes(tar.read_bytes()[: books.place(1)["mp4_offset"] + 100])
    first, cut, gone = (books.places["key"][row].as_py() for row in (0, 1, 39))
    assert client.get(f"/clip/{first}.mp4").status_code == 200
    for key, word in ((cut, "damaged"), (gone, "missing")):
        for path in (f"/clip/{key}.mp4", f"/still/{key}.jpg"):
            answer = client.get(path)
            assert answer.status_code == 502
            assert word in answer.json()["error"] and "dataset verify" in answer.json()["error"]
    tar.unlink()
    tar.mkdir()
    answer = client.get(f"/clip/{first}.mp4")
    assert answer.status_code == 502 and "cannot be read (Is a directory)" in answer.json()["error"]


def test_a_mistake_of_the_server_is_one_line_of_json(small, books, monkeypatch):
    monkeypatch.setattr(media, "pieces", lambda *_: 1 / 0)
    served = TestClient(browsed.client_of(books).app, f"http://127.0.0.1:{browsed.PORT}", raise_server_exceptions=False)
    served.cookies.set(f"longtake-{browsed.PORT}", browsed.TOKEN)
    answer = served.get(f"/clip/{books.places['key'][0].as_py()}.mp4")
    assert answer.status_code == 500 and "the server failed" in answer.json()["error"]


def test_a_dataset_at_any_url_is_served():
    dataset = browsed.make_dataset("memory://browsed/clips", 30)
    client = browsed.client_of(library.load(dataset))
    key = asked(client)[3]["key"]
    whole = client.get(f"/clip/{key}.mp4").content
    assert clip.decode(whole).shape[0] == 24
    assert client.get(f"/clip/{key}.mp4", headers={"Range": "bytes=7-70"}).content == whole[7:71]
    assert client.get(f"/still/{key}.jpg").status_code == 200


def test_a_dataset_of_images_is_served(tmp_path):
    sink = io.BytesIO()
    Image.new("RGB", (90, 60), (200, 30, 30)).save(sink, "JPEG")
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train/a.tar", "w") as file:
        entry = tarfile.TarInfo("one.jpg")
        entry.size = len(sink.getvalue())
        file.addfile(entry, io.BytesIO(sink.getvalue()))
    images.adopt(str(tmp_path), (), 0, 1)
    client = browsed.client_of(library.load(str(tmp_path)))
    (row,) = asked(client)
    answer = client.get(f"/clip/{row['key']}.mp4")
    assert (answer.content, answer.headers["content-type"]) == (sink.getvalue(), "image/jpeg")
    assert Image.open(io.BytesIO(client.get(f"/still/{row['key']}.jpg?w=64").content)).size == (64, 43)


# Limits, and what is not there.


@pytest.mark.parametrize(
    ("question", "line"),
    [
        ({"where": [{"field": "moton", "min": 0}]}, "did you mean motion"),
        ({"where": [{"view": "clam"}]}, "did you mean calm"),
        ({"where": [{"field": "motion", "any": ["a"]}]}, "is a number"),
        ({"where": [{"field": "label", "min": 0}]}, "is a label"),
        ({"where": [{"field": "motion", "has": "a"}]}, "is a number"),
        ({"where": [{"field": "motion", "min": "a"}]}, "where.0.min"),
        ({"where": [{}]}, "names a field"),
        ({"where": [{"field": "caption", "has": "a", "min": 0}]}, "where.0: has min beside has"),
        ({"where": [{"field": "label", "has": "a", "none": ["b"]}]}, "none beside has"),
        ({"where": [{"field": "motion", "min": 0, "regex": True}]}, "regex beside field"),
        ({"where": [{"view": "calm", "max": 1}]}, "max beside view"),
        ({"where": [{"compare": ["calm", "calm"], "keep": False}]}, "keep beside compare"),
        ({"where": [{"field": "caption", "has": "(", "regex": True}]}, "RE2"),
        ({"where": [{"field": "caption", "has": "(a{1000}){1000}", "regex": True}]}, "RE2"),
        ({"where": [{"field": "caption", "has": "a" * 1001}]}, "where.0.has"),
        ({"where": [{"field": "motion", "min": 0}] * 65}, "where"),
        ({"where": [{"field": "label", "any": ["a"] * 1001}]}, "where.0.any"),
        ({"sort": {"field": "source.code"}}, "no such field"),
        ({"alike": {"key": "a", "column": "clip.vector"}}, "no such clip"),
        ({"text": {"words": "a dog"}}, "no column of an encoder that reads texts"),
        ({"text": {"words": "a"}, "alike": {"key": "a", "column": "b"}}, "ask for one"),
        ({"order": 1}, "order"),
    ],
)
def test_what_cannot_be_asked_is_one_line(client, question, line):
    answer = client.post("/api/query", json=question)
    assert answer.status_code == 400 and "Value error" not in answer.json()["error"]
    assert line in answer.json()["error"] and "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    "parameters", [{"count": 201}, {"count": 0}, {"from": -1}, {"from": "a"}, {"from": "9" * 30}, {"from": "²"}]
)
def test_rows_have_limits(client, parameters):
    name = client.post("/api/query", json={}).json()["query"]
    assert client.get("/api/rows", params={"query": name} | parameters).status_code == 400
    assert client.get("/api/rows", params={"query": name, "from": 10**8}).json() == {"rows": []}


def test_an_expression_takes_time_in_proportion_to_the_text():
    # one that tries every way would not end
    texts = pa.array(["a" * 30_000 + "b"])
    books = library.Text("", np.zeros(1, np.int64), texts)
    assert not _matches(books.texts, "^(a+)+$", True, "caption").any()


def test_old_answers_are_forgotten(client):
    first = client.post("/api/query", json={}).json()["query"]
    for n in range(KEPT_QUERIES):
        client.post("/api/query", json={"where": [{"field": "motion", "min": n / 100}]})
    answer = client.get("/api/rows", params={"query": first})
    assert (answer.status_code, "ask it again" in answer.json()["error"]) == (404, True)
    assert client.post("/api/query", json={}).json()["query"] == first


def test_clips_that_are_not_there_are_one_line(client):
    for path in ("/clip/nobody.mp4", "/still/nobody.jpg", "/api/clip?key=nobody"):
        assert (client.get(path).status_code, client.get(path).json()) == (404, {"error": "nobody: no such clip"})


def test_what_cannot_be_opened_is_one_line(tmp_path, small):
    for call in (
        lambda: library.load(str(tmp_path)),
        lambda: library.load(__file__),
        lambda: library.load(small, ["nobody"]),
        lambda: library.load(small, None, [str(tmp_path)]),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value)


# Likeness.


def test_clips_alike_are_those_of_the_exact_search(client, small, everything):
    column = next(name for name in score_columns.columns_of(small) if name.startswith("score-clip-"))
    key = everything[5]["key"]
    _, vector = alike.vector_of(small, column, "vector", key)
    expected = alike.exact(small, column, "vector", vector, 20)
    rows = asked(client, alike={"key": key, "column": "clip.vector"})
    assert rows[0]["key"] == key and len(rows) == 600
    assert [row["key"] for row in rows[:20]] == [everything[n]["key"] for n in expected.rows]
    assert [row["likeness"] for row in rows[:20]] == pytest.approx(expected.cosines.tolist(), abs=2e-3)
    calm = asked(client, alike={"key": key, "column": "clip.vector"}, where=[{"view": "calm"}])
    assert [row["key"] for row in calm] == [row["key"] for row in rows if row["reasons"]["calm"] is None]


def test_columns_too_large_for_memory_are_searched_on_disk(client, books, everything, monkeypatch):
    question = {"alike": {"key": everything[5]["key"], "column": "clip.vector"}}
    in_memory = asked(client, **question)
    monkeypatch.setattr(likeness, "_MOST_BYTES", 0)
    monkeypatch.setattr(likeness, "_FOUND", 50)
    on_disk = asked(browsed.client_of(books), **question)
    assert [row["key"] for row in on_disk] == [row["key"] for row in in_memory[:50]]


@pytest.mark.slow
def test_a_text_finds_the_clips_whose_vectors_are_like_it(tmp_path):
    import tiny_pictures

    from longtake.datasets import dual
    from longtake.pipeline.scorers import embedding

    dataset = browsed.make_dataset(tmp_path / "clips", 60)
    model = tiny_pictures.folder("clip", tmp_path / "model")
    config = embedding.Config(model=model)
    digest, width = embedding.SCORER.digest(config), len(dual.encode_text(model, "a dog"))
    column = Column("score-eyes-0123456789abcdef", "embedding", config.model_dump(mode="json"), digest,
                    (Field("vector", "vector", "made up", width=width),))  # fmt: skip
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for shard in index.read_shards(dataset, split):
            vectors = [{"vector": random.standard_normal(width)} for _ in range(len(shard.table))]
            if split == "val":
                vectors[2] = {"vector": dual.encode_text(model, "a dog runs")}
            scores.write_shard(dataset, shard, column, vectors)
    client = browsed.client_of(library.load(dataset))
    assert client.get("/api/dataset").json()["text"]
    rows = asked(client, text={"words": "a dog runs"})
    assert rows[0]["key"] == compact.table(dataset, "val")["key"][2].as_py()
    assert rows[0]["likeness"] == pytest.approx(1, abs=2e-3)
    # elsewhere it is used where it is named
    moved = shutil.move(model, tmp_path / "moved")
    assert "\n" not in client.post("/api/query", json={"text": {"words": "a cat"}}).json()["error"]
    books = library.load(dataset)
    assert not books.shown.readers
    books = replace(books, shown=shown_columns.with_encoder(books.shown, str(moved)))
    assert asked(browsed.client_of(books), text={"words": "a dog runs"})[0]["key"] == rows[0]["key"]
    with pytest.raises(UserError, match=r"^--encoder: .*other files than those that made it"):
        shown_columns.with_encoder(books.shown, tiny_pictures.folder("clip", tmp_path / "other", seed=1))


def test_columns_are_named_as_their_records_name_them(tmp_path):
    dataset = browsed.make_dataset(tmp_path / "shards/0123456789abcdef", 40)
    one = scored.write_columns(dataset, {"flow": {"camera": "number"}})
    other = scored.write_columns(dataset, {"flow": {"camera": "number"}}, seed=1)
    scored.write_record(str(tmp_path / "scores/0123456789abcdef"), dataset, {"movement": one["flow"]})
    assert "movement.camera" in library.load(dataset).fields
    books = library.load(dataset, None, [str(tmp_path / "scores/0123456789abcdef")])
    assert "movement.camera" in books.fields and "flow.camera" not in books.fields
    scored.write_record(str(tmp_path / "scores/1123456789abcdef-01234567"), dataset, {"movement": other["flow"]})
    (note,) = library.load(dataset).shown.notes
    assert "movement: shows" in note


def test_views_are_named_by_the_stage_and_the_recipe_that_made_them(tmp_path, with_store):
    dataset = browsed.make_dataset(tmp_path / "shards/0123456789ab", 40)
    folder = Path(dataset, "views")
    digests = [f"{number}123456789ab" for number in range(4)]
    for digest in digests:
        shutil.copy(folder / "calm.parquet", folder / f"{digest}.parquet")
    assert set(library.load(dataset).views) == {"calm", "sharp", *digests}
    with_store(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    store = runs.Runs(client, client.create_experiment("mine"), "", "")
    for stage, digest in (("few", digests[0]), ("other", digests[1]), ("other", digests[2])):
        run = client.create_run(store.experiment, tags={"longtake.stage": stage}).info.run_id
        store.finish(run, {"uri": f"/there/before/shards/0123456789ab/views/{digest}.parquet"})
    books = library.load(dataset)
    others = {f"other of mine, {digests[1]}", f"other of mine, {digests[2]}"}
    assert set(books.views) == {"calm", "sharp", "few of mine", digests[3]} | others
    kept = asked(browsed.client_of(books), where=[{"view": "few of mine"}])
    assert kept == asked(browsed.client_of(books), where=[{"view": "calm"}])
    assert set(library.load(dataset, [digests[0]]).views) == {"few of mine"}
    # a file that is called so is another view
    shutil.copy(folder / "sharp.parquet", folder / "few of mine.parquet")
    both = {"few of mine", f"few of mine, {digests[0]}"}
    assert set(library.load(dataset).views) == {"calm", "sharp", digests[3]} | both | others


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("scored_too", [True, False])
def test_a_library_is_not_disturbed_when_the_dataset_grows(tmp_path, monkeypatch, in_memory, scored_too):
    monkeypatch.setattr(likeness, "_MOST_BYTES", likeness._MOST_BYTES if in_memory else 0)
    dataset = browsed.make_dataset(tmp_path / "clips", 40)
    scored.write_columns(dataset, {"clip": {"vector": 8}})
    client, late = (browsed.client_of(library.load(dataset)) for _ in range(2))
    question = {"alike": {"key": asked(client)[0]["key"], "column": "clip.vector"}}
    before = asked(client, **question)
    browsed.grow(dataset)
    if scored_too:
        scored.write_columns(dataset, {"clip": {"vector": 8}})
    assert len(asked(client)) == 40
    assert client.get(f"/clip/{asked(client)[0]['key']}.mp4").status_code == 200
    # vectors that were read before are of these clips; to read others would shift them
    assert asked(client, **question) == before
    answer = late.post("/api/query", json=question)
    assert (answer.status_code, "start `longtake browse` again" in answer.json()["error"]) == (502, True)


def test_clusters_of_fewer_clips_are_not_searched(tmp_path, monkeypatch):
    """Their rows name other clips since train has grown."""
    monkeypatch.setattr(likeness, "_MOST_BYTES", 0)
    monkeypatch.setattr(columns, "make", vectored.make_here)  # without Ray
    dataset = browsed.make_dataset(tmp_path / "shards/0123456789abcdef", 40)
    column = scored.write_columns(dataset, {"clip": {"vector": 8}})["clip"]
    uri = str(tmp_path / "scores/0123456789abcdef")
    scored.write_record(uri, dataset, {"clip": column})
    inputs, out = {"dataset": dataset, "scores": uri}, str(tmp_path / "clusters/0123456789abcdef")
    config = cluster.Config.model_validate({"kind": "cluster", **inputs, "embedding": "clip.vector"})
    cluster.run(config, inputs, out)
    browsed.grow(dataset)
    scored.write_columns(dataset, {"clip": {"vector": 8}})
    client = browsed.client_of(library.load(dataset))
    key = asked(client)[-1]["key"]  # of val
    expected = alike.exact(dataset, column, "vector", alike.vector_of(dataset, column, "vector", key)[1], 1000)
    keys = [key for _, key in alike.keys(dataset, expected.rows)]
    assert [row["key"] for row in asked(client, alike={"key": key, "column": "clip.vector"})] == keys


def test_columns_that_are_gone_are_left_out_unless_their_record_is_named(tmp_path):
    dataset = browsed.make_dataset(tmp_path / "shards/0123456789abcdef", 40)
    one = scored.write_columns(dataset, {"flow": {"camera": "number"}})["flow"]
    other = scored.write_columns(dataset, {"flow": {"camera": "number"}}, seed=1)["flow"]
    old, new = (str(tmp_path / f"scores/{n}123456789abcdef") for n in range(2))
    scored.write_record(old, dataset, {"flow": one})
    browsed.grow(dataset)
    scored.write_columns(dataset, {"flow": {"camera": "number"}}, seed=1)
    scored.write_record(new, dataset, {"flow": other})
    # of two the one that was written for the shards of now
    shown = library.load(dataset).shown
    assert (shown.columns["flow"].column, shown.record_of(["flow"])) == (other, new)
    assert library.load(dataset, None, [old]).shown.columns["flow"].column == one
    for path in Path(dataset).glob(f"*/*.{one}.parquet"):
        path.unlink()
    shown = library.load(dataset).shown
    assert (shown.columns["flow"].column, shown.notes) == (other, ())
    for path in Path(dataset).glob(f"*/*.{other}.parquet"):
        path.unlink()
    assert not library.load(dataset).shown.columns
    with pytest.raises(Failure, match="is gone; run its stage again"):
        library.load(dataset, None, [old])
