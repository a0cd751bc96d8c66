"""Where a stage's checkpoints and their copies are, and which of them a training goes on from, by a stage without a family."""

import contextlib
import json
import shutil
import sys
import uuid
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import latent_stages
import pytest
import small
from flat import nested

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.training import checkpoint, stage
from longtake.training.config import TrainConfig
from longtake.training.launch import preflight
from longtake.training.registry import lineage

pytestmark = pytest.mark.usefixtures("one_thread", "group")
PART, OTHER, ANEW = "0123456789ab", "ba9876543210", "0123456789ab-0badcafe"


class Config(TrainConfig):
    kind: Literal["toy"] = "toy"


class Toy:
    """The stage, and what it has of a model registry: `versions` {URI: (version's URI, sha256)}."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.seen, self.fails = folder, 0, False
        self.versions = {"models:/p/1": ("models:/p/1", "one"), "models:/p/2": ("models:/p/2", "two")}
        self.versions["models:/p@champion"] = self.versions["models:/p/1"]
        patch.setattr(
            lineage.store, "resolve", lambda uri: dict(zip(("uri", "sha256"), self.versions[uri], strict=True))
        )
        patch.setattr(stage.tracker, "connect", lambda folder: contextlib.nullcontext(small.Log()))
        patch.setattr(stage, "publish", lambda stage, config, inputs, folder: {"folder": folder})
        for name in ("registered", "artifacts"):
            patch.setattr(preflight, name, lambda *_: None)
        self.module: Any = ModuleType("toy_training")
        patch.setitem(sys.modules, self.module.__name__, self.module)
        self.module.Config = Config
        self.module.prepare = lambda config, inputs, folder: SimpleNamespace(model=small.module())
        self.module.loader = lambda config, setup, rank, world: self._rows(config.batch)
        self.module.objective = lambda config, setup: small.objective()
        self.module.evaluate = lambda config, setup, folder: None
        self.module.work = partial(stage.work, self.module)
        (folder / "view.parquet").write_bytes(b"a view")

    def _rows(self, batch: int) -> small.Rows:
        toy = self

        class Counted(small.Rows):
            def __iter__(self) -> Any:
                for rows in super().__iter__():
                    if toy.fails:
                        raise Failure("no data")
                    toy.seen += 1
                    yield rows

        return Counted(batch)

    def run(self, part: str = PART, inputs: dict[str, str] | None = None, **changes: Any) -> int:
        """Run the stage in the output WORKSPACE/toy/PART; returns how many steps it has trained."""
        inputs = {"view": str(self.folder / "view.parquet")} if inputs is None else inputs
        settings = small.SETTINGS | {"checkpoints": str(self.folder / "named"), "steps": 4} | changes
        before = self.seen
        made = stage.run(self.module, Config(**nested(settings)), inputs, f"s3://lab/toy/{part}")
        self.last: Path = made["folder"]
        return self.seen - before

    def recorded(self) -> dict[str, Any]:
        return dict(lineage.read(self.last)["inputs"])


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return Toy(tmp_path, monkeypatch)


@pytest.fixture
def far() -> str:
    return f"memory://{uuid.uuid4()}/copies"


def test_each_output_has_its_part_of_what_is_named() -> None:
    config = TrainConfig(run={"checkpoints": "/named", "upload": "s3://far/copies"})
    for part in ("0a1b", "0a1b-77ff"):
        place = checkpoint.place_of(config.run, f"s3://lab/my-run/vae/{part}")
        assert place == (Path("/named") / part, f"s3://far/copies/{part}")
    assert checkpoint.place_of(TrainConfig().run, "/ws/vae/0a1b-77ff") == (Path("/ws/vae/0a1b-77ff/checkpoints"), None)
    with pytest.raises(UserError, match="s3://lab/vae/0a1b is remote; name a local folder"):
        checkpoint.place_of(TrainConfig().run, "s3://lab/vae/0a1b")


def test_a_run_from_nothing_and_one_of_other_inputs_take_nothing_from_before(toy: Toy, far: str) -> None:
    assert toy.run(upload=far) == 4
    assert toy.run(ANEW, upload=far) == 4
    assert toy.run(OTHER, {"parent": "models:/p/2"}, upload=far) == 4
    assert {*storage.names(far)} == {PART, ANEW, OTHER}
    shutil.rmtree(toy.folder / "named")
    assert [toy.run(part, upload=far, steps=5) for part in (PART, ANEW)] == [1, 1], "each goes on from its own copy"


def test_a_checkpoint_of_other_inputs_in_the_same_place_is_refused_in_a_line(toy: Toy, tmp_path: Path) -> None:
    given = {"parent": "models:/p/1", "view": str(tmp_path / "view.parquet")}
    assert toy.run(inputs=given) == 4
    (tmp_path / "view.parquet").write_bytes(b"another view")
    with pytest.raises(UserError) as caught:
        toy.run(inputs=given | {"parent": "models:/p/2"})
    assert str(caught.value) == (
        f"{tmp_path}/named/{PART}: its checkpoint was made from other inputs (parent: models:/p/1 there, models:/p/2 here,"
        f" view: {tmp_path}/view.parquet has changed); bring them back, or use --force to begin anew"
    )
    (tmp_path / "view.parquet").write_bytes(b"a view")
    toy.versions["models:/p/3"] = ("models:/p/3", "one")
    assert toy.run(inputs=given | {"parent": "models:/p/3"}, steps=5) == 1, "the same weights, registered again"
    parent = latent_stages.saved(latent_stages.vae(), tmp_path / "vae")
    with pytest.raises(UserError, match=f"anchors: {parent} is another model than when this training began"):
        toy.run(inputs=given | {"anchors": parent}, steps=6)


def test_a_training_keeps_the_version_of_an_alias_on_another_machine_too(toy: Toy, far: str) -> None:
    given = {"parent": "models:/p@champion"}
    assert toy.run(inputs=given, upload=far) == 4
    toy.versions["models:/p@champion"] = toy.versions["models:/p/2"]
    shutil.rmtree(toy.folder / "named")
    assert toy.run(inputs=given, upload=far, steps=5) == 1
    assert toy.recorded()["parent"] == {"uri": "models:/p/1", "sha256": "one"}


def test_what_an_attempt_without_a_checkpoint_has_recorded_does_not_count(toy: Toy, tmp_path: Path) -> None:
    given, toy.fails = {"parent": "models:/p@champion", "view": str(tmp_path / "view.parquet")}, True
    with pytest.raises(Failure, match="no data"):
        toy.run(inputs=given)
    toy.versions["models:/p@champion"], toy.fails = toy.versions["models:/p/2"], False
    (tmp_path / "view.parquet").write_bytes(b"another view")
    assert toy.run(inputs=given) == 4
    assert toy.recorded()["parent"]["uri"] == "models:/p/2"
    assert toy.recorded()["view"] == lineage.record(given)["inputs"]["view"]


def made_before_there_were_parts(folder: Path) -> None:
    """Move checkpoints to where they were then, as they were."""
    part = folder / PART
    for path in part.iterdir():
        path.rename(folder / path.name)
    part.rmdir()
    for path in folder.glob("step-*/meta.json"):
        meta = json.loads(path.read_bytes())
        del meta["lineage"]
        path.write_text(json.dumps(meta))


def test_a_training_goes_on_where_it_began_before_there_were_parts(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "named"
    assert toy.run() == 4
    made_before_there_were_parts(named)
    assert toy.run(steps=5) == 1 and toy.last == named
    # not that of another dataset, nor of other settings
    capsys.readouterr()
    assert toy.run(steps=5, lr=0.5) == 5 and toy.last == named / PART
    line = (
        f"{named}/step-00000005: is of another training (lr: 0.01 there, 0.5 here); this one begins in {named}/{PART}"
    )
    assert line in capsys.readouterr().out.splitlines()
    (tmp_path / "view.parquet").write_bytes(b"another view")
    assert toy.run(OTHER, steps=5) == 5 and toy.last == named / OTHER
    assert f"(view: {tmp_path}/view.parquet has changed); this one begins" in capsys.readouterr().out


def test_a_training_of_fewer_steps_begins_anew_beside_one_from_before_there_were_parts(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toy.run() == 4
    made_before_there_were_parts(tmp_path / "named")
    assert toy.run(steps=3) == 3 and toy.last == tmp_path / "named" / PART
    assert "(steps: 4 there, 3 here); this one begins" in capsys.readouterr().out


def test_a_run_goes_on_from_the_copy_that_it_made_before_there_were_parts(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    far = tmp_path / "far"
    monkeypatch.setenv("MLFLOW_RUN_ID", "a" * 32)
    assert toy.run(upload=str(far)) == 4
    made_before_there_were_parts(far)
    shutil.rmtree(tmp_path / "named")
    capsys.readouterr()
    assert toy.run(upload=str(far), steps=5) == 1
    monkeypatch.setenv("MLFLOW_RUN_ID", "b" * 32)
    assert toy.run(OTHER, upload=str(far)) == 4
    assert f"{far}: its checkpoint is of run {'a' * 32}; this training begins anew" in capsys.readouterr().out
