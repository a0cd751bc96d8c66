"""What keeps a training from being lost: values that are not finite, leaps, slow data, stalls, signals."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from flat import nested

from longtake.datasets.errors import Failure, Interrupted
from longtake.training import checkpoint, engines
from longtake.training.guards import Spikes, stop_signal

STAGES = pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16"])
KINDS = pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])


def fault(kind: str, *calls: int, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "calls": calls, **more}


@PRECISIONS
@STAGES
@KINDS
def test_what_is_not_finite_leaves_weights_and_averages_alone(
    tmp_path: Path, group: None, kind: str, zero_stage: int, precision: str
) -> None:
    log = small.Log()
    settings = {"zero_stage": zero_stage, "precision": precision, "ema_half_lives": [2], "skip_nonfinite": 2}
    small.fit(
        tmp_path,
        small.objective(fault=fault(kind, 3)),
        log=log,
        **settings,
        steps=4,
        checkpoint_every=1,
        keep_checkpoints=9,
    )
    assert small.same(small.weights(tmp_path, step=2), small.weights(tmp_path, step=3))
    assert not small.same(small.weights(tmp_path, step=3), small.weights(tmp_path, step=4))
    assert all(v.isfinite().all() for k in ("raw", "2") for v in small.weights(tmp_path, k).values())
    assert [m["updates_left_out"] for _, m in log.rows] == [0, 0, 1, 1]
    found = json.loads((tmp_path / "nonfinite-0.json").read_text())
    what = "gradient" if kind == "gradient" else "loss"
    assert found == {"step": 3, "what": f"{what} of generator", "keys": ["2-0", "2-1", "2-2", "2-3"]}


FUSED = [(0, "fp32", 0.0), (0, "fp32", 1.0), (0, "bf16", 1.0), (1, "fp32", 1.0), (1, "bf16", 0.0), (2, "bf16", 1.0)]


@KINDS
@pytest.mark.parametrize(("zero_stage", "precision", "clip"), FUSED)
def test_a_fused_update_that_is_left_out_is_as_if_it_had_never_been(
    tmp_path: Path, group: None, kind: str, zero_stage: int, precision: str, clip: float
) -> None:
    settings = {"fused_optimizer": True, "gradient_clip": clip, "warmup_steps": 0, "schedule": "constant"}
    settings |= {"zero_stage": zero_stage, "precision": precision}
    log, found = small.Log(), list[Any]()
    for steps, faults in ((2, {}), (3, {"fault": fault(kind, 3)})):
        engines_of, caught = engines.engines_of, list[Any]()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engines, "engines_of", lambda *a, f=engines_of, c=caught: c.append(f(*a)) or c[0])
            small.fit(
                tmp_path / kind / str(steps),
                small.objective(**faults),
                log=log,
                steps=steps,
                skip_nonfinite=1,
                **settings,
            )
        state = caught[0]["generator"].basic_optimizer.state.values()
        found.append([value.clone() for each in state for _, value in sorted(each.items())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True)) and found[0]
    assert log.rows[-1][1]["updates_left_out"] == 1
    weights = [small.weights(tmp_path / kind / str(steps)) for steps in (2, 3)]
    assert small.same(*weights)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_what_is_not_finite_on_one_rank_leaves_a_fused_update_out_on_both(
    tmp_path: Path, pair: Any, zero_stage: int
) -> None:
    settings = {"fused_optimizer": True, "precision": "bf16", "zero_stage": zero_stage, "skip_nonfinite": 1}
    settings |= {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 9}
    said = pair.work(tmp_path, {"fault": fault("gradient", 2, rank=1)}, **settings)
    assert not any("error" in each for each in said), said[0].get("message")
    assert small.same(small.weights(tmp_path, step=1), small.weights(tmp_path, step=2))
    assert not small.same(small.weights(tmp_path, step=2), small.weights(tmp_path, step=3))
    assert all(v.isfinite().all() for v in small.weights(tmp_path).values())
    assert {p.name for p in tmp_path.glob("nonfinite-*")} == {"nonfinite-0.json", "nonfinite-1.json"}


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_fused_updates_of_two_ranks_are_those_that_are_not_fused(tmp_path: Path, pair: Any, zero_stage: int) -> None:
    settings = {"precision": "bf16", "zero_stage": zero_stage, "gradient_clip": 0.05, "steps": 3}
    said = [pair.work(tmp_path / str(on), fused_optimizer=on, **settings) for on in (False, True)]
    norms = [[[values["gradient_norm_generator"] for _, values in each["log"]] for each in ranks] for ranks in said]
    assert norms[1][0] == norms[1][1] and min(norms[0][0]) > 0.05
    assert norms[1][0] == pytest.approx(norms[0][0], rel=0.01)
    assert small.close(*(small.weights(tmp_path / str(on)) for on in (False, True)), atol=1e-3)


@KINDS
def test_too_many_updates_left_out_end_the_training(tmp_path: Path, group: None, kind: str) -> None:
    what = "gradient" if kind == "gradient" else "loss"
    with pytest.raises(Failure, match=rf"{what} of generator is not finite at step 5; the batch's keys are in"):
        small.fit(tmp_path, small.objective(fault=fault(kind, 1, 4, 5)), skip_nonfinite=2)
    lines = (tmp_path / "nonfinite-0.json").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4, 5]
    assert (tmp_path / "latest").read_text() == "step-00000003"


@STAGES
def test_the_good_pass_of_an_update_left_out_leaves_no_trace(tmp_path: Path, group: None, zero_stage: int) -> None:
    """The batch of step 2 is dropped whole; what follows is what a training without it does."""
    settings = {"zero_stage": zero_stage, "accumulate": 2, "batch": 8, "steps": 3, "gradient_clip": 0}
    with_fault = small.fit(tmp_path, small.objective(fault=fault("nan", 4)), skip_nonfinite=1, **settings)

    torch.manual_seed(0)
    module = small.module()
    optimizer = small.adamw(module)
    from longtake.training.asides import pass_seed

    for step in (0, 2):
        optimizer.zero_grad()
        for number in range(2):
            x = small.rows(2 * step + number, 4)
            rng = torch.Generator().manual_seed(pass_seed(0, step, number, 0))
            noisy = x + 0.01 * torch.randn(x.shape, generator=rng)
            (small.loss_of(module, noisy) / 2).backward()
        optimizer.step()
    assert small.close(with_fault, module.state_dict())


def test_a_leap_of_the_loss_is_reported_once_and_does_not_move_the_mean(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    spikes = Spikes(tmp_path, 6.0)
    falling = [2 * 0.99**step + 0.1 * float(noise.standard_normal()) for step in range(600)]
    assert not any(spikes.begins(step, loss, ["a"]) for step, loss in enumerate(falling))
    mean = spikes.mean
    assert [spikes.begins(600 + n, 5.0, [f"k{n}"]) for n in range(3)] == [True, False, False]
    assert spikes.mean == mean and not spikes.begins(603, float("nan"), [])
    assert not spikes.begins(604, mean, []) and spikes.begins(605, 5.0, ["again"])
    found = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert [(f["step"], f["loss"], f["keys"]) for f in found] == [(600, 5.0, ["k0"]), (605, 5.0, ["again"])]
    assert found[0]["mean"] == mean


def test_a_loss_that_stays_up_is_the_new_mean(tmp_path: Path) -> None:
    spikes = Spikes(tmp_path, 6.0, memory=10)
    for step in range(50):
        spikes.begins(step, 1.0 + 0.01 * (step % 3), [])
    reported = [spikes.begins(50 + step, 3.0 + 0.01 * (step % 3), []) for step in range(40)]
    assert sum(reported) == 1 and reported[0]
    assert spikes.mean == pytest.approx(3.01, abs=0.01) and spikes.begins(99, 5.0, [])


def test_the_loop_reports_a_leap_with_its_batch(
    tmp_path: Path, group: None, capsys: pytest.CaptureFixture[str]
) -> None:
    made = small.objective()
    calls = 0

    def loss(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        value, metrics = made.loss(*arguments)
        return value, {"loss": metrics["loss"] * (100 if calls == 106 else 1)}

    log = small.Log()
    # of a step's two passes the second
    settings = {"batch": 8, "accumulate": 2, "log_every": 52, "checkpoint_every": 200}
    small.fit(tmp_path, replace(made, loss=loss), log=log, steps=53, **settings)
    found = json.loads((tmp_path / "spikes.jsonl").read_text())
    assert found["step"] == 53 and found["rank"] == 0 and found["keys"] == [f"105-{n}" for n in range(4)]
    assert "the loss leaps at step 53" in capsys.readouterr().err
    assert [values["spikes"] for _, values in log.rows] == [0, 1]


@pytest.mark.parametrize(("wait", "warned"), [(0.05, True), (0.0, False)])
def test_waiting_for_data_warns(
    tmp_path: Path, group: None, capsys: pytest.CaptureFixture[str], wait: float, warned: bool
) -> None:
    small.fit(tmp_path, stream=small.Rows(wait=wait), log_every=3, warn_data_wait=0.5)
    assert ("of the time went into waiting for data" in capsys.readouterr().err) == warned


def test_a_stop_that_the_caller_asks_for_saves_and_raises(tmp_path: Path, group: None) -> None:
    from longtake.training.config import TrainConfig
    from longtake.training.loop import train

    asked = iter([False, True])
    with pytest.raises(Interrupted, match="stopped at step 2, state saved"):
        train(
            small.objective(), small.Rows(), TrainConfig(**nested(small.SETTINGS)), tmp_path, stop=lambda: next(asked)
        )
    assert (tmp_path / "latest").read_text() == "step-00000002"
    assert small.same(small.fit(tmp_path), small.fit(tmp_path / "straight"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_raises_and_is_handled_as_before_after(
    tmp_path: Path, group: None, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped at step 4, state saved"):
        small.fit(tmp_path, small.objective(fault=fault(number.name, 4)))
    assert (tmp_path / "latest").read_text() == "step-00000004" and signal.getsignal(number) == before


def test_a_signal_in_the_middle_of_another_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Timer(threading.Timer):
        def start(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)  # handled before this call returns
            super().start()

    monkeypatch.setattr("longtake.training.guards.threading.Timer", Timer)
    with stop_signal(600, lambda: False) as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()


ALONE = """
import sys, time
sys.path.insert(0, sys.argv[1])
import small
from pathlib import Path
from longtake.training import checkpoint, engines, guards
from longtake.training.checkpoint import weights

folder, how = Path(sys.argv[2]), sys.argv[3]
write = weights.write

def slow(*arguments):
    if folder.joinpath("latest").exists():
        time.sleep(600)
    write(*arguments)

weights.write = slow if how == "save" else write
with engines.process_group():
    fault = {"kind": "SIGTERM" if how == "save" else "sleep", "calls": [5]}
    small.fit(folder, small.objective(fault=fault), stop_seconds=1, stall_seconds=2 if how == "stall" else 600)
"""


def alone(folder: Path, how: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-W", "ignore", "-c", ALONE, str(Path(small.__file__).parent), str(folder), how]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_who_cannot_save_in_time_ends_with_the_last_checkpoint_whole(tmp_path: Path, group: None) -> None:
    done = alone(tmp_path, "save")
    assert done.returncode == 1
    assert "error: train: could not save within stop_seconds (1); the last checkpoint is whole" in done.stderr
    assert (tmp_path / "latest").read_text() == "step-00000003"
    assert small.same(small.fit(tmp_path), small.fit(tmp_path / "straight")) and not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_process_alone_that_hangs_says_where_and_ends(tmp_path: Path) -> None:
    done = alone(tmp_path, "stall")
    assert done.returncode == 1
    where = "no step for 2 s (stall_seconds): rank 0 stands at step 4 in forward of generator; the last checkpoint is"
    assert where in done.stderr


@pytest.mark.slow
@STAGES
def test_what_is_not_finite_on_one_rank_is_left_out_on_both(tmp_path: Path, pair: Any, zero_stage: int) -> None:
    for kind in ("nan", "gradient"):
        folder = tmp_path / kind
        options = {"fault": fault(kind, 2, rank=1)}
        said = pair.work(
            folder, options, zero_stage=zero_stage, skip_nonfinite=1, checkpoint_every=1, keep_checkpoints=9
        )
        assert not any("error" in each for each in said), said[0].get("message")
        assert small.same(small.weights(folder, step=1), small.weights(folder, step=2))
        assert not small.same(small.weights(folder, step=2), small.weights(folder, step=3))
        assert all(v.isfinite().all() for v in small.weights(folder).values())
        stopped = pair.work(tmp_path / f"{kind}-stops", options, zero_stage=zero_stage)
        what = "gradient" if kind == "gradient" else "loss"
        assert all(f"{what} of generator is not finite at step 2" in each["message"] for each in stopped)
        assert {p.name for p in folder.glob("nonfinite-*")} == (
            {"nonfinite-1.json"} if kind == "nan" else {"nonfinite-0.json", "nonfinite-1.json"}
        )


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_rank_that_hangs_is_named_by_the_one_that_waits(tmp_path: Path, ranks: Any, zero_stage: int) -> None:
    both = ranks(2)
    both.tell(tmp_path, {"fault": fault("sleep", 4, rank=1)}, stall_seconds=4, zero_stage=zero_stage)
    assert both.end() == [1, 1], both.said(0) + both.said(1)
    assert "stands at step 3 in forward of generator; the last checkpoint is whole" in both.said(1)
    if zero_stage < 3:
        assert "rank 1 on" in both.said(0) and "is missing, last seen at step 3 in forward of generator" in both.said(0)
    assert checkpoint.meta(tmp_path / "step-00000003")["step"] == 3


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other_which_says_so(tmp_path: Path, ranks: Any, group: None) -> None:
    both = ranks(2)
    # noise is drawn by rank, and one rank goes on with what two began; slow rows let step 3 be saved before the kill
    both.tell(tmp_path, {"fault": fault("SIGKILL", 6, rank=1), "noise": 0.0}, wait=0.5, stall_seconds=10)
    said = both.answer(0)
    assert "another process is gone, at step 5 in" in said["message"], said
    assert said["step"] == "step-00000003"
    # it would wait for the other before it leaves the group
    both.processes[0].kill()
    assert both.end()[1] == -signal.SIGKILL
    goes_on, straight = (small.fit(folder, small.objective(noise=0.0)) for folder in (tmp_path, tmp_path / "straight"))
    assert small.close(goes_on, straight)


@pytest.mark.slow
def test_a_leap_on_another_rank_is_told_by_the_first_and_named(tmp_path: Path, pair: Any) -> None:
    said = pair.work(tmp_path, {"fault": fault("leap", 105, rank=1)}, steps=106, checkpoint_every=200, log_every=53)
    found = json.loads((tmp_path / "spikes.jsonl").read_text())
    assert found["step"] == 105 and found["rank"] == 1 and found["keys"] == ["104-2", "104-3"]
    assert "the loss leaps at step 105" in pair.said(0)
    assert [[values["spikes"] for _, values in each["log"]] for each in said] == [[0, 1]] * 2


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_at_the_same_step(tmp_path: Path, pair: Any) -> None:
    said = pair.work(tmp_path, {"fault": fault("SIGTERM", 4, rank=1)}, zero_stage=2)
    assert [each["message"] for each in said] == ["train: stopped at step 4, state saved"] * 2
    assert {each["step"] for each in said} == {"step-00000004"}
    resumed = pair.work(tmp_path, zero_stage=2)
    assert resumed[0]["raw"] == pair.work(tmp_path / "straight", zero_stage=2)[0]["raw"]


@PRECISIONS
@STAGES
def test_the_largest_batch_comes_first_and_changes_nothing(
    tmp_path: Path, group: None, zero_stage: int, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"zero_stage": zero_stage, "precision": precision, "ema_half_lives": [2], "steps": 3}
    settings |= {"accumulate": 2, "batch": 8}
    without = small.fit(tmp_path / "without", small.objective(starts=0), **settings)
    rehearsed = small.fit(tmp_path / "with", small.objective(starts=0, largest=16), **settings)
    assert small.same(without, rehearsed)
    assert small.same(small.weights(tmp_path / "without", "2"), small.weights(tmp_path / "with", "2"))
    assert "the largest batch, 16 windows, 512 tokens: " in capsys.readouterr().out
    assert not list((tmp_path / "with").glob("nonfinite*"))


def test_a_largest_batch_that_does_not_fit_ends_a_training_at_once(tmp_path: Path, group: None) -> None:
    made = small.objective(largest=16)

    def full(turn: Any) -> Any:
        assert turn.batch["key"][0] == "large"
        raise torch.OutOfMemoryError("full")

    with pytest.raises(Failure, match=r"out of memory at step 0 with x \(16, 32\) on this process; lower batch"):
        small.fit(tmp_path, replace(made, loss=full))
