"""What a search opens: an encoder's folder here, and nothing else that a dataset names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pictures
from PIL import Image

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.datasets.scores import Column, Field
from longtake.pipeline import queries
from longtake.pipeline.scorers import embedding, torchscript


def column_of(scorer: str, config: dict[str, Any], digest: str = "") -> Column:
    plain = {"embedding": embedding, "torchscript": torchscript}[scorer].Config.model_validate(config).model_dump()
    return Column("score-clip-0", scorer, plain, digest, (Field("vector", "vector", "made up", width=5),))


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be opened."""

    def refuse(*_: Any) -> None:
        raise AssertionError("opened")

    for name in ("read", "read_range", "exists"):
        monkeypatch.setattr(storage, name, refuse)
    monkeypatch.setattr(torchscript, "load_torchscript", refuse)


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(
    ("scorer", "config"),
    [
        ("embedding", {"model": "http://127.0.0.1:1/net.pt"}),
        ("embedding", {"model": "s3://bucket/net.pt"}),
        ("embedding", {"model": "SCRIPT"}),
        ("torchscript", {"file": "SCRIPT"}),
        ("torchscript", {"file": "http://127.0.0.1:1/net.pt"}),
        ("embedding", {"model": "FOLDER", "head": "http://127.0.0.1:1/head.safetensors"}),
        ("embedding", {"model": "FOLDER", "head": "/dev/zero"}),
        ("embedding", {"model": "FOLDER", "likeness": {"dog": "http://127.0.0.1:1/dog.png"}}),
    ],
)
def test_a_search_opens_no_file_and_no_address_that_a_dataset_names(
    scorer: str, config: dict[str, Any], picture: str, tmp_path: Path
) -> None:
    # its digest would be right: it is the dataset's as well
    places = {"SCRIPT": tiny_pictures.script(tmp_path / "net.pt", 5), "FOLDER": str(tmp_path)}
    column = column_of(scorer, {key: places.get(str(value), value) for key, value in config.items()})
    with pytest.raises(UserError, match=r"^score-clip-0: .* not opened") as error:
        queries.of_picture(column, "vector", picture)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^score-clip-0: .*(not opened|encodes no texts)"):
        queries.of_text(column, "a dog")


def test_what_is_named_is_run_only_if_it_made_the_column(
    picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, other = (tiny_pictures.script(tmp_path / f"{seed}.pt", 5, seed) for seed in (0, 1))
    for scorer, key in (("torchscript", "file"), ("embedding", "model")):
        column = column_of(scorer, {key: "http://127.0.0.1:1/net.pt", "size": 32}, torchscript.digest_of(script))
        vector = queries.of_picture(column, "vector", picture, script)
        assert vector.shape == (5,) and np.ptp(vector) > 0
        with monkeypatch.context() as patched:
            patched.setattr(torchscript, "load_torchscript", lambda *_: pytest.fail("run"))
            with pytest.raises(UserError, match=r"1\.pt: other files than those that made it"):
                queries.of_picture(column, "vector", picture, other)
    with pytest.raises(UserError, match="its notes are no settings of `torchscript`"):
        queries.of_picture(
            replace(column, scorer="torchscript", config={"frames": -1, "file": script}), "vector", picture
        )
    with pytest.raises(UserError, match="made by `focus`, which encodes no pictures"):
        queries.of_picture(replace(column, scorer="focus"), "vector", picture)
