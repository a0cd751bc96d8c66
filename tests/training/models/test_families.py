"""What a family of models costs: the page that builds one is run, and each of ours is taken away."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import latent_stages
import numpy as np
import pytest
import yaml
from flat import nested

from longtake.datasets import clip
from longtake.infra import stages
from longtake.training import models, registry
from longtake.training.registry import judge
from longtake.training.registry.gate import Gate

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "training" / "models" / "README.md").read_text()
FAMILIES = sorted(path.name for path in (ROOT / "training" / "models").iterdir() if (path / "kind.py").exists())


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The family of the page, with its rows."""
    for name, code in re.findall(r"```python (toy/\w+\.py)\n(.*?)```", PAGE, re.S):
        path = tmp_path / "family" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "family"))
    rows = re.findall(r"^(KINDS|STAGES)\[\"(\w+)\"\] = \"([\w.]+)\"", PAGE, re.M)
    assert [table for table, _, _ in rows] == ["KINDS", "STAGES"]
    for table, name, module in rows:
        monkeypatch.setitem({"KINDS": models.KINDS, "STAGES": stages.STAGES}[table], name, module)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from latent_stages.mlflow_run(tmp_path, monkeypatch)


@pytest.mark.usefixtures("toy")
def test_the_family_of_the_page_is_trained_registered_generated_served_judged_and_pulled(
    dataset: str, store: str, tmp_path: Path
) -> None:
    import mlflow
    from click.testing import CliRunner

    from longtake.infra.cli.generate import generate

    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.S)[1])["toy"]  # type: ignore[index]
    train = stages.load(settings["kind"])
    config = train.Config(**nested(settings | {"dataset": "shards", "workers": 0, "batch": 4}))
    result = train.run(config, {"dataset": dataset}, str(tmp_path / "out"))
    assert result["uri"] == "models:/toy/1" and result["metrics"].keys() >= {"error", "train_clips"}
    done = CliRunner().invoke(
        generate, ["models:/toy@champion", "--seed", "3", "--out", str(tmp_path / "x.mp4")], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    video = clip.decode((tmp_path / "x.mp4").read_bytes())
    assert video.shape == (5, 32, 32, 3)
    served = mlflow.pyfunc.load_model("models:/toy/1").predict({"seed": [3, 4]})
    assert served.shape == (2, 5, 32, 32, 3) and not np.array_equal(served[0], served[1])
    assert np.abs(served[0].astype(int) - video).mean() < 8

    # what is pulled is what was trained
    model, facts = registry.load_with_facts("models:/toy@champion")
    assert facts["model"] == "toy" and facts["lineage"]["inputs"].keys() == {"dataset"}
    colour = served[0].mean((0, 1, 2)) / 127.5 - 1
    np.testing.assert_allclose(model.get_parameter("colour").detach().flatten().numpy(), colour, atol=0.02)
    rows, _ = judge.rows_of(judge.load("models:/toy/1"), None, {"dataset": dataset}, _gate())
    assert rows and all(figures["error"] > 0 for figures in rows.values())


def _gate() -> Gate:
    return Gate(metrics={"error": {"better": "lower"}})  # type: ignore[dict-item]


IMPORT_ALL = """
import importlib, sys
from pathlib import Path

root = Path(sys.argv[1])
for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    if "dags" not in parts and "public" not in parts and parts[-1] != "__main__" and "pyfunc" not in parts:
        name = ".".join(("longtake", *parts)).removesuffix(".__init__")
        assert Path(importlib.import_module(name).__file__).is_relative_to(root), name
"""


def test_every_family_is_a_folder_with_a_row() -> None:
    assert (
        sorted({module.split(".")[3] for module in models.KINDS.values() if module.startswith("longtake.")}) == FAMILIES
    )


def test_no_line_outside_of_a_familys_folder_names_it_but_its_rows() -> None:
    """Not even one that imports when it is called, which importing all modules would not show."""
    rows = {*models.KINDS.values(), *stages.STAGES.values()}
    for part in ("datasets", "infra", "pipeline", "training"):
        for path in (ROOT / part).rglob("*.py"):
            place = path.relative_to(ROOT).parts
            own = place[2] if place[:2] == ("training", "models") else ""
            named = re.findall(rf"longtake\.training\.models\.(?:{'|'.join(FAMILIES)})[\w.]*", path.read_text())
            assert {name for name in named if name.split(".")[3] != own} <= rows, path


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_familys_folder_only_its_rows_break(family: str, tmp_path: Path) -> None:
    for part in ("datasets", "infra", "pipeline", "training"):
        shutil.copytree(ROOT / part, tmp_path / "longtake" / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "longtake" / "training" / "models" / family)
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_ALL, str(tmp_path / "longtake")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
