"""Claims: finished arms are kept, tables say what the results say, and so do the pages."""

import importlib
import json
import math
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"
PAPERS = sorted(file.stem for file in (BENCHMARKS / "claimed").glob("[!_]*.py"))


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("claims")


def claim_of(claims: ModuleType, run: Any, steps: int = 5) -> Any:
    from claimed import Shown  # type: ignore[import-not-found]

    figures = {"far": Shown("distance", "lower", "1.5 (table 2)"), "score": Shown("score", "higher")}
    arms = {"plain": {"more": 0}, "+more": {"more": 1}}
    holds = [("+more", "plain", "far")]
    return claims.Claim("pv_vae", "toy", "More is better.", arms, figures, holds, run, lambda short: {"steps": steps})


def made(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    return {"far": 1.0 + 0.1 * seed + 10 * (arm == "plain"), "score": 2.0 - short}


def test_a_finished_arm_is_not_run_again(claims: ModuleType, tmp_path: Path) -> None:
    calls = []

    def run(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
        calls.append((arm, seed, folder))
        return made(arm, seed, folder, short)

    claim = claim_of(claims, run)
    for seed in (0, 1, 0, 1):
        for arm in claim.arms:
            claims.run_one("pv_vae", claim, arm, seed, tmp_path / "out", tmp_path / "work", False)
    assert [call[:2] for call in calls] == [("plain", 0), ("+more", 0), ("plain", 1), ("+more", 1)]
    assert len({folder for _, _, folder in calls}) == 1 and calls[0][2].is_dir()
    record = json.loads((tmp_path / "out/pv_vae/toy/more-1.json").read_text())
    assert record["figures"] == {"far": 1.1, "score": 2.0} and record["seed"] == 1
    assert record["settings"] == {"steps": 5, "arm": {"more": 1}} and record["versions"]["torch"]


def test_results_of_other_settings_are_made_again_in_another_folder_and_never_shown(
    claims: ModuleType, tmp_path: Path
) -> None:
    folders = []

    def run(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
        folders.append(folder)
        return made(arm, seed, folder, short)

    for steps in (5, 6, 6):
        claim = claim_of(claims, run, steps)
        claims.run_one("pv_vae", claim, "plain", 0, tmp_path, tmp_path / "work", False)
    assert len(folders) == 2 and folders[0] != folders[1]
    assert claims.results_of(tmp_path, "pv_vae", claim)["plain"][0]["settings"]["steps"] == 6
    with pytest.raises(SystemExit, match=r"plain-0\.json: made with other settings; run pv_vae toy again"):
        claims.table(tmp_path, "pv_vae", claim_of(claims, run, 7))


def test_two_processes_do_not_work_on_the_same_seed_at_once(claims: ModuleType, tmp_path: Path) -> None:
    calls, begun, go = [], threading.Event(), threading.Event()

    def run(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
        calls.append(arm)
        begun.set()
        assert go.wait(10)
        return made(arm, seed, folder, short)

    claim = claim_of(claims, run)
    threads = [
        threading.Thread(target=claims.run_one, args=("pv_vae", claim, "plain", 0, tmp_path, tmp_path / "work", False))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    go.set()
    for thread in threads:
        thread.join(10)
    assert calls == ["plain"]


def test_a_memory_is_measured_after_so_many_steps_even_where_it_was_stopped(
    claims: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory = importlib.import_module("claimed.memory")
    model, trained, stop = torch.nn.Linear(1, 1), [0], [True]

    def train(stage: Any, config: Any, *_: Any) -> Any:
        trained[0] = max(trained[0], config.steps)  # as a training whose checkpoint has more steps
        return model

    def measured(*_: Any) -> dict[str, float]:
        if trained[0] == memory.SHORT.continued[1] and stop:
            raise KeyboardInterrupt(stop.pop())
        return {f"right {memory.LONGEST[0]}": float(trained[0])}

    monkeypatch.setattr(memory, "material", lambda *_: (memory.SHORT, None))
    monkeypatch.setattr(memory, "retriever", lambda *_: model)
    for name, fake in {"fresh": lambda *_: model, "trained": train, "returned": measured}.items():
        monkeypatch.setattr(memory.films, name, fake)
    with pytest.raises(KeyboardInterrupt):
        memory.pretraining("pretrained", 0, tmp_path, True)
    found = memory.pretraining("pretrained", 0, tmp_path, True)
    assert list(found.values()) == list(memory.SHORT.continued)


def test_all_that_a_result_depends_on_is_known_before_it_is_made(claims: ModuleType) -> None:
    for paper in PAPERS:
        for claim in claims.claims_of(paper):
            for arm in claim.arms:
                whole, short = (claims.settings_of(claim, arm, each) for each in (False, True))
                assert whole != short and "steps" in json.dumps(whole), f"{claim.name} {arm}"
            for rule in claim.holds:
                assert set(rule[:2]) <= set(claim.arms) and rule[2] in claim.figures


def test_a_table_has_spread_and_verdict(claims: ModuleType, tmp_path: Path) -> None:
    claim = claim_of(claims, made)
    assert "Not run yet" in claims.table(tmp_path, "pv_vae", claim)
    for seed in range(3):
        for arm in claim.arms:
            claims.run_one("pv_vae", claim, arm, seed, tmp_path, tmp_path / "work", False)
    table = claims.table(tmp_path, "pv_vae", claim)
    assert "Seeds: 3." in table
    assert "| distance (↓) | 11.1 ± 0.1 | 1.10 ± 0.10 | 1.5 (table 2) |" in table
    assert "| score (↑) | 2.00 ± 0.00 | 2.00 ± 0.00 | – |" in table
    assert "- +more against plain, distance: holds." in table


@pytest.mark.parametrize(
    ("better", "first", "second", "said"),
    [
        ("higher", [3.0, 3.1, 3.2], [2.0, 2.1, 2.2], "holds"),
        ("lower", [3.0, 3.1, 3.2], [2.0, 2.1, 2.2], "does not hold, the reverse does"),
        ("higher", [1.0, 2.0, 3.0], [0.9, 1.9, 2.9], "does not hold, they overlap"),
        ("higher", [3.0, 3.2], [2.0, 2.1, 2.2], "undecided, too few seeds"),
    ],
)
def test_a_claim_holds_where_the_spreads_are_apart(
    claims: ModuleType, better: str, first: list[float], second: list[float], said: str
) -> None:
    assert claims.verdict(better, first, second) == said


def test_only_what_is_between_the_marks_is_replaced(claims: ModuleType) -> None:
    page = f"before\n{claims.BEGIN}\nold\n{claims.END}\nafter\n"
    assert claims.with_block(page, "new\n") == f"before\n{claims.BEGIN}\n\nnew\n\n{claims.END}\nafter\n"
    with pytest.raises(SystemExit, match="put <!-- claims -->"):
        claims.with_block("no marks", "new")


def test_pages_say_what_the_results_say(claims: ModuleType) -> None:
    stale = [str(page) for page, block in claims.blocks(claims.RESULTS) if block not in page.read_text()]
    assert not stale, f"run `python tests/benchmarks/claims.py table --write` for {', '.join(stale)}"


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("paper", PAPERS)
def test_all_claims_run_in_their_short_form(claims: ModuleType, paper: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "claims.py"), "run", paper, "--short", "--seeds", "1"]
    subprocess.run([*command, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")], check=True)
    for claim in claims.claims_of(paper):
        for arm, records in claims.results_of(tmp_path / "out", paper, claim, short=True).items():
            assert records, f"{claim.name} {arm}"
            assert all(math.isfinite(value) for value in records[0]["figures"].values()), records[0]
