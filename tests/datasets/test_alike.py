"""Search by vectors: exact against brute force, approximate against exact, one vector or several a clip, from the command."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import scored
import tiny_pictures
import vectored
from PIL import Image

from longtake.datasets import alike, clusters, index, schema, score_columns, scores
from longtake.datasets.errors import UserError
from longtake.infra.cli import cli, exit_code
from longtake.pipeline import clustering, queries
from longtake.pipeline import column as columns
from longtake.pipeline.scorers import embedding


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "make", vectored.make_here)
    monkeypatch.setattr(clustering, "_PART_CLIPS", 64)


def column_of(url: str) -> str:
    return scores.read_scores(f"{url}-scores").columns["clip"].column


def brute(vectors: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Cosines (N,) by float64, NaN for what has no direction."""
    stored = vectors.astype(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(stored @ asked / np.linalg.norm(stored, axis=1) / np.linalg.norm(asked))


def test_exact_search_gives_what_brute_force_gives(tmp_path: Path) -> None:
    vectors = vectored.crowded(300, 12) * np.random.default_rng(1).uniform(0.5, 3, (300, 1))
    vectors[[5, 50]] = 0
    vectors[299] = np.nan
    url = vectored.make(tmp_path / "d", vectors, held_out=70)
    asked = vectors[17] * 5
    true = np.nan_to_num(brute(vectors, asked), nan=-2)
    found = alike.exact(url, column_of(url), "vector", asked, 20)
    assert found.rows[0] == 17 and np.allclose(found.cosines, np.sort(true)[::-1][:20], atol=1e-5)
    assert np.allclose(true[found.rows], found.cosines, atol=1e-5)
    assert len(alike.exact(url, column_of(url), "vector", asked, 1000).rows) == 297
    keep = np.arange(300) % 3 == 1
    kept = alike.exact(url, column_of(url), "vector", asked, 20, keep)
    assert keep[kept.rows].all() and np.allclose(kept.cosines, np.sort(true[keep])[::-1][:20], atol=1e-5)
    # of equal ones by row
    same = vectored.make(tmp_path / "same", np.ones((200, 12)), shard=30, held_out=20)
    assert alike.exact(same, column_of(same), "vector", np.ones(12), 50).rows.tolist() == list(range(50))


def test_search_in_all_clusters_is_exact_and_in_few_nearly(tmp_path: Path) -> None:
    vectors = vectored.crowded(2000, 24, 40)
    url = vectored.make(tmp_path / "d", vectors, shard=200, held_out=300)
    name = column_of(url)
    assert alike.clusters_of(url, name, "vector") is None
    record = clusters.read_clusters(vectored.run(url, f"{url}-out")["uri"])
    found = alike.clusters_of(url, name, "vector")
    assert found is not None and found.folder == record.folder
    reached = 0
    for row in range(0, 2000, 200):
        exact = alike.exact(url, name, "vector", vectors[row], 10)
        whole = alike.approximate(record, vectors[row], 10, record.counts["clusters"])
        assert np.allclose(exact.cosines, whole.cosines, atol=1e-3) and len(set(whole.rows.tolist())) == 10
        few = alike.approximate(found, vectors[row], 10, 6)
        reached += int((few.cosines >= exact.cosines[-1] - 1e-3).sum())
    assert reached > 0.9 * 100
    keep = np.arange(2000) >= 1700
    assert (alike.approximate(record, vectors[0], 10, 45, keep).rows >= 1700).all()
    # a clip that came later is in none of them
    vectored.make(tmp_path / "d", vectored.crowded(2100, 24, 40), shard=200, held_out=300)
    assert alike.clusters_of(url, name, "vector") is None


def test_several_vectors_of_a_clip_count_by_the_mean_of_their_directions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    url = vectored.make(tmp_path / "d", vectored.crowded(60, 6), shard=25)
    field = scores.Field("vector", "vector", "a vector a frame", width=6, count=4)
    column = scores.Column(scores.column_name("frames", "each"), "made-up", {}, "", (field,))
    frames = [rng.standard_normal((rng.integers(1, 5), 6)) for _ in range(60)]
    # they share one black frame, and are no more alike for it
    frames[3], frames[4] = np.eye(6)[[0, 1, 2, 3]], np.eye(6)[[0, 4, 5]]
    row = 0
    for shard in index.read_shards(url, "train"):
        values = [{"vector": each} for each in frames[row : row + len(shard.table)]]
        scores.write_shard(url, shard, column, values)
        row += len(values)
    pooled = np.stack([(each / np.linalg.norm(each, axis=1, keepdims=True)).mean(0) for each in frames])
    asked = rng.standard_normal(6)
    found = alike.exact(url, column.column, "vector", asked, 60)
    # the frames were rounded to float16 before
    assert np.allclose(np.sort(brute(pooled, asked))[::-1], found.cosines, atol=3e-3)
    assert alike.exact(url, column.column, "vector", pooled[3], 60).rows[0] == 3
    cosine = dict(zip(*map(list, alike.exact(url, column.column, "vector", pooled[3], 60)), strict=True))[4]
    assert cosine == pytest.approx(1 / np.sqrt(4 * 3), abs=3e-3)
    scored.write_record(f"{url}-scores", url, {"clip": column.column})
    record = clusters.read_clusters(vectored.run(url, f"{url}-out", clusters=1, similarity=0.8)["uri"])
    near = vectored.true_pairs(pooled, 0.8 + 3e-3)
    pairs = clusters.pairs(record).to_pydict()
    assert near <= set(zip(pairs["first"], pairs["second"], strict=True)) <= vectored.true_pairs(pooled, 0.8 - 3e-3)


def test_what_cannot_be_searched_is_said_in_one_line(tmp_path: Path) -> None:
    url = vectored.make(tmp_path / "d", vectored.crowded(20, 6))
    name = column_of(url)
    numbers = scored.write_columns(url, {"light": {"mean": "number"}})["light"]
    for column, field, vector, says in (
        (name, "vector", np.ones(7), "a vector of 7 numbers, the column has 6; encode it by the column's encoder"),
        (name, "vector", np.zeros(6), "a vector without direction"),
        (name, "vectors", np.ones(6), "has no vectors vectors; there are vector$"),
        (numbers, None, np.ones(6), "has no vectors; there are none$"),
        ("score-clop-00", "vector", np.ones(6), "no column score-clop-00; there are"),
    ):
        with pytest.raises(UserError, match=says):
            alike.exact(url, column, alike.field_of(score_columns.described(url, column), field).name, vector, 3)
    with pytest.raises(UserError, match="no sample nobody"):
        alike.vector_of(url, name, "vector", "nobody")


# The command.


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    """Exit code, lines of clips, and what was said on stderr."""
    code = exit_code(lambda: cli(["dataset", "alike", *arguments], standalone_mode=False))
    out, err = capsys.readouterr()
    # a package that is imported late may say something too
    return code, [line for line in out.splitlines() if "\t" in line], err


def test_the_command_finds_clips_by_their_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = vectored.crowded(200, 12)
    url = vectored.make(tmp_path / "d", vectors, held_out=50)
    key = alike.keys(url, np.array([160]))[0][1]
    code, lines, _ = run(capsys, url, key, "--count", "4")
    vector = alike.vector_of(url, column_of(url), "vector", key)[1]
    others = alike.exact(url, column_of(url), "vector", vector, 5).rows
    assert others[0] == 160
    expected = [key for _, key in alike.keys(url, others[1:])]
    assert code == 0 and [line.split("\t")[2] for line in lines] == expected
    assert run(capsys, url, key, "--probes", "4")[0] == 2
    vectored.run(url, f"{url}-out")
    for more in (["--probes", "99"], ["--probes", "0"]):
        assert run(capsys, url, key, "--count", "4", *more)[1] == lines
    assert key not in "".join(run(capsys, url, key)[1])
    scored.write_columns(url, {"other": {"vector": 3}})
    for arguments, says in (
        (["nobody", "--column", column_of(url)], "no sample nobody"),
        ([key], "choose one by --column"),
        ([], "name one of a clip's key, a picture and --text WORDS"),
        ([key, "--text", "a dog"], "name one of a clip's key, a picture and --text WORDS"),
        (["--text", "a dog", "--column", column_of(url)], "made by `made-up`, which encodes no texts"),
    ):
        code, _, said = run(capsys, url, *arguments)
        assert code == 2 and says in said and len(said.splitlines()) == 1


@pytest.mark.usefixtures("one_thread")
def test_the_command_finds_clips_by_pictures_and_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_pictures.folder("clip", tmp_path / "model")
    config = embedding.Config(model=model)
    column = scores.Column(
        scores.column_name("clip", "tiny"),
        "embedding",
        config.model_dump(mode="json"),
        embedding.SCORER.digest(config),
        embedding.SCORER.fields(config),
    )
    rng, pictures, text = np.random.default_rng(0), [], "a red square"
    for number in range(6):
        pictures.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((48, 40), 0).save(pictures[-1])
    vectors = [queries.of_picture(column, "vector", path) for path in pictures]
    vectors.append(queries.of_text(column, text))
    url = vectored.make(tmp_path / "d", np.stack(vectors), shard=7)
    for base in index.read_shards(url, schema.SPLITS[0]):
        scores.write_shard(url, base, column, [{"vector": vector} for vector in vectors])
    keys = [key for _, key in alike.keys(url, np.arange(7))]
    chosen = ["--column", column.column]
    for row, path in enumerate(pictures):
        assert run(capsys, url, path, *chosen)[1][0].endswith(f"train\t{keys[row]}")
    assert run(capsys, url, "--text", text, *chosen)[1][0] == f"1.0000\ttrain\t{keys[6]}"
    page = tmp_path / "page.html"
    page.write_text("<script>")
    moved = shutil.move(model, tmp_path / "moved")
    assert run(capsys, url, pictures[0], *chosen, "--encoder", str(moved))[1][0].endswith(f"train\t{keys[0]}")
    for arguments, says in (
        (["--text", " "], "--text: says nothing"),
        ([pictures[0]], "not opened unasked; if you trust it, name it by --encoder"),
        ([str(page), "--encoder", str(moved)], "not a picture"),
        ([keys[0], "--encoder", str(moved)], "is no picture's file, so that nothing is to encode"),
    ):
        code, _, said = run(capsys, url, *arguments, *chosen)
        assert code == 2 and says in said and len(said.splitlines()) == 1
