"""The `caption` stage: what manifests say, what an endpoint is asked, and that nothing is lost, doubled or asked twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from endpoint import KEY, FakeEndpoint, caption_of

from longtake.datasets import captions as records
from longtake.datasets import clip, index, later, schema, storage
from longtake.datasets.captions import Caption, read_captions
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader
from longtake.datasets.stage import content, names
from longtake.datasets.verify import verify
from longtake.infra import recipe
from longtake.infra.cli.dataset import dataset as commands
from longtake.infra.footage import write_video
from longtake.pipeline import captions
from longtake.pipeline.captioner import endpoint, frames, reply, server
from longtake.pipeline.captioner.meter import Meter
from longtake.pipeline.captioner.shard import make_captions
from longtake.pipeline.stages import caption, shard

Planned = Callable[[shard.Config, str], list[tuple[Any, ...]]]
MakeAlone = Callable[[shard.Config, object], dict[str, str]]


def sources(manifest: object) -> shard.Config:
    """Clips of a second."""
    clips = {"short_side": 32, "fps": 10, "min_seconds": 0.5, "max_seconds": 1}
    return shard.Config(kind="shard", sources=[str(manifest)], clip=clips, val_fraction=0.3, group_sources=2)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six videos of three seconds, each of which makes three clips."""
    folder, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(1)
    for n in range(6):
        picture = rng.integers(40, 200, (48, 64, 3), dtype=np.uint8)
        write_video(folder / f"{n}.mp4", (np.roll(picture, t, 1) for t in range(30)), 10)
    return sorted(folder.glob("*.mp4"))


def listed(folder: Path, films: list[Path], about: list[dict[str, Any]]) -> Path:
    """A manifest of the films; what is said about each comes in their order."""
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps({"uri": str(f)} | said) + "\n" for f, said in zip(films, about, strict=True)))
    return path


def rows_of(root: str, column: str) -> list[dict[str, Any]]:
    shards = [shard for split in schema.SPLITS for shard in index.read_shards(root, split, column)]
    return [row for shard in shards for row in shard.table.to_pylist()]


def by_film(root: str, column: str) -> dict[str, list[list[Caption]]]:
    """The captions of each film's clips, in order, by the film's name."""
    uris = {row["source"]: Path(row["uri"]).stem for row in index.read_sources(root).to_pylist()}
    found: dict[str, list[list[Caption]]] = {}
    for row in sorted(rows_of(root, column), key=lambda row: row["key"]):
        film = uris[row["key"].rpartition("-")[0]]
        found.setdefault(film, []).append(records.rows_to_captions(row["captions"]))
    return found


def run(root: str, output: Path, **settings: Any) -> dict[str, Any]:
    return caption.run(config(**settings), {"dataset": root}, str(output))


def config(**settings: Any) -> caption.Config:
    how = {name: settings.pop(name) for name in caption.CaptionConfig.model_fields if name in settings}
    return caption.Config(kind="caption", dataset="x", run=how, **settings)  # type: ignore[arg-type]


# What manifests say.


def test_manifests_give_captions_cut_to_clips_and_later_ones_change_their_shards_alone(
    films: list[Path],
    planned: Planned,
    made_alone: MakeAlone,
    hashes: Callable[[object], dict[str, str]],
    tmp_path: Path,
) -> None:
    root = str(tmp_path / "d")
    about: list[dict[str, Any]] = [
        {"caption": "👩‍👩‍👧 two\nlines"},
        {"captions": ["a", {"text": "שלום", "language": "he", "source": "Ada"}]},
        {"shots": [[0, 1.5, "first"], {"start": 1.5, "end": 9, "text": "second"}]},
        {"caption": ""},
        {"caption": None},
        {"caption": "x" * 100_000},
    ]
    manifest = listed(tmp_path, films, about)
    made_alone(sources(manifest), root)
    tars = {name: digest for name, digest in hashes(root).items() if name.endswith(".tar")}
    result = run(root, tmp_path / "out")
    column = result["column"]
    assert by_film(root, column) == {
        "0": [[Caption("👩‍👩‍👧 two\nlines")]] * 3,
        "1": [[Caption("a"), Caption("שלום", None, None, "he", "Ada")]] * 3,
        "2": [
            [Caption("first", source="shots")],
            [Caption("first", 0.0, 0.5, source="shots"), Caption("second", 0.5, 1.0, source="shots")],
            [Caption("second", source="shots")],
        ],
        "3": [[Caption("")]] * 3,
        "4": [[]] * 3,
        "5": [[Caption("x" * 100_000)]] * 3,
    }
    assert {row["reason"] for row in rows_of(root, column)} == {None, "not_annotated"}
    assert not list(verify(root)) and caption.complete(str(tmp_path / "out"))
    record = read_captions(result["uri"])
    assert (record.dataset, record.column, record.captioner) == (root, column, {})
    assert record.counts["clips"] == 18 and record.counts["clips_without"] == 3 == record.counts["reason/not_annotated"]
    assert record.counts["source/shots"] == 4 and result["metrics"]["clips_without"] == 3
    # nothing is left to do
    assert run(root, tmp_path / "out")["metrics"]["captioned_shards"] == 0

    # a caption is corrected, another comes; a licence is none of ours
    before = hashes(root)
    about[4] = {"caption": "at last"}
    about[0] = {"caption": about[0]["caption"], "licence": "CC0"}
    planned(sources(listed(tmp_path, films, about)), root)
    changed = [(split, name) for split in schema.SPLITS for name in later.shards(root, split)]
    assert changed and not caption.complete(str(tmp_path / "out"))
    metrics = run(root, tmp_path / "out")["metrics"]
    assert (metrics["captioned_shards"], metrics["replaced_shards"]) == (1, 1)
    assert by_film(root, column)["4"] == [[Caption("at last")]] * 3
    after = hashes(root)
    assert len([name for name in before if before[name] != after[name]]) == 1 and tars.items() <= after.items()
    assert caption.complete(str(tmp_path / "out")) and not list(verify(root))
    texts = {text for batch in Loader(root, columns=(column,), frames=2, size=(32, 32), batch=1, epochs=3)
             for text in batch["caption"]}  # fmt: skip
    assert texts <= {c.text for clips in by_film(root, column).values() for some in clips for c in some} | {None}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_empty_and_missing_captions_are_two_things_but_in_csv(
    films: list[Path], made_alone: MakeAlone, tmp_path: Path, suffix: str
) -> None:
    rows = [{"uri": str(film), "caption": text} for film, text in zip(films, ["a", "", None], strict=False)]
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        path.write_text("uri,caption\n" + "".join(f"{row['uri']},{row['caption'] or ''}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made_alone(sources(path), tmp_path / "d")
    column = run(str(tmp_path / "d"), tmp_path / "out")["column"]
    said = {
        film: {c.text for some in clips for c in some} for film, clips in by_film(str(tmp_path / "d"), column).items()
    }
    assert said == {"0": {"a"}, "1": set() if suffix == "csv" else {""}, "2": set()}


def test_what_is_no_caption_is_refused_with_the_name_of_its_row(
    films: list[Path], planned: Planned, tmp_path: Path
) -> None:
    for number, said in enumerate(
        ({"captions": "a dog"}, {"shots": [[2, 1, "x"]]}, {"caption": 3}, {"caption": "\ud800"})
    ):
        manifest = listed(tmp_path, films, [{}, {}, said, {}, {}, {}])
        with pytest.raises(UserError, match=rf"the row of {films[2]}: (caption|captions|shots): "):
            planned(sources(manifest), str(tmp_path / f"d{number}"))


def test_images_have_the_captions_beside_them(tmp_path: Path) -> None:
    from PIL import Image

    from longtake.datasets import images
    from longtake.datasets.shard import write_tar

    buffer = tmp_path / "x.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(buffer)
    texts = {"a": {"txt": "said in a text 🙂".encode()}, "b": {"json": b'{"captions": ["one", "two"]}'}, "c": {}}
    (tmp_path / "i" / "train").mkdir(parents=True)
    write_tar(tmp_path / "i" / "train" / "0.tar", [(k, {"png": buffer.read_bytes()} | v) for k, v in texts.items()])
    images.adopt(str(tmp_path / "i"))
    column = run(str(tmp_path / "i"), tmp_path / "out")["column"]
    said = [[c.text for c in records.rows_to_captions(row["captions"])] for row in rows_of(str(tmp_path / "i"), column)]
    assert said == [["said in a text 🙂"], ["one", "two"], []]
    assert not list(verify(str(tmp_path / "i")))


def test_commands_show_captions(films: list[Path], made_alone: MakeAlone, tmp_path: Path) -> None:
    root = str(tmp_path / "d")
    made_alone(
        sources(listed(tmp_path, films, [{"caption": "the dog runs"}, {"caption": "a Dog sits"}, *[{}] * 4])), root
    )
    with pytest.raises(UserError, match="has no captions; run a `caption` stage"):
        CliRunner().invoke(commands, ["captions", root], catch_exceptions=False)
    column = run(root, tmp_path / "out")["column"]

    def says(*arguments: str) -> str:
        done = CliRunner().invoke(commands, [*arguments], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    assert f"captions of 6 of 18 clips (6 by manifest): {column}" in says("ls", root)
    lines = says("captions", root, "--most", "2").splitlines()
    assert lines[:2] == ["captions of 6 of 18 clips (6 by manifest)", "without  12 not_annotated"]
    assert lines[2].startswith("source   100% without, 3 of 3: ") and lines[4:] == ["word     6 dog", "word     3 runs"]
    row = next(row for row in rows_of(root, column) if row["captions"])
    assert json.loads(says("show", root, row["key"]))["captions"][column][0]["source"] == "manifest"


def test_commands_show_who_made_most_captions_on_one_line(
    films: list[Path], made_alone: MakeAlone, tmp_path: Path
) -> None:
    root = str(tmp_path / "d")
    names = ["\x1b[2Jx\nclips 0", "y" * 200, *(f"n{n}" for n in range(6))]
    said = [{"captions": [{"text": name, "source": name} for name in names[: 8 - n]]} for n in range(6)]
    made_alone(sources(listed(tmp_path, films, said)), root)
    run(root, tmp_path / "out")
    for command in ("ls", "captions"):
        done = CliRunner().invoke(commands, [command, root], catch_exceptions=False)
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("captions "))
        assert line.startswith(
            rf"captions of 18 of 18 clips (18 by \x1b[2Jx\nclips 0, 18 by {'y' * 40}…, 18 by n0, 15 by n1"
        )
        assert "30 by 4 others)" in line


# What a captioner is asked.


@pytest.fixture
def served() -> Iterator[FakeEndpoint]:
    server = FakeEndpoint()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.02)
    monkeypatch.setattr(endpoint, "_TICK", 0.1)


@pytest.fixture(scope="module")
def plain(films: list[Path], tmp_path_factory: pytest.TempPathFactory, made_alone: MakeAlone) -> str:
    """A dataset without captions: copy it."""
    folder = tmp_path_factory.mktemp("plain")
    made_alone(sources(films[0].parent), folder / "d")
    return str(folder / "d")


@pytest.fixture
def root(plain: str, tmp_path: Path) -> str:
    return str(shutil.copytree(plain, tmp_path / "copy"))


def asking(url: str, **changed: Any) -> endpoint.Asking:
    usual = {
        "model": "fake", "prompt": reply.PROMPT, "frames": 3, "side": 512, "send": "frames", "max_characters": 500,
        "answer_tokens": 64, "settings": {}, "url": url, "key": "", "concurrency": 4, "timeout_seconds": 1.0,
        "patience_seconds": 5.0, "tries": 3,
    }  # fmt: skip
    return endpoint.Asking(**usual | changed)


def make(
    root: str, server: FakeEndpoint, meter: Meter | None = None, proven: bool = False, **changed: Any
) -> dict[str, int]:
    """What the stage does with an endpoint, in this process; `proven`, it has given answers before."""
    asked = endpoint.Endpoint(asking(server.url, **changed), meter or Meter(None, None, None), proven)
    totals: dict[str, int] = {}
    for split in schema.SPLITS:
        for base in index.read_shards(root, split):
            keep = np.ones(len(base.table), bool)
            found = make_captions(asked, "fake", root, "caption-fake", split, base.name, keep)
            totals = {name: totals.get(name, 0) + value for name, value in found.items()}
    return totals


def keys(root: str) -> list[str]:
    return [
        row["key"] for split in schema.SPLITS for s in index.read_shards(root, split) for row in s.table.to_pylist()
    ]


def is_whole(root: str, but: dict[str, str] | None = None) -> None:
    """Every clip has the caption that is its own, or one of these reasons."""
    rows = rows_of(root, "caption-fake")
    assert [row["key"] for row in rows] == keys(root)
    for row in rows:
        code = (but or {}).get(row["key"])
        if code:
            assert row["captions"] is None and row["reason"].startswith(code), row["reason"]
        else:
            text = caption_of(reply.token_of(row["key"]))
            assert records.rows_to_captions(row["captions"]) == [Caption(text, source="fake")]
    assert not list(verify(root))


def kept(root: str) -> list[dict[str, Any]]:
    """The answers of shards that are not committed."""
    return [answer for path in Path(root, "answers").glob("*.json") for answer in json.loads(path.read_text())]


def test_an_endpoint_is_shown_frames_of_the_clip_and_asked_for_json(
    root: str, tmp_path: Path, served: FakeEndpoint
) -> None:
    served.always = "slow"
    assert make(root, served, settings={"temperature": 0.5})["asked"] == 18
    is_whole(root)
    assert set(served.asked.values()) == {1} and 1 < served.most_at_once <= 4
    body = served.requests[0]
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("fake", 0.5, 64)
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["clip", "caption"]
    *pictures, text = body["messages"][0]["content"]
    assert text["text"].startswith("These are 3 frames of one video clip of 1 seconds")
    import base64
    import io

    from PIL import Image

    token = text["text"].split('"clip": "')[1][:8]
    places = {reply.token_of(row["key"]): (split, s.name, row) for split in schema.SPLITS
              for s in index.read_shards(root, split) for row in s.table.to_pylist()}  # fmt: skip
    split, name, row = places[token]
    tar = f"{root}/{split}/{name}.tar"
    mp4 = storage.read_range(tar, row["mp4_offset"], row["mp4_size"])
    expected = clip.decode(mp4, frames.spread(row["frame_count"], 3))
    assert len(pictures) == 3 and frames.spread(10, 3) == [1, 5, 8] and frames.spread(2, 8) == [0, 1]
    for picture, frame in zip(pictures, expected, strict=True):
        kind, data = picture["image_url"]["url"].split(",")
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert kind == "data:image/jpeg;base64" and shown.shape == frame.shape
        assert np.abs(shown.astype(int) - frame.astype(int)).mean() < 8
    make(root, served)
    assert len(served.requests) == 18  # all is committed


def test_the_clip_itself_may_be_sent(root: str, tmp_path: Path, served: FakeEndpoint) -> None:
    make(root, served, send="clip")
    is_whole(root)
    (video,) = [part for part in served.requests[0]["messages"][0]["content"] if part["type"] != "text"]
    assert video["type"] == "video_url" and video["video_url"]["url"].startswith("data:video/mp4;base64,")


def test_faults_pass_and_lies_are_found_out(root: str, tmp_path: Path, served: FakeEndpoint) -> None:
    served.stall = 30.0
    moods = ["busy", "down", "drop", "torn", "stalls", "drips", "drips_error", "floods_error", "cut", "limited", "empty",
             "blank", "wrong", "endless", "huge", "nonsense", "null", "refuses"]  # fmt: skip
    for key, mood in zip(keys(root), moods, strict=False):
        served.moods[reply.token_of(key)] = [mood]
    make(root, served, timeout_seconds=0.7)
    is_whole(root)
    assert set(served.answered.values()) == {1}
    assert [served.asked[reply.token_of(key)] for key in keys(root)] == [2] * len(moods) + [1] * (18 - len(moods))
    assert not kept(root) and not served.trickled


def test_what_stays_of_no_use_ends_as_a_row_that_says_why(root: str, tmp_path: Path, served: FakeEndpoint) -> None:
    moods = {
        "cut": "bad_answer",
        "wrong": "bad_answer",
        "endless": "bad_answer",
        "refuses": "refused",
        "rejects": "rejected",
    }
    but = {}
    for key, (mood, code) in zip(keys(root)[4:], moods.items(), strict=False):
        served.moods[reply.token_of(key)] = [mood] * 3
        but[key] = code
    make(root, served)
    is_whole(root, but)
    reasons = [row["reason"] for row in rows_of(root, "caption-fake") if row["reason"]]
    assert any("is about another clip, '00000000'" in reason for reason in reasons)
    assert any("more than max_characters 500" in reason for reason in reasons)
    assert "rejected: HTTP 400" in " ".join(reasons)
    rejected = next(key for key, code in but.items() if code == "rejected")
    assert served.asked[reply.token_of(rejected)] == 1
    # they are answers too: nobody is asked again
    before = len(served.requests)
    make(root, served)
    assert len(served.requests) == before


@pytest.mark.parametrize(
    ("mood", "changed", "says"),
    [
        ("down", {"patience_seconds": 0.2}, "HTTP 503 .*run.patience_seconds; run the same command again"),
        ("drop", {"patience_seconds": 0.2}, "the connection broke"),
        ("stalls", {"patience_seconds": 0.2, "timeout_seconds": 0.3}, "no answer in 0.3 s"),
        ("drips_error", {"patience_seconds": 0.2, "timeout_seconds": 0.3}, "HTTP 500; nothing else"),
        ("elsewhere", {}, r"HTTP 308 https://elsewhere.example/v1; check `endpoint`"),
        ("nonsense", {}, r"gives no answer of use \(bad_answer: .*check `endpoint`, `model` and `prompt`"),
        ("rejects", {}, r"rejects every request \(rejected: HTTP 400 .*no such picture.*check `model`"),
    ],
)
def test_an_endpoint_that_is_of_no_use_stops_the_stage_with_one_line(
    root: str, tmp_path: Path, served: FakeEndpoint, mood: str, changed: dict[str, Any], says: str
) -> None:
    served.always, served.stall = mood, 30.0
    asked = endpoint.Endpoint(asking(served.url, **changed), Meter(None, None, None), proven=False)
    (base, *_) = index.read_shards(root, "train")
    tar, rows = f"{root}/train/{base.name}.tar", base.table.to_pylist()
    with pytest.raises(Failure, match=says) as error:
        list(asked.answers(rows, tar))
    assert "\n" not in str(error.value)
    # what has many shards to make does not wait for it again and again
    before = len(served.requests)
    with pytest.raises(Failure, match=says):
        list(asked.answers(rows, tar))
    assert len(served.requests) == before
    with pytest.raises(Failure, match=says):
        make(root, served, **changed)
    assert not rows_of(root, "caption-fake") and not kept(root)
    assert not served.trickled
    # once it answers, the same command goes on
    served.always = "good"
    make(root, served)
    is_whole(root)


def test_the_key_is_sent_and_never_said(root: str, tmp_path: Path, served: FakeEndpoint) -> None:
    served.key = KEY
    with pytest.raises(Failure, match=r"HTTP 401 .*check the key") as error:
        make(root, served, key=KEY[:-4])
    assert KEY[:-4] not in str(error.value) and "***" in str(error.value)
    assert KEY not in repr(asking(served.url, key=KEY))
    codes = {"torn": "bad_answer", "cut": "bad_answer", "wrong": "bad_answer", "refuses": "refused", "rejects": "rejected",
             "down": "unanswered"}  # fmt: skip
    moods = dict(zip(keys(root), ["caption", *codes], strict=False))
    served.lasting = {reply.token_of(key): f"{mood}_with_key" for key, mood in moods.items()}
    make(root, served, key=KEY, patience_seconds=1.5)
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in files
    rows = {row["key"]: row for row in rows_of(root, "caption-fake")}
    for key, mood in moods.items():
        row = rows[key]
        if mood == "caption":
            assert row["captions"][0]["text"] == "a clip of ***"
        else:
            assert row["reason"].startswith(codes[mood])
            # neither whole nor in part, escaped or not
            assert not any(part in row["reason"] for part in ("sk-", "secret", "test", "002d")), row["reason"]
    served.lasting = {}
    assert [row["captions"][0]["text"] for key, row in rows.items() if key not in moods] == [
        caption_of(reply.token_of(key)) for key in rows if key not in moods
    ]


def test_a_clip_at_which_the_endpoint_always_fails_is_a_row_and_stops_no_other(
    root: str, tmp_path: Path, served: FakeEndpoint
) -> None:
    first, second, last = keys(root)[0], keys(root)[7], keys(root)[-1]
    served.stall = 0.6
    served.lasting = dict(
        zip(map(reply.token_of, (first, second, last)), ("down", "stalls", "drips_error"), strict=True)
    )
    # clips are asked about in random order: one of the three may be the first, and would be taken for the endpoint
    make(root, served, proven=True, concurrency=1, patience_seconds=0.5, timeout_seconds=0.3)
    is_whole(root, dict.fromkeys((first, second, last), "unanswered: "))
    reasons = {row["key"]: row["reason"] for row in rows_of(root, "caption-fake")}
    assert (reasons[first], reasons[second]) == ("unanswered: HTTP 503 <html>", "unanswered: no answer in 0.3 s")
    assert reasons[last] == "unanswered: HTTP 500"
    before = len(served.requests)
    make(root, served)
    assert len(served.requests) == before


def test_a_clip_that_is_left_alone_is_not_taken_for_the_endpoint_nor_the_endpoint_for_it(
    root: str, tmp_path: Path, served: FakeEndpoint
) -> None:
    (base, *_) = index.read_shards(root, "train")
    row, tar = base.table.to_pylist()[0], f"{root}/train/{base.name}.tar"

    def ask(proven: bool) -> Any:
        asked = endpoint.Endpoint(asking(served.url, patience_seconds=0.2), Meter(None, None, None), proven)
        return [answer.reason for answer in asked.answers([row], tar) if answer]

    served.always = "down"
    assert ask(proven=True) == ["unanswered: HTTP 503 <html>"]  # others were answered before
    for proven, mood, models in ((False, "down", "listed"), (True, "down", "down"), (True, "busy", "listed")):
        served.always, served.models = mood, models
        with pytest.raises(Failure, match=r"nothing else in 0\.2 s"):
            ask(proven)
    # of an endpoint that has never answered one clip says enough
    served.always, served.models = "down", "listed"
    rows = [row | {"key": f"k{n}"} for n in range(12)]
    alone = asking(served.url, patience_seconds=0.2, concurrency=1)
    with pytest.raises(Failure, match=r"nothing else in 0\.2 s"):
        list(endpoint.Endpoint(alone, Meter(None, None, None), proven=False).answers(rows, tar))
    assert len(served.asked.keys() & {reply.token_of(row["key"]) for row in rows}) == 1
    # and of one that has, so many one after the other are no chance
    asked = endpoint.Endpoint(asking(served.url, patience_seconds=0.2), Meter(None, None, None), proven=True)
    given = []
    with pytest.raises(Failure, match=r"nothing else in 0\.2 s"):
        for answer in asked.answers(rows, tar):
            given += [answer] if answer else []
    assert not given


def test_what_is_not_answered_does_not_count_as_progress(root: str, served: FakeEndpoint) -> None:
    (base, *_) = index.read_shards(root, "train")
    served.always = "slow"
    asked = endpoint.Endpoint(asking(served.url, concurrency=1), Meter(None, None, None), proven=False)
    seen: list[int] = []
    make_captions(asked, "fake", root, "caption-fake", "train", base.name, np.ones(len(base.table), bool),
                  lambda clips, position: seen.append(clips))  # fmt: skip
    assert seen == [*range(1, len(base.table) + 1), len(base.table)]


@pytest.mark.parametrize("mood", ["listed", "down", "drips", "drips_error", "drips_head", "floods_error"])
def test_whether_an_endpoint_is_there_is_known_before_it_ends_its_answer(served: FakeEndpoint, mood: str) -> None:
    served.models, served.stall = mood, 30.0
    assert server.unreachable(served.url, 0.5) is None
    assert not served.trickled


def test_a_budget_ends_the_run_and_the_next_goes_on(root: str, tmp_path: Path, served: FakeEndpoint) -> None:
    runs = []
    for _ in range(5):
        runs.append(make(root, served, Meter(None, 5, None)))
        if not runs[-1]["spent"]:
            break
    assert [found["asked"] for found in runs] == [5, 5, 5, 3] and set(served.asked.values()) == {1}
    is_whole(root)


@pytest.mark.parametrize("mood", ["good", "nonsense", "null", "torn_usage", "drips_usage"])
def test_a_budget_of_tokens_ends_after_what_is_under_way(root: str, served: FakeEndpoint, mood: str) -> None:
    served.always, served.stall = mood, 1.0
    found = make(root, served, Meter(None, None, 500), concurrency=1, tries=9, timeout_seconds=0.3)
    assert found["spent"] and len(served.requests) == 5  # of 100 tokens each
    assert found["asked"] == (5 if mood == "good" else 0)


def test_odd_accounts_of_tokens_count_for_nothing(root: str, served: FakeEndpoint) -> None:
    served.always = "odd_usage"
    make(root, served, Meter(None, None, 1))
    is_whole(root)


def test_the_meter_spaces_requests_and_pauses() -> None:
    meter = Meter(60, None, None)
    waits = [meter.take() for _ in range(3)]
    assert waits == [pytest.approx(n, abs=0.1) for n in range(3)]
    meter.pause(10)
    assert meter.take() == pytest.approx(10, abs=0.1)


def test_answers_outlive_their_process_and_those_about_other_clips_do_not_count(
    root: str, tmp_path: Path, served: FakeEndpoint
) -> None:
    class Dies(endpoint.Endpoint):
        def answers(self, clips: Any, tar: str) -> Any:
            given = 0
            for answer in super().answers(clips, tar):
                yield answer
                given += answer is not None
                if given == 3:
                    raise KeyboardInterrupt

    asked = Dies(asking(served.url, concurrency=1), Meter(None, None, None), proven=False)
    base = index.read_shards(root, "train")[0]
    arguments: Any = (
        "fake",
        root,
        "caption-fake",
        "train",
        base.name,
        np.ones(len(base.table), bool),
    )
    with pytest.raises(KeyboardInterrupt):
        make_captions(asked, *arguments)
    files, answers = list(Path(root, "answers").glob(f"train-{base.name}.caption-fake.*.json")), kept(root)
    assert len(answers) == 3 and not list(verify(root))
    for path in files:
        path.unlink()
    files[0].write_text(json.dumps([answers[0] | {"base_sha256": "of another clip"}, *answers[1:]]))
    make(root, served)
    is_whole(root)
    assert served.asked[reply.token_of(answers[0]["key"])] == 2 and served.asked[reply.token_of(answers[1]["key"])] == 1
    assert not files[0].exists()


def test_a_later_annotation_takes_the_place_of_what_was_asked_and_nothing_is_asked_again(
    films: list[Path], planned: Planned, made_alone: MakeAlone, tmp_path: Path, served: FakeEndpoint
) -> None:
    root = str(tmp_path / "d")
    about: list[dict[str, Any]] = [{"label": str(n)} for n in range(6)]
    made_alone(sources(listed(tmp_path, films, about)), root)
    make(root, served)
    is_whole(root)
    about[3] = {"caption": "as it is"}
    planned(sources(listed(tmp_path, films, about)), root)
    make(root, served)
    assert by_film(root, "caption-fake")["3"] == [[Caption("as it is")]] * 3 and set(served.asked.values()) == {1}
    # and taken back, its clips are asked about again, and no others
    about[3] = {"label": "3"}
    planned(sources(listed(tmp_path, films, about)), root)
    make(root, served)
    is_whole(root)
    assert sorted(served.asked.values()) == [1] * 15 + [2] * 3


def test_a_caption_of_the_manifest_in_the_captioners_name_is_none_of_its_own(
    films: list[Path], planned: Planned, made_alone: MakeAlone, tmp_path: Path, served: FakeEndpoint
) -> None:
    root = str(tmp_path / "d")
    theirs = {"captions": [{"text": "by hand", "source": "fake"}]}
    about: list[dict[str, Any]] = [theirs, theirs, *[{} for _ in range(4)]]
    made_alone(sources(listed(tmp_path, films, about)), root)
    make(root, served)
    assert by_film(root, "caption-fake")["0"] == [[Caption("by hand", source="fake")]] * 3 and len(served.asked) == 12
    # withdrawn, it is not kept as if the captioner had made it
    about[0] = {"label": "0"}
    planned(sources(listed(tmp_path, films, about)), root)
    make(root, served)
    assert not any(each.text == "by hand" for clip in by_film(root, "caption-fake")["0"] for each in clip)
    assert len(served.asked) == 15 and set(served.asked.values()) == {1}


def test_a_captioner_has_not_answered_because_a_manifest_names_it(
    films: list[Path], made_alone: MakeAlone, tmp_path: Path, served: FakeEndpoint
) -> None:
    root = str(tmp_path / "d")
    theirs = {"captions": [{"text": "by hand", "source": "fake"}]}
    made_alone(sources(listed(tmp_path, films, [theirs] * 6)), root)
    make(root, served)
    assert not served.asked and not caption._is_proven(root, "caption-fake")


def test_what_was_answered_before_a_video_came_is_not_asked_again(
    films: list[Path], planned: Planned, made_alone: MakeAlone, tmp_path: Path, served: FakeEndpoint
) -> None:
    root = str(tmp_path / "d")
    made_alone(sources(listed(tmp_path, films[:4], [{}] * 4)), root)
    assert make(root, served, Meter(None, 5, None))["spent"] and kept(root)
    assert caption._is_proven(root, "caption-fake")
    made_alone(sources(listed(tmp_path, films, [{}] * 6)), root)
    assert make(root, served)["asked"] == 13
    is_whole(root)
    assert set(served.asked.values()) == {1} and not kept(root)


def test_the_columns_name_depends_on_what_decides_the_texts(tmp_path: Path, served: FakeEndpoint) -> None:
    def name(**changed: Any) -> str:
        made, _ = caption._captioner(config(**{"model": "m", "endpoint": served.url} | changed))
        return captions.column_name(made, "")

    same = name()
    assert name(concurrency=3, max_requests=5, tries=9) == same
    assert name(endpoint=served.url.replace("127.0.0.1", "localhost")) == same
    others = [name(model="n"), name(prompt="p"), name(frames=2), name(side=64), name(max_characters=9),
              name(answer_tokens=9), name(settings={"seed": 1}), name(send="clip"), captions.column_name({}, "")]  # fmt: skip
    assert len({same, *others}) == 10
    one, other = config(model="m", endpoint="http://a/v1"), config(model="m", endpoint="http://b/v1")
    assert content(one) == content(other) and names(one) != names(other)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"endpoint": "http://x/v1"}, "endpoint: needs the name of a model"),
        ({"endpoint": "x", "model": "m"}, "endpoint: x is no address"),
        ({"key_env": "K", "model": "m"}, "key_env and send: clip are for an endpoint"),
        ({"prompt": "a {dog}"}, r"unknown \{dog\}; there are \{frames\}, \{seconds\}, \{label\}"),
        ({"patience_seconds": 4000}, "run.stall_seconds 3600 must be more"),
        *(
            (
                {"key_env": key, "endpoint": "http://x/v1", "model": "m"},
                "key_env\n.* is no name of an environment variable",
            )
            for key in ("sk-Secret", "", "1SecretA", "Secret\n", ["Secret"])
        ),
        *(
            ({"settings": {"seed": 1, "Wrong": value}}, "settings\n.*Wrong: has a value that is no JSON; write a text")
            for value in (float("nan"), [float("inf")], {"on": date(2020, 1, 1)}, b"Secret", "\ud800", {1, 2})
        ),
        *(
            ({"settings": {name: "Secret"}}, f"settings\n.*{name}: is the stage's own; leave it out")
            for name in ("model", "messages", "response_format")
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        config(**settings)
    assert "Secret" not in str(caught.value)
    line = recipe.first_line(caught.value, "stages.said", caption.Config)  # type: ignore[arg-type]
    assert "Secret" not in line and "\n" not in line


def test_what_is_not_there_is_said_before_any_work(
    root: str, tmp_path: Path, served: FakeEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    for settings, says in (
        (
            {"model": "m", "endpoint": served.url, "key_env": "NO_SUCH_KEY"},
            "environment variable NO_SUCH_KEY is not set",
        ),
        ({"model": "m", "endpoint": "http://127.0.0.1:9/v1"}, "endpoint: http://127.0.0.1:9/v1: does not answer"),
        ({"model": str(tmp_path / "none")}, r"no model here \(no config.json\)"),
        ({"model": str(tmp_path / "pickled")}, "has no weights in safetensors"),
    ):
        with pytest.raises(UserError, match=says):
            run(root, tmp_path / "out", **settings)
    with pytest.raises(UserError, match="no dataset here"):
        run(str(tmp_path / "none"), tmp_path / "out")


# With Ray.


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_stage_asks_about_clips_without_captions_alone(
    films: list[Path], made_alone: MakeAlone, tmp_path: Path, served: FakeEndpoint
) -> None:
    root = str(tmp_path / "d")
    made_alone(sources(listed(tmp_path, films, [{"caption": "said"}, *[{}] * 4, {"shots": [[0, 1, "shot"]]}])), root)
    with pytest.raises(
        Failure, match=r"the budget of 6 requests is used up: 6 clips were answered in this run, 8 are left"
    ):
        run(root, tmp_path / "out", model="fake", endpoint=served.url, max_requests=6, workers=2, concurrency=2)
    result = run(root, tmp_path / "out", model="fake", endpoint=served.url, workers=2)
    record = read_captions(result["uri"])
    assert (
        record.captioner["model"] == "fake"
        and record.counts["source/fake"] == 14 == result["metrics"]["asked_clips"] + 6
    )
    assert record.counts["source/manifest"] == 3 and record.counts["clips_without"] == 0
    assert set(served.asked.values()) == {1} and len(served.asked) == 14
    assert not kept(root)
    assert caption.complete(result["uri"]) and not list(verify(root))
    # a view: others are left out, and are another column
    keep = by_shard_view(root, tmp_path)
    other = caption.run(
        config(model="fake", endpoint=served.url), {"dataset": root, "view": keep}, str(tmp_path / "o2")
    )
    assert other["column"] != result["column"]
    assert read_captions(other["uri"]).counts["reason/not_in_view"] > 0


def by_shard_view(root: str, tmp_path: Path) -> str:
    """A view of the first clips of sources."""
    from longtake.datasets import view

    tables = []
    for split in schema.SPLITS:
        found = [row["key"] for row in index.read_all(root, split).to_pylist()]
        tables.append(view.rows(split, found, [None if key.endswith("-00000") else "later" for key in found]))
    view.write(str(tmp_path / "v.parquet"), pa.concat_tables(tables), {})
    return str(tmp_path / "v.parquet")


SCRIPT = """
import json, sys
from longtake.datasets.errors import Failure
from longtake.pipeline.captioner import endpoint
from longtake.pipeline.stages import caption
if __name__ == "__main__":
    try:
        caption.run(caption.Config.model_validate_json(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
    except Failure as e:
        sys.exit(str(e))
"""


FAULTS = ["busy", "down", "drop", "torn", "cut", "wrong", "empty", "stalls", "null", "drips_error"]
MORE_FAULTS = ["drips", "drips_usage", "floods_error", "huge", "deep", "nonsense", "limited", "blank", "endless", "refuses",
               "torn_with_key", "cut_with_key", "wrong_with_key", "refuses_with_key", "down_with_key"]  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize(("kills", "bad"), [(1, FAULTS), (8, FAULTS + MORE_FAULTS)], ids=["1", "8"])
def test_killed_at_any_moment_nothing_is_lost_or_doubled_and_what_is_kept_is_not_asked_again(
    root: str,
    tmp_path: Path,
    served: FakeEndpoint,
    kills: int,
    bad: list[str],
    victims: Callable[[int], list[psutil.Process]],
) -> None:
    """The endpoint fails, stalls and lies all the while, and in the long form always at one clip."""
    rng = np.random.default_rng(kills)
    # a good answer must not come too late, however busy the machine
    served.key, served.stall, served.always, timeout = KEY, 3.5, "slow", 3.0
    for number, key in enumerate(keys(root)):
        some = [bad[n] for n in rng.permutation(len(bad))[:2]]
        served.moods[reply.token_of(key)] = [*some, "odd_usage"][number % 2 :]
    lost = keys(root)[int(rng.integers(18))] if kills > 1 else ""
    served.moods[reply.token_of(lost)], served.lasting = [], {reply.token_of(lost): "down"}
    settings = {
        "concurrency": 2,
        "timeout_seconds": timeout,
        "patience_seconds": 20,
        "tries": 5,
        "key_env": "CAPTION_KEY",
    }
    chosen = config(model="fake", endpoint=served.url, **settings).model_dump_json()
    command = [sys.executable, "-P", "-c", SCRIPT, chosen, json.dumps({"dataset": root}), str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"CAPTION_KEY": KEY}
    errors = tmp_path / "errors.txt"
    done: dict[str, int] = {}  # requests about the clips that are committed, or whose answer is kept

    def start() -> subprocess.Popen[bytes]:
        with errors.open("wb") as file:
            return subprocess.Popen(command, env=environment, start_new_session=True, stderr=file)

    def is_quiet() -> None:
        """Nothing of what was done is asked about again."""
        assert {key: served.asked[reply.token_of(key)] for key in done} == done

    for _ in range(kills):
        before, child = served.answered.total(), start()
        deadline = time.time() + 120
        while child.poll() is None and served.answered.total() < before + 4 and time.time() < deadline:
            time.sleep(0.02)
        if child.poll() is not None:
            break  # there was nothing left to do
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        time.sleep(served.stall)  # requests of the dead still end
        is_quiet()
        columns = {path.name.split(".")[1] for path in Path(root).glob("*/*.caption-*.parquet")}
        rows = [*kept(root), *(row for column in columns for row in rows_of(root, column))]
        done = {row["key"]: served.asked[reply.token_of(row["key"])] for row in rows}
    # a worker that dies is started again, and the job goes on
    before, child = served.answered.total(), start()
    while child.poll() is None and served.answered.total() < before + 2:
        time.sleep(0.02)
    for worker in victims(child.pid):
        if "MapWorker" in " ".join(worker.cmdline()):
            worker.kill()
    assert child.wait(300) == 0, errors.read_text(errors="replace")[-2000:]
    is_quiet()
    column = read_captions(str(tmp_path / "out")).column
    rows = rows_of(root, column)
    assert sorted(row["key"] for row in rows) == sorted(keys(root))
    for row in rows:
        if row["key"] == lost:
            assert row["reason"] == "unanswered: HTTP 503 <html>"
        else:
            text = caption_of(reply.token_of(row["key"]))
            assert records.rows_to_captions(row["captions"]) == [Caption(text, source="fake")]
    # only what was under way at a kill may be answered twice
    assert served.answered.total() <= len(keys(root)) + 2 * (kills + 1)
    assert not list(verify(root)) and caption.complete(str(tmp_path / "out")) and not kept(root)
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
