"""Curation by words: rules on captions, clips that say the same, scores by a prompt."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import spoken
import torch
from pydantic import ValidationError

from longtake.datasets import schema, view
from longtake.datasets.captions import Caption
from longtake.datasets.errors import Failure, UserError
from longtake.pipeline import described
from longtake.pipeline.stages import curate

SAID = [
    [Caption("A red square moves", language="en"), Caption("rot", language="de")],
    [Caption("a dog", language="en")],
    None,
    [Caption("")],
    [Caption("ROT", language="de"), Caption("a  red square moves\n", language="en")],
    [Caption("Ein Hund läuft 🐕", language="de"), Caption("logo in the corner")],
]


@pytest.fixture
def own(dataset: str, tmp_path: Path) -> str:
    """A copy of the dataset whose clips, by their keys in order, have the captions of SAID again and again."""
    folder = str(shutil.copytree(dataset, tmp_path / "own"))
    said = {key: SAID[n % len(SAID)] for n, key in enumerate(sorted(spoken.keys(folder)))}
    spoken.describe(folder, said)
    return folder


def run(folder: str, tmp_path: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """The view by key; its captions are those of `own`."""
    inputs = {"dataset": folder, "captions": spoken.record(tmp_path / "captions", folder)}
    inputs |= {"text": options["text"]} if "text" in options else {}
    settings = {"kind": "curate", "dataset": "x", "captions": "y", "rules": {}, "exact_duplicates": False, **options}
    result = curate.run(curate.Config.model_validate(settings), inputs, "work/some")
    return {row["key"]: row for row in view.read_view(result["uri"]).to_pylist()}


def kept(rows: dict[str, dict[str, Any]]) -> set[int]:
    """The entries of SAID whose clips stay; all clips of an entry share its fate."""
    fates: dict[int, set[bool]] = {}
    for n, key in enumerate(sorted(rows)):
        fates.setdefault(n % len(SAID), set()).add(rows[key]["keep"])
    assert all(len(fate) == 1 for fate in fates.values())
    return {entry for entry, fate in fates.items() if fate == {True}}


@pytest.mark.parametrize(
    ("rules", "stay", "reason"),
    [
        ({}, {0, 1, 3, 4, 5}, "no caption"),
        ({"missing": True}, {0, 1, 2, 3, 4, 5}, None),
        ({"min_words": 1}, {0, 1, 4, 5}, "caption: fewer than 1 words"),
        ({"min_words": 3}, {0, 4, 5}, "caption: fewer than 3 words"),
        ({"languages": ["en"]}, {0, 1, 4}, "caption: not in en"),
        ({"languages": ["de", "fr"], "missing": True}, {0, 2, 4, 5}, "caption: not in de, fr"),
        ({"match": r"(?i)\bRED\b"}, {0, 4}, r"caption: without (?i)\bRED\b"),
        ({"match": "läuft 🐕$"}, {5}, "caption: without läuft 🐕$"),
        ({"avoid": "logo|dog"}, {0, 3, 4}, "caption: with logo|dog"),
    ],
)
def test_a_clip_stays_by_what_is_said_of_it(
    own: str, tmp_path: Path, rules: dict[str, Any], stay: set[int], reason: str | None
) -> None:
    rows = run(own, tmp_path, caption_rules=rules)
    assert kept(rows) == stay
    assert reason is None or reason in {row["reason"] for row in rows.values()}


def test_of_clips_that_say_the_same_one_stays(own: str, tmp_path: Path) -> None:
    rows = run(own, tmp_path, caption_rules={"duplicates": True, "missing": True})
    entries = [n % len(SAID) for n, key in enumerate(sorted(rows)) if rows[key]["keep"]]
    # entries 0 and 4 say the same in another order; nothing said is like nothing else
    assert sorted(entry for entry in entries if entry != 2) in ([0, 1, 3, 5], [1, 3, 4, 5])
    assert entries.count(2) == sum(n % len(SAID) == 2 for n in range(len(rows)))


def test_captions_are_found_by_clip_whatever_the_order(own: str) -> None:
    tables = []
    for split in schema.SPLITS:
        keys = described.index.read_all(own, split)["key"]
        columns = {"key": keys, "split": pa.repeat(split, len(keys)), "row": np.arange(len(keys))}
        tables.append(pa.table(columns))
    clips = pa.concat_tables(tables)
    clips = clips.take(pa.array(np.random.default_rng(0).permutation(len(clips))))
    folder = Path(own).parent / "captions"
    found = described.captions_of(own, spoken.record(folder, own), clips).to_pylist()
    order = {key: n for n, key in enumerate(sorted(spoken.keys(own)))}
    for key, row in zip(clips["key"].to_pylist(), found, strict=True):
        said = SAID[order[key] % len(SAID)]
        assert (row is None) == (said is None)
        assert said is None or [one["text"] for one in row] == [one.text for one in said]


@pytest.fixture
def prompted(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A copy of the dataset with `spoken.colours` as captions, and the record of their states."""
    folder = str(shutil.copytree(dataset, tmp_path / "prompted"))
    monkeypatch.setattr("longtake.text_encoder", lambda **_: spoken.Counting(), raising=False)
    return folder, spoken.column(tmp_path / "text", folder)


def test_a_prompt_scores_clips_by_their_nearest_caption(prompted: tuple[str, str], tmp_path: Path) -> None:
    folder, text = prompted

    def curated(**options: Any) -> dict[str, dict[str, Any]]:
        settings = {"kind": "curate", "dataset": "x", "text": "y", "rules": {}, "exact_duplicates": False, **options}
        result = curate.run(
            curate.Config.model_validate(settings), {"dataset": folder, "text": text}, f"work/{len(options)}"
        )
        return {row["key"]: row for row in view.read_view(result["uri"]).to_pylist()}

    rows = curated(prompts={"reds": "a red square"})
    words = spoken.Counting()

    def mean(one: str) -> torch.Tensor:
        return words.encode([one])[0].float().mean(0)

    for split in schema.SPLITS:
        for shard in described.index.read_shards(folder, split):
            for number, key in enumerate(shard.table["key"].to_pylist()):
                said: Sequence[str] = spoken.colours(number)
                similar = [float(torch.cosine_similarity(mean("a red square"), mean(one), dim=0)) for one in said]
                score = rows[key]["reds"]
                assert score == (pytest.approx(max(similar), abs=1e-5) if said else None)
    dropped = curated(prompts={"reds": "a red square"}, rules={"reds": {"min": 0.999}})
    assert {row["reason"] for row in dropped.values()} == {None, "reds < 0.999"}
    assert all(row["keep"] == (row["reds"] is None or row["reds"] >= 0.999) for row in dropped.values())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"caption_rules": {}, "captions": None}, "caption_rules: need captions; name a `caption` stage"),
        ({"prompts": {"dogs": "a dog"}}, "prompts.dogs: needs texts; name a `cache_text` stage"),
        ({"caption_rules": {"match": "(["}}, "is no regular expression"),
        ({"caption_rules": {"match": "a\ud800"}}, r"caption_rules.match\n.*'a\\ud800' is no UTF-8; write it again"),
        ({"caption_rules": {"avoid": "\udfff"}}, "caption_rules.avoid\n.* is no UTF-8"),
        ({"caption_rules": {"languages": ["\ud800"]}}, "caption_rules.languages.0\n.* is no UTF-8"),
        ({"caption_rules": {"min_words": 10**20}}, "caption_rules.min_words\n.* less than or equal to 1048576"),
        ({"prompts": {"dogs": ""}, "text": "z"}, "prompts\n.*dogs says nothing; write what is to be seen"),
        ({"prompts": {"dogs": " \n"}, "text": "z"}, "prompts\n.*dogs says nothing"),
        ({"prompts": {"motion": "a"}, "text": "z"}, "prompts\n.*motion is the name of a column of the dataset"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        curate.Config.model_validate({"kind": "curate", "dataset": "x", "captions": "y"} | options)


def test_words_of_another_dataset_or_encoder_are_one_line(
    prompted: tuple[str, str], own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, text = prompted
    prompts = {"reds": "red"}
    with pytest.raises(UserError, match=r"^prompts\.reds: 'red red .*' has 8 tokens, and 6 fit; shorten it$"):
        run(folder, tmp_path, prompts={"reds": "red " * 7}, text=text)
    with pytest.raises(UserError, match=rf"^text: \S+ are of the dataset {folder}, not of {own}$"):
        run(own, tmp_path, prompts=prompts, text=text)
    other = spoken.Counting()
    other.digest = "another"
    monkeypatch.setattr("longtake.text_encoder", lambda **_: other, raising=False)
    config = curate.Config.model_validate({"kind": "curate", "dataset": "x", "text": "y", "prompts": prompts})
    with pytest.raises(UserError, match=r"^prompts\.reds: words is another encoder"):
        curate.run(config, {"dataset": folder, "text": text}, "work/some")
    # a shard that came after the captions
    for path in sorted(Path(own, "train").glob(f"*.{spoken.COLUMN}.parquet"))[:1]:
        path.unlink()
    with pytest.raises(Failure, match=rf"have no {spoken.COLUMN}"):
        run(own, tmp_path, caption_rules={})
