"""The script for a GPU, with tiny models on this machine: its parts, its results, and what it does when one fails."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hanging
import psutil
import pytest
import torch
from same_draws import SameDraws

PROGRAM = Path(__file__).resolve().parent / "benchmarks" / "gpu.py"


def gpu(out: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Its exit status, what it wrote, and what it printed."""
    command = [sys.executable, str(PROGRAM), *words, "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text()), done.stdout


@pytest.mark.soak
def test_parts_are_measured_and_those_that_are_there_are_not_again(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    code, kept, printed = gpu(out, "correct/latte", "mfu/latte", "memory/latte", "loader/latents")
    parts = kept["parts"]
    assert code == 0 and kept["missing"] == [], printed
    # what is worth most comes first
    assert list(parts) == ["mfu/latte", "correct/latte", "memory/latte", "loader/latents"]
    assert parts["correct/latte"]["within"] and parts["correct/latte"]["engines"]["model"]["draws"] > 0
    # of no other family
    assert [path.name for path in (tmp_path / "gpu.json.cpu").iterdir()] == ["latte.pt"]
    assert parts["mfu/latte"]["tflops"] > 0 and parts["mfu/latte"]["seconds_backward"] > 0
    assert parts["memory/latte"]["said_to_measured"] == pytest.approx(1, rel=0.1)
    assert 0 <= parts["loader/latents"]["data_wait_share"] <= 1
    code, again, printed = gpu(out, "correct/latte", "mfu/latte")
    assert code == 0 and again["parts"] == parts and "2 of 2 parts are there" in printed


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_all_parts_run_with_tiny_models(tmp_path: Path) -> None:
    code, kept, printed = gpu(tmp_path / "gpu.json", "--minutes", "29", "--most", "10")
    assert code == 0, printed
    assert 0 < kept["parts"]["latents"]["share_of_encode"] < 1.5 and kept["parts"]["correct/backbone"]["within"]


@pytest.mark.slow
def test_without_time_parts_are_missing_and_with_another_machine_nothing_is_mixed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    code, kept, printed = gpu(out, "mfu/latte", "correct/latte", "--minutes", "0.001")
    assert code == 3 and kept["parts"] == {} and kept["missing"] == ["mfu/latte", "correct/latte"]
    assert "missing after 0.001 minutes: mfu/latte, correct/latte; the same command continues" in printed
    out.write_text(json.dumps({"machine": kept["machine"] | {"device": "another"}, "parts": {}}))
    command = [sys.executable, str(PROGRAM), "mfu/latte", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "is of" in done.stderr and "name another file" in done.stderr


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    return importlib.import_module("gpu")


def test_a_part_that_hangs_ends_with_all_it_has_started_and_the_others_go_on_while_there_is_time(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: now))
    names = ("good", "hangs", "good", "hangs", "good")
    results = script.results(names, tmp_path, True, 8.0, 240.0, hanging.work)
    found = [next(results), next(results)]
    begun = _begun(tmp_path)
    # the process that has this one hangs next, maybe before we look
    found.append(next(results))
    assert found == [("good", {"of": "good"}), ("hangs", {"error": "took more than 8 s"}), ("good", {"of": "good"})]
    assert _ended(begun) and len(begun) == 2
    # the part that runs has no result, and none comes after it
    now = 238.5
    assert not list(results)
    assert _ended(_begun(tmp_path))


def _begun(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir()]


def _ended(pids: list[int]) -> bool:
    """Whether these processes end, which takes a moment after a kill; a zombie has ended."""
    end = time.monotonic() + 20
    while (running := [pid for pid in pids if _runs(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return not running


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
