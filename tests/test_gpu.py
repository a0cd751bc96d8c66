"""The script for a GPU, with tiny models on this machine: its parts, its results, and what it does when one fails."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from same_draws import SameDraws

PROGRAM = Path(__file__).resolve().parent / "benchmarks" / "gpu.py"


def gpu(out: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Its exit status, results by part, and what it printed."""
    command = [sys.executable, str(PROGRAM), *words, "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text())["parts"], done.stdout


@pytest.mark.slow
def test_parts_are_measured_and_those_that_are_there_are_not_again(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    code, parts, printed = gpu(out, "correct/latte", "mfu/latte", "memory/latte", "loader/latents")
    assert code == 0, printed
    assert parts["correct/latte"]["within"] and parts["correct/latte"]["engines"]["model"]["draws"] > 0
    assert parts["mfu/latte"]["tflops"] > 0 and parts["mfu/latte"]["seconds_backward"] > 0
    assert parts["memory/latte"]["said_to_measured"] == pytest.approx(1, rel=0.1)
    assert 0 <= parts["loader/latents"]["data_wait_share"] <= 1
    code, again, printed = gpu(out, "correct/latte", "mfu/latte")
    assert code == 0 and again == parts and "2 of 2 parts are there" in printed


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_all_parts_run_with_tiny_models(tmp_path: Path) -> None:
    code, parts, printed = gpu(tmp_path / "gpu.json", "--minutes", "10")
    assert code == 0, printed
    assert 0 < parts["latents"]["share_of_encode"] < 1.5 and parts["correct/backbone"]["within"]


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_an_error_and_is_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    code, parts, _ = gpu(out, "mfu/latte", "--minutes", "0.001")
    assert code == 1 and parts["mfu/latte"]["error"].startswith("took more than 0")
    machine = json.loads(out.read_text())["machine"]
    out.write_text(json.dumps({"machine": machine | {"device": "another"}, "parts": {}}))
    command = [sys.executable, str(PROGRAM), "mfu/latte", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "is of" in done.stderr and "name another file" in done.stderr


def draws(device: str, generator: torch.Generator | None) -> list[torch.Tensor]:
    x = torch.zeros(3, 2, device=device)
    with SameDraws(5):
        made = [torch.randn(3, device=device, generator=generator), torch.randint(9, (4,), device=device)]
        made += [torch.rand_like(x), x.clone().normal_(generator=generator), torch.randperm(7, device=device)]
        return [*made, torch.nn.init.uniform_(x), torch.multinomial(torch.ones(4, device=device), 2)]


def test_draws_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = draws("cpu", None)
    torch.manual_seed(2)
    second = draws("cpu", torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({float(tensor.float().sum()) for tensor in first}) == len(first)
    # they are made on the CPU: on a device without values they would have none
    with pytest.raises(NotImplementedError, match="meta"):
        draws("meta", None)[3].tolist()
