"""Token states beside the shards: what is in them, what is encoded and what is copied. No Ray but in the slow tests."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spoken
import tiny_encoders
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spoken import COLUMN, TEXT, Counting, describe

import longtake
from longtake.datasets import compact, index, schema, storage
from longtake.datasets.captions import Caption, sha_of
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.text import TextConfig, read_text
from longtake.datasets.verify import verify
from longtake.infra import graph, recipe
from longtake.pipeline import shared_text, text
from longtake.pipeline.column import by_shard
from longtake.pipeline.stages import cache_text

pytestmark = pytest.mark.usefixtures("one_thread")

Hashes = Callable[[object], dict[str, str]]


@pytest.fixture
def root(dataset: str, tmp_path: Path) -> str:
    """A copy of the small dataset."""
    return str(shutil.copytree(dataset, tmp_path / "dataset"))


def told(root: str) -> dict[str, list[Caption]]:
    """Captions of all sorts: the same for all, of its own, of a part, empty, twice, none."""
    kinds: list[Callable[[str], list[Caption]]] = [
        lambda key: [Caption("the same for all"), Caption(f"only {key}")],
        lambda key: [Caption("the same for all", 0.0, 0.5), Caption("the same for all", 0.5, None, "en", "shots")],
        lambda key: [],
        lambda key: [Caption(""), Caption(f"a text of {key} that is longer than the encoder takes")],
    ]
    return {key: kinds[n % 4](key) for n, key in enumerate(spoken.keys(root))}


def test_each_clip_has_the_states_of_its_captions_and_each_text_is_encoded_once_a_shard(root: str) -> None:
    captions, encoder = told(root), Counting()
    describe(root, captions)
    totals = spoken.encode(root, encoder)
    found = spoken.states(root)
    assert found.keys() == captions.keys()
    for key, said in captions.items():
        states = found[key]
        if not said:
            assert states is None
            continue
        assert states is not None and len(states) == len(said)
        assert all(torch.equal(one, encoder.states(caption.text)) for one, caption in zip(states, said, strict=True))
    distinct = [
        {caption.text for key in shard.table["key"].to_pylist() for caption in captions[key]}
        for split in schema.SPLITS
        for shard in index.read_shards(root, split)
    ]
    assert sorted(encoder.seen) == sorted(one for texts in distinct for one in texts)
    assert totals["texts"] == totals["encoded"] == len(encoder.seen) and totals["copied"] == 0
    assert totals["texts_cut"] == sum(encoder.count([one])[0] > encoder.limit for one in encoder.seen) > 0
    assert totals["clips"] == len(captions)
    assert not list(verify(root))


def test_batches_are_formed_by_length_inside_a_shard(root: str) -> None:
    encoder = Counting()
    describe(root, told(root))
    spoken.encode(root, encoder, batch=4)
    for texts in encoder.batches:
        lengths = [min(count, encoder.limit) for count in encoder.count(texts)]
        assert lengths == sorted(lengths) and len(texts) <= 4


def test_the_same_captions_give_the_same_bytes_whoever_is_at_work(root: str, hashes: Hashes, tmp_path: Path) -> None:
    describe(root, told(root))
    twin = str(shutil.copytree(root, tmp_path / "twin"))
    spoken.encode(root, Counting())
    # in another order, some shards twice
    for split in reversed(schema.SPLITS):
        base = compact.open_split(twin, split)[0]
        for name, keep in reversed([*by_shard(base, np.ones(int(base.counts.sum()), bool)).items()] * 2):
            text.make_text(Counting(), text.Work(twin, TEXT, COLUMN, 3), split, name, keep, {})
    assert hashes(root) == hashes(twin)


def test_the_shard_that_is_committed_first_stays(root: str) -> None:
    """States differ in their last bits between processors."""

    class Other(Counting):
        def states(self, one: str) -> torch.Tensor:
            return super().states(one) + 1

    describe(root, told(root))
    work, keep = text.Work(root, TEXT, COLUMN, 3), np.ones(len(index.read_shard(root, "train", "00000").table), bool)
    files = [Path(root, "train", f"00000.{TEXT}.{ending}") for ending in ("tar", "parquet")]
    made: list[list[bytes]] = []

    def meanwhile(clips: int, position: str) -> None:
        if not made:
            text.make_text(Counting(), work, "train", "00000", keep, {})
            made.append([path.read_bytes() for path in files])

    text.make_text(Other(), work, "train", "00000", keep, {}, meanwhile)
    assert [path.read_bytes() for path in files] == made[0]


def test_a_changed_caption_is_encoded_alone(root: str) -> None:
    captions = told(root)
    describe(root, captions)
    spoken.encode(root, Counting())
    before = spoken.states(root)
    key = next(key for key, said in captions.items() if len(said) == 2)
    describe(root, captions | {key: [Caption("something new"), *captions[key][1:]]})
    assert [line for line in verify(root) if "is of other captions than caption-test has now" in line]
    encoder = Counting()
    totals = spoken.encode(root, encoder)
    assert encoder.seen == ["something new"] and totals["encoded"] == 1 and totals["copied"] > 0
    after = spoken.states(root)
    assert torch.equal(after.pop(key)[0], encoder.states("something new"))  # type: ignore[index]
    for other, states in after.items():
        assert (states is None) == (before[other] is None)
        assert all(map(torch.equal, states or (), before[other] or ()))
    assert not list(verify(root)) and not spoken.encode(root, Counting())
    # seconds alone
    describe(root, captions | {key: [Caption("something new", 0.0, 0.25), *captions[key][1:]]})
    assert spoken.encode(root, encoder)["encoded"] == 0 and encoder.seen == ["something new"]


def test_what_is_damaged_in_the_old_shard_is_encoded_again(root: str) -> None:
    captions = told(root)
    describe(root, captions)
    spoken.encode(root, Counting())
    key = spoken.keys(root)[0]
    (shard,) = [s for s in index.read_shards(root, "train", TEXT) if key in s.table["key"].to_pylist()]
    tar = Path(root, "train", f"{shard.name}.tar")
    entry = next(row for row in shard.table.to_pylist() if row["key"] == key)["texts"][0]
    data = bytearray(tar.read_bytes())
    data[entry["offset"] + 130] ^= 1
    tar.write_bytes(data)
    assert any(f"{entry['sha']}.npy" in line and "cache_text" in line for line in verify(root))
    describe(root, captions | {key: [*captions[key], Caption("new")]})
    encoder = Counting()
    spoken.encode(root, encoder)
    assert sorted(encoder.seen) == sorted(["new", "the same for all"]) and not list(verify(root))


def test_other_clips_or_no_captions_are_said_in_one_line(root: str) -> None:
    with pytest.raises(Failure, match="has no caption-test; run its `caption` stage again"):
        spoken.encode(root, Counting())
    describe(root, told(root))
    name = f"{index.shard_names(root, 'train')[0]}.{COLUMN}"
    shard = index.read_shard(root, "train", name)
    rows = [row | {"base_sha256": "0" * 64} for row in shard.table.to_pylist()]
    index.write_table(storage.join(root, "train", f"{name}.parquet"), rows, schema.CAPTION_INDEX)
    with pytest.raises(Failure, match="has other clips than its captions or its view"):
        spoken.encode(root, Counting())


def test_verify_finds_what_is_wrong_with_a_column(root: str) -> None:
    describe(root, told(root))
    spoken.encode(root, Counting())
    name = f"{index.shard_names(root, 'train')[0]}.{TEXT}"
    url = storage.join(root, "train", f"{name}.parquet")
    shard = index.read_shard(root, "train", name)
    notes = index.read_notes(root, shard)

    def wrong(change: Callable[[dict[str, Any]], Any], **noted: Any) -> list[str]:
        rows = shard.table.to_pylist()
        for row in rows:
            for entry in row["texts"] or ():
                change(entry)
        facts = shard.tar_bytes, shard.tar_sha256, notes | noted
        index.write_index(url, rows, schema.TEXT_INDEX, *facts)
        return list(verify(root))

    assert not wrong(lambda entry: None)
    for change, says in (
        (lambda e: e.update(tokens=e["tokens"] + 1), "the size of .* is not that of its tokens"),
        (lambda e: e.update(offset=e["offset"] + 512), "is not where the index says, or is another"),
        (lambda e: e.update(start=0.125), "is of other captions than caption-test has now"),
    ):
        assert any(re.search(says, line) for line in wrong(change))
    assert any("is not that of its tokens" in line for line in wrong(lambda e: None, width=9))


texts = st.one_of(
    st.sampled_from(["the same", "the same", "", "a longer text of seven words in all"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
spans = st.sampled_from([(None, None), (0.0, 0.5), (0.5, None), (None, 0.25)])
clip_captions = st.lists(st.tuples(texts, spans), max_size=4)


@given(st.lists(clip_captions, min_size=6, max_size=6), st.lists(clip_captions, min_size=6, max_size=6))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_captions_are_and_however_they_change(
    handmade_bases: str, first: list[Any], second: list[Any]
) -> None:
    keys = spoken.keys(handmade_bases)
    for listed in (first, second, second):
        said = {key: [Caption(one, *span) for one, span in clip] for key, clip in zip(keys, listed, strict=True)}
        describe(handmade_bases, said)
        encoder = Counting()
        spoken.encode(handmade_bases, encoder, batch=2)
        found = spoken.states(handmade_bases)
        for key, captions in said.items():
            assert (found[key] is None) == (not captions)
            for one, caption in zip(found[key] or (), captions, strict=True):
                assert torch.equal(one, encoder.states(caption.text))
        assert not [line for line in verify(handmade_bases) if TEXT in line]


@pytest.fixture
def handmade_bases(tmp_path: Path) -> str:
    """Two shards of three clips each, without their videos."""
    root = str(tmp_path / "bases")
    storage.write(f"{root}/dataset.json", b'{"format": 2}')
    for shard in range(2):
        rows = [
            {"key": f"{shard}{n}-00000", "sha256": f"{shard}{n}" * 32, "frame_count": 12, "fps": 12.0} for n in range(3)
        ]
        index.write_index(f"{root}/train/{shard:05d}.parquet", rows, schema.INDEX, 0, "")
    return root


def test_texts_that_another_column_of_the_encoder_has_are_copied_from_there(root: str) -> None:
    captions, first = told(root), Counting()
    describe(root, captions)
    spoken.encode(root, first)
    key = spoken.keys(root)[0]
    describe(root, captions | {key: [Caption("the only new one")]}, "caption-other")
    assert text.others(root, "text-other", "another encoder") == [] == text.others(root, TEXT, first.digest)

    encoder = Counting()
    work = text.Work(root, "text-other", "caption-other", 3, text.others(root, "text-other", encoder.digest))
    assert work.others == [TEXT]
    for split in schema.SPLITS:
        base = compact.open_split(root, split)[0]
        keeps = by_shard(base, np.ones(int(base.counts.sum()), bool))
        for job in text.missing(root, split, "text-other", "caption-other", keeps):
            text.make_text(encoder, work, split, job.name, keeps[job.name], {})
    assert encoder.seen == ["the only new one"]
    assert spoken.states(root, "text-other").keys() == spoken.states(root).keys() and not list(verify(root))


# captions that several shards have


def shared(root: str, encoder: Any, output: str) -> tuple[int, dict[str, Any]]:
    """Encode what several shards have by itself; returns the number of parts, and where the states are."""
    keeps = {}
    for split in schema.SPLITS:
        base = compact.open_split(root, split)[0]
        keeps[split] = by_shard(base, np.ones(int(base.counts.sum()), bool))
    found = shared_text.count(root, COLUMN, keeps)
    jobs = [job for split in schema.SPLITS for job in text.missing(root, split, TEXT, COLUMN, keeps[split])]
    work = text.Work(root, TEXT, COLUMN, 3)
    parts = shared_text.plan(work, found.shared, jobs, output)
    for job in parts:
        shared_text.make_shared(encoder, work, output, job.name, lambda clips, position: None)
    return len(parts), shared_text.places(output, TEXT)


def test_what_several_shards_have_is_encoded_once_for_all(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions, output, encoder = told(root), str(tmp_path / "out"), Counting()
    describe(root, captions)
    parts, places = shared(root, encoder, output)
    assert parts == 1 and set(places) == {sha_of(one) for one in encoder.seen} and "the same for all" in encoder.seen
    totals = spoken.encode(root, encoder, elsewhere=places)
    assert len(encoder.seen) == len(set(encoder.seen)) == len({c.text for said in captions.values() for c in said})
    assert totals["copied"] + totals["encoded"] == totals["texts"] and not list(verify(root))
    # the same states as without
    found = spoken.states(root)
    for shard in Path(root).glob(f"*/*.{TEXT}.parquet"):
        shard.unlink()
    spoken.encode(root, Counting())
    assert all(
        (a is None) == (b is None) and all(map(torch.equal, a or (), b or ()))
        for a, b in zip(found.values(), spoken.states(root).values(), strict=True)
    )
    # nothing is needed when all is there
    assert shared(root, Counting(), str(tmp_path / "again")) == (0, {})
    shared_text.forget(output)
    assert not storage.names(output)


def test_parts_that_are_there_are_not_encoded_again(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_text, "_PART", 2)
    everyone = [Caption(f"text {n}") for n in range(40)]
    describe(root, lambda key: everyone)
    encoder, output = Counting(), str(tmp_path / "out")
    parts, places = shared(root, encoder, output)
    assert parts > 5 and len(places) == 40 == len(encoder.seen)
    one = sorted(Path(output).rglob("texts-*.parquet"))[0]
    torn = sorted(Path(output).rglob("texts-*.tar"))[1]
    one.unlink()
    again = Counting()
    shared(root, again, output)
    assert 0 < len(again.seen) < 10 and len(shared_text.places(output, TEXT)) == 40
    torn.write_bytes(bytes(torn.stat().st_size))
    # a part that has been damaged costs its texts
    totals = spoken.encode(root, again, elsewhere=shared_text.places(output, TEXT))
    assert totals["copied"] < totals["texts"] and not list(verify(root))


def test_it_is_only_done_where_it_saves_a_share(root: str) -> None:
    keys = spoken.keys(root)
    keeps = {}
    for split in schema.SPLITS:
        base = compact.open_split(root, split)[0]
        keeps[split] = by_shard(base, np.ones(int(base.counts.sum()), bool))
    describe(root, lambda key: [Caption(key), Caption(f"{key} again")])
    found = shared_text.count(root, COLUMN, keeps)
    assert (found.captions, found.distinct, len(found.shared)) == (2 * len(keys), 2 * len(keys), 0)
    assert not found.is_worth
    describe(root, lambda key: [Caption("one for all")])
    found = shared_text.count(root, COLUMN, keeps)
    shards = sum(len(names) for names in keeps.values())
    assert (found.captions, found.distinct, found.encodings) == (len(keys), 1, shards) and found.is_worth


# the stage


def config(encoder: str = "words", **changed: Any) -> cache_text.Config:
    how = {name: changed.pop(name) for name in cache_text.EncodeConfig.model_fields if name in changed}
    return cache_text.Config(
        kind="cache_text",
        dataset="x",
        captions="y",
        encoder=encoder,
        run=how,
        **changed,  # type: ignore[arg-type]
    )


def test_the_name_of_the_column_is_of_encoder_captions_and_view() -> None:
    names = {text.column_name(*each) for each in (("a", "c", ""), ("b", "c", ""), ("a", "d", ""), ("a", "c", "v"))}
    assert len(names) == 4 and text.column_name("a", "c", "") == text.column_name("a", "c", "")
    assert all(name.startswith("text-") and len(name) == 21 for name in names)


def test_another_file_in_the_folder_is_another_input(tmp_path: Path) -> None:
    assert cache_text.outside(config()) == "" == cache_text.outside(config(str(tmp_path / "none")))
    (tmp_path / "model.safetensors").write_bytes(b"123")
    one = cache_text.outside(config(str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    longer = cache_text.outside(config(str(tmp_path)))
    # trained further: the same size
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert len({one, longer, cache_text.outside(config(str(tmp_path))), ""}) == 4


def test_a_recipe_has_the_stage(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"1")
    stages = {
        "shards": {"kind": "shard", "sources": [str(tmp_path / "a.mp4")]},
        "text": {"kind": "cache_text", "dataset": "shards", "captions": str(tmp_path / "captions"), "length": 77},
    }
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"name": "r", "workspace": str(tmp_path / "ws"), "stages": stages}))
    nodes = {node.name: node for node in graph.build(graph.pin(recipe.load(str(path))))}
    assert nodes["text"].config.length == 77 and nodes["text"].config.encoder == "words"  # type: ignore[attr-defined]
    stages["text"]["captions"] = "shards"
    path.write_text(json.dumps({"name": "r", "workspace": str(tmp_path / "ws"), "stages": stages}))
    with pytest.raises(UserError, match="needs a captions, but stage shards makes a dataset"):
        graph.build(graph.pin(recipe.load(str(path))))


def test_what_is_no_output_of_the_stage_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no text here \(no text.json\)"):
        read_text(str(tmp_path))
    assert not cache_text.complete(str(tmp_path))
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(Failure, match=r"text.json: damaged"):
        read_text(str(tmp_path))


# with Ray


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_stage_writes_the_same_bytes_for_any_number_of_workers_and_goes_on(
    root: str, hashes: Hashes, tmp_path: Path
) -> None:
    captions = told(root)
    describe(root, captions)
    twin = str(shutil.copytree(root, tmp_path / "twin"))
    inputs = {"dataset": root, "captions": spoken.record(tmp_path / "captions", root)}
    others = {"dataset": twin, "captions": spoken.record(tmp_path / "others", twin)}
    output = str(tmp_path / "out")
    result = cache_text.run(config(workers=1, length=8), inputs, output)
    cache_text.run(config(workers=2, length=8), others, str(tmp_path / "other"))
    made = hashes(root)
    assert hashes(twin) == made and not list(verify(root))
    # the record
    found, encoder = read_text(result["uri"]), longtake.text_encoder(length=8)
    assert (found.dataset, found.captions, found.column) == (root, COLUMN, result["column"])
    assert found.width == 256 and found.encoder["digest"] == encoder.digest and cache_text.complete(output)
    assert longtake.text_encoder(**found.config().model_dump()).digest == encoder.digest
    assert np.array_equal(found.empty(), encoder.encode([""])[0].float().numpy())
    metrics = result["metrics"]
    assert metrics["captions"] == sum(map(len, captions.values())) and metrics["clips"] == len(captions)
    assert metrics["clips_without"] == sum(not said for said in captions.values())
    assert metrics["encoded_texts"] == metrics["texts"] and metrics["texts_cut"] > 0
    for key, states in spoken.states(root, found.column).items():
        expected = encoder.encode([caption.text for caption in captions[key]])
        assert all(map(torch.equal, states or (), expected))
    # nothing is left to do, then a caption changes
    assert cache_text.run(config(length=8), inputs, output)["metrics"]["encoded_shards"] == 0
    key = next(key for key, said in captions.items() if said)
    describe(root, captions | {key: [Caption("new")]})
    assert not cache_text.complete(output)
    again = cache_text.run(config(length=8), inputs, output)["metrics"]
    assert (again["encoded_shards"], again["encoded_texts"]) == (1, 1) and cache_text.complete(output)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_encoder_from_a_folder_and_what_several_shards_have(root: str, tmp_path: Path) -> None:
    describe(root, lambda key: [Caption("a red square"), Caption("people walk")])
    inputs = {"dataset": root, "captions": spoken.record(tmp_path / "captions", root)}
    folder = tiny_encoders.encoder("umt5", tmp_path / "umt5")
    result = cache_text.run(config(folder, layer=-2), inputs, str(tmp_path / "out"))
    shards = sum(len(index.shard_names(root, split)) for split in schema.SPLITS)
    assert result["metrics"]["encoded_texts"] == 2 and result["metrics"]["copied_texts"] == 2 * shards > 2
    encoder = longtake.text_encoder(folder, layer=-2)
    red, walk = (encoder.encode([one])[0].float() for one in ("a red square", "people walk"))
    for states in spoken.states(root, result["column"]).values():
        assert states is not None
        torch.testing.assert_close(states[0].float(), red, rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(states[1].float(), walk, rtol=2e-2, atol=2e-3)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["empty.safetensors", "text.json"]
    # a worker that finds another encoder in the folder
    described = encoder.describe() | {"digest": "other", "width": 32}
    with pytest.raises(UserError, match="a worker finds another there than the driver"):
        work = text.Work(root, TEXT, COLUMN, 3)
        cache_text._load("cpu", encoder=described, work=work, output=str(tmp_path / "out"), threads=1)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_what_stops_the_stage_is_one_line(root: str, tmp_path: Path) -> None:
    describe(root, lambda key: None)
    inputs = {"dataset": root, "captions": spoken.record(tmp_path / "captions", root)}
    elsewhere = spoken.record(tmp_path / "elsewhere", str(shutil.copytree(root, tmp_path / "copy")))
    for changed, given_inputs, says in (
        ({}, {}, "captions: caption-test: no clip has a caption"),
        ({}, {"captions": str(tmp_path)}, "no captions here"),
        ({}, {"captions": elsewhere}, "captions: .*: are of .*copy, not of"),
        ({"encoder": "nowhere"}, {}, "encoder: nowhere: no such folder"),
    ):
        with pytest.raises(UserError, match=says):
            cache_text.run(config(**changed), inputs | given_inputs, str(tmp_path / "out"))  # type: ignore[arg-type]


@pytest.mark.soak
def test_killed_between_shards_it_ends_with_the_same_bytes(root: str, hashes: Hashes, tmp_path: Path) -> None:
    describe(root, told(root))
    undisturbed = str(shutil.copytree(root, tmp_path / "undisturbed"))
    inputs = {"dataset": root, "captions": spoken.record(tmp_path / "captions", root)}
    folder = tiny_encoders.encoder("t5", tmp_path / "t5")
    chosen = config(folder, batch=1, workers=1)
    script = (
        "import json, sys\nfrom longtake.pipeline.stages import cache_text\n"
        "if __name__ == '__main__':\n"
        "    config = cache_text.Config.model_validate_json(sys.argv[1])\n"
        "    cache_text.run(config, json.loads(sys.argv[2]), sys.argv[3])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}

    def start(given_inputs: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-c", script, chosen.model_dump_json(), json.dumps(given_inputs), str(output)]
        return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)

    def committed() -> Sequence[Path]:
        return sorted(Path(root).glob("*/*.text-*.parquet"))

    child, deadline = start(inputs, tmp_path / "out"), time.time() + 600
    while child.poll() is None and time.time() < deadline and not committed():
        time.sleep(0.01)
    assert committed()
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for path in committed()[1:]:
        path.unlink()  # so that there is work left
    before = {path: path.stat().st_mtime_ns for path in committed()}
    assert start(inputs, tmp_path / "out").wait() == 0
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    others = {"dataset": undisturbed, "captions": spoken.record(tmp_path / "others", undisturbed)}
    assert start(others, tmp_path / "other").wait() == 0
    assert hashes(root) == hashes(undisturbed)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"template": "\ud800 {}"}, r"template\n.*'\\ud800 \{\}' is no UTF-8; write it again"),
        ({"template": "{} and {}"}, "must have one {}, where the text stands"),
        ({"length": 100_000_000}, "length\n.* less than or equal to 1048576"),
        ({"length": 0}, "length\n.* greater than or equal to 1"),
    ],
)
def test_settings_that_no_encoder_takes_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config(**changed)


def test_the_settings_of_an_encoder_are_those_of_the_stage() -> None:
    chosen = config(layer=-2, template="x {}", crop=1, clean="wan", side="left", precision="bf16", length=3)
    assert chosen.encoder_config() == TextConfig(
        encoder="words", layer=-2, template="x {}", crop=1, clean="wan", side="left", precision="bf16", length=3
    )
