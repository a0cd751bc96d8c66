"""The README's example of a new objective does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def example() -> str:
    (found,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        if "Objective" in code
    ]
    return found


@pytest.mark.slow
def test_the_example_of_a_new_objective_trains_and_goes_on(dataset: str, tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(example())
    assert len([line for line in example().splitlines() if line.strip()]) <= 40
    for steps in (20, 40):
        script.write_text(example().replace("steps=40", f"steps={steps}"))
        command = [sys.executable, "-P", str(script), dataset, str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert not done.returncode, done.stderr
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*")) == ["step-00000020", "step-00000040"]
    weights = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
