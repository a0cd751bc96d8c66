"""The loop on two processes: the same weights as on one, whatever the ZeRO stage; what one rank meets, all act on."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
from flat import nested
from torch import nn

from longtake.training.checkpoint import resume

pytestmark = pytest.mark.slow

# a generator that must please a discriminator, both learning: the two-engine recipe in full
SCRIPT = """
import json, sys
from functools import partial
from pathlib import Path
import torch
from torch import nn
from longtake.datasets.errors import Failure
from longtake.datasets.loader import Loader, to_model
from longtake.training import checkpoint, engines
from longtake.training.models.common import adversarial
from longtake.training.loop import train
from longtake.training.objective import Objective

def colours(batch):
    return to_model(batch["video"]).mean((3, 4)).flatten(1)

class Layers(nn.Sequential):
    def forward(self, x):
        return super().forward(x.to(next(self.parameters()).dtype))

def modules():
    torch.manual_seed(0)
    return {"generator": Layers(nn.Linear(27, 8), nn.Tanh(), nn.Linear(8, 27)), "discriminator": Layers(nn.Linear(27, 8), nn.Tanh(), nn.Linear(8, 1))}

def loss(config, state, fault, turn):
    name, made, real = turn.name, turn.engines, colours(turn.batch)
    calls[name] = calls.get(name, 0) + 1
    if name == "generator":
        seeds.append(turn.seed)
        fake = made["generator"](real).float()
        turn.carry["made"] = fake.detach()
        judge = made["discriminator"]
        reconstruction = lambda shown: ((shown - real).square().mean(), {})
        if adversarial.trains_generator(config, state, turn.step):
            value, terms = adversarial.generator_loss(config, state, fake, reconstruction, judge.module)
            weights.append(float(terms["gan_weight"]))
        else:
            value, terms = reconstruction(fake)
    else:
        value, terms = adversarial.discriminator_loss(config, state, made["discriminator"], real, turn.carry["made"])
    if fault and calls[name] == fault["call"] and torch.distributed.get_rank() == fault["rank"]:
        value = value * float("nan")
    return value, {"loss": value.detach()}

def work(dataset, folder, settings, fault):
    config = adversarial.GANConfig(**settings)
    made, state = modules(), adversarial.begin(config)[1]
    own = {"discriminator": adversarial.settings(config)}
    loader = Loader(dataset, columns=("video",), frames=9, size=(32, 32), batch=config.batch, rank=rank, world=world)
    told = partial(loss, config, state, fault)
    try:
        train(Objective(made, told, lead="generator", settings=own, state=state), loader, config, folder)
    except Failure as e:
        return {"failure": str(e)}
    learned = checkpoint.Weights(checkpoint.latest(folder))
    judge, kept = checkpoint.beside(folder, "discriminator")
    learned = {name: value.tolist() for name, value in [*learned.items(), *((f"judge.{k}", v) for k, v in judge.items())]}
    return {"learned": learned, "seeds": seeds, "weights": weights, "state": kept}

if __name__ == "__main__":
    with engines.process_group() as (rank, world):
        torch.set_num_threads(1)
        for line in sys.stdin:
            job = json.loads(line)
            calls, seeds, weights = {}, [], []
            print(json.dumps(work(job["dataset"], Path(job["folder"]), job["settings"], job["fault"])), flush=True)
"""
SETTINGS: dict[str, Any] = {
    "steps": 5,
    "batch": 4,
    "lr": 1e-2,
    "workers": 0,
    "checkpoint_every": 100,
    "ema_half_lives": [],
    "gradient_clip": 0,
    "schedule": "constant",
    "gan_start": 0,
    "gan_warmup": 2,
    "discriminator_lr": 2e-2,
    "lambda_lecam": 0.1,
}


Trained = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def train(dataset: str, module_ranks: Callable[[int, str], Any]) -> Trained:
    """Trains on so many processes, which stay for the next training; returns what each says."""
    started: dict[int, Any] = {}

    def of(folder: Path, world: int, fault: Any = None, **changes: Any) -> list[dict[str, Any]]:
        if world not in started:
            started[world] = module_ranks(world, SCRIPT)
        settings = nested(SETTINGS | changes)
        started[world].send({"dataset": dataset, "folder": str(folder), "settings": settings, "fault": fault})
        return list(started[world].answers())

    return of


def plainly(dataset: str) -> dict[str, Any]:
    """The same training by hand, in plain PyTorch and one process."""
    from longtake.datasets.loader import Loader, to_model

    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(27, 8), nn.Tanh(), nn.Linear(8, 27))
    discriminator = nn.Sequential(nn.Linear(27, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizers = [small.adamw(generator), small.adamw(discriminator, lr=2e-2, betas=(0.5, 0.9))]
    batches = iter(Loader(dataset, columns=("video",), frames=9, size=(32, 32), batch=4))
    squares, weights, average_good, average_bad = [0.0, 0.0], [], 0.0, 0.0
    for step in range(SETTINGS["steps"]):
        real = to_model(next(batches)["video"]).mean((3, 4)).flatten(1)
        fake = generator(real)
        error, approval = (fake - real).square().mean(), -discriminator(fake).mean()
        pulls = [torch.autograd.grad(each, fake, retain_graph=True)[0] for each in (error, approval)]
        weight = 0.0
        if step >= 2:
            squares = [0.95 * a + 0.05 * float(pull.square().sum()) for a, pull in zip(squares, pulls, strict=True)]
            weight = 0.5 * (squares[0] / squares[1]) ** 0.5
            weights.append(weight)
        optimizers[0].zero_grad()
        (error + weight * approval).backward()
        optimizers[0].step()
        good, bad = discriminator(torch.cat([real, fake.detach()])).chunk(2)
        lecam = (good - average_bad).relu().square().mean() + (average_good - bad).relu().square().mean()
        optimizers[1].zero_grad()
        (0.5 * (torch.relu(1 - good).mean() + torch.relu(1 + bad).mean()) + 0.1 * lecam).backward()
        optimizers[1].step()
        average_good = 0.99 * average_good + 0.01 * float(good.detach().mean())
        average_bad = 0.99 * average_bad + 0.01 * float(bad.detach().mean())
    learned = {name: value.tolist() for name, value in generator.state_dict().items()}
    learned |= {f"judge.{name}": value.tolist() for name, value in discriminator.state_dict().items()}
    return {"learned": learned, "weights": weights}


def assert_close(one: dict[str, Any], other: dict[str, Any], atol: float = 1e-6, share: float = 1.0) -> None:
    """At least this share of the values of each tensor are near the other's."""
    for name, value in other.items():
        near = torch.isclose(torch.tensor(one[name]), torch.tensor(value), atol=atol)
        assert float(near.float().mean()) >= share, name


# in bf16 what a weight begins as is rounded to 8 bits, and Adam may move one whose gradient is nearly 0 the other way
EXACT, ROUNDED = {"atol": 1e-6, "rel": 1e-4, "share": 1.0}, {"atol": 3e-3, "rel": 1e-2, "share": 0.98}


@pytest.mark.parametrize(
    "zero_stage, precision",
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")],
)
def test_two_engines_on_two_processes_learn_what_plain_pytorch_learns(
    dataset: str, train: Trained, tmp_path: Path, zero_stage: int, precision: str
) -> None:
    found, second = train(tmp_path, 2, zero_stage=zero_stage, precision=precision)
    expected = plainly(dataset)
    near = EXACT if precision == "fp32" else ROUNDED
    assert_close(found["learned"], expected["learned"], near["atol"], near["share"])
    assert found["weights"] == pytest.approx(expected["weights"], rel=near["rel"]) and len(found["weights"]) == 3
    assert second["weights"] == found["weights"], "all ranks weigh the discriminator alike"
    assert second["seeds"] == found["seeds"] and len(set(found["seeds"])) == SETTINGS["steps"]


@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_training_of_two_engines_goes_on_with_another_number_of_processes(
    train: Trained, tmp_path: Path, zero_stage: int
) -> None:
    (expected,) = train(tmp_path / "straight", 1, zero_stage=zero_stage, steps=6)
    for world, steps in ((2, 2), (1, 4), (2, 6)):
        found, *_ = train(tmp_path / "elastic", world, zero_stage=zero_stage, steps=steps)
    assert_close(found["learned"], expected["learned"])
    assert found["weights"] == pytest.approx(expected["weights"][-2:], rel=1e-4)
    assert found["state"]["gan_squares"] == pytest.approx(expected["state"]["gan_squares"], rel=1e-4)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_names_the_batch(train: Trained, tmp_path: Path) -> None:
    for said in train(tmp_path, 2, fault={"call": 3, "rank": 1}):
        assert "loss of generator is not finite at step 3; the batch's keys are in" in said["failure"]
    assert [p.name for p in tmp_path.glob("nonfinite*")] == ["nonfinite-1.json"]
    assert len(json.loads((tmp_path / "nonfinite-1.json").read_text())["keys"]) == 2


STAGES = pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
QUIET = {"noise": 0.0}  # which is drawn by rank


def tensors(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in found.items()}


def norms(log: Any) -> list[dict[str, float]]:
    return [{k: v for k, v in metrics.items() if k.startswith("gradient_norm")} for _, metrics in log]


@STAGES
def test_averages_and_gradient_norms_on_two_processes_are_those_of_one(
    tmp_path: Path, group: None, pair: Any, zero_stage: int
) -> None:
    settings = {"zero_stage": zero_stage, "ema_half_lives": [0.5, 50], "gradient_clip": 0.05}
    log = small.Log()
    small.fit(tmp_path / "one", small.objective(**QUIET), log=log, **settings)
    two = pair.work(tmp_path / "two", QUIET, **settings)[0]
    for kind in ("raw", "0.5", "50"):
        assert small.close(tensors(two[kind]), small.weights(tmp_path / "one", kind)), kind
    for one, other in zip(norms(log.rows), norms(two["log"]), strict=True):
        assert set(one) == {f"gradient_norm_generator{child}" for child in ("", "/0", "/2")}
        assert other == pytest.approx(one, rel=1e-5)


@STAGES
def test_in_bf16_two_processes_learn_nearly_what_one_learns(
    tmp_path: Path, group: None, pair: Any, zero_stage: int
) -> None:
    settings = {"zero_stage": zero_stage, "ema_half_lives": [0.5], "precision": "bf16", "lr": 1e-3}
    log = small.Log()
    small.fit(tmp_path / "one", small.objective(**QUIET), log=log, **settings)
    two = pair.work(tmp_path / "two", QUIET, **settings)[0]
    for kind in ("raw", "0.5"):
        # Adam's first steps have the size of the rate whatever the gradient's
        assert small.close(tensors(two[kind]), small.weights(tmp_path / "one", kind), atol=2e-3), kind
    for one, other in zip(norms(log.rows), norms(two["log"]), strict=True):
        assert other == pytest.approx(one, rel=0.05)


def test_losses_are_means_over_passes_steps_and_ranks_whatever_each_rank_tells(tmp_path: Path, pair: Any) -> None:
    told = [[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, float("nan")]]
    settings = {"steps": 2, "batch": 8, "accumulate": 2}
    each, both = (pair.work(tmp_path / str(n), {"told": told}, **settings, log_every=n) for n in (1, 2))
    for said in each:
        assert [values["loss"] for _, values in said["log"]] == [5.5, (2 + 3 + 12) / 3]
        assert [values["only_of_0"] for _, values in said["log"]] == [0.5, 2.5]
    for said in both:
        ((step, values),) = said["log"]
        assert step == 2 and values["loss"] == pytest.approx(39 / 7) and values["only_of_1"] == 11


@STAGES
def test_two_processes_share_heldout_clips_and_find_what_one_finds(
    tmp_path: Path, group: None, pair: Any, zero_stage: int
) -> None:
    settings = {"zero_stage": zero_stage, "ema_half_lives": [2], "heldout_every": 3}
    options, log = QUIET | {"heldout": 3}, small.Log()
    small.fit(tmp_path / "one", small.objective(**options), log=log, **settings)
    two = pair.work(tmp_path / "two", options, **settings)
    plain = pair.work(tmp_path / "plain", QUIET, **settings)
    assert two[0]["raw"] == plain[0]["raw"] and two[0]["2"] == plain[0]["2"]
    expected = [row["heldout/loss"] for _, row in log.rows if "heldout/loss" in row]
    for said in two:
        assert [row["heldout/loss"] for _, row in said["log"] if "heldout/loss" in row] == pytest.approx(expected)
    assert len(expected) == 2


PLACES = [
    *((f"averages-{stage}", stage, QUIET, {"ema_half_lives": [2, 50]}) for stage in (0, 1, 2, 3)),
    *((f"freeze-{stage}", stage, QUIET, {"freeze": ["0.weight", "2.bias"]}) for stage in (2, 3)),
    # one tensor learns, so that a rank has no average of any
    ("freeze-0", 0, QUIET, {"freeze": ["0", "2.bias"]}),
    *((f"lora-{stage}", stage, QUIET | {"kind": "clip"}, {"lora": {"rank": 2}}) for stage in (1, 3)),
    *((f"starts-{stage}", stage, QUIET | {"starts": 3}, {}) for stage in (1, 3)),
    *((f"bf16-{stage}", stage, QUIET, {"precision": "bf16", "lr": 1e-3}) for stage in (0, 1, 2)),
]


@pytest.mark.parametrize(("zero_stage", "options", "more"), [p[1:] for p in PLACES], ids=[str(p[0]) for p in PLACES])
def test_what_two_processes_began_one_and_then_two_go_on_with(
    tmp_path: Path,
    group: None,
    pair: Any,
    zero_stage: int,
    options: dict[str, Any],
    more: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That the converter runs in a process of its own is shown by the training of two engines."""
    monkeypatch.setattr(resume, "subprocess", SimpleNamespace(run=small.converted_here))
    settings: dict[str, Any] = {"zero_stage": zero_stage, "ema_half_lives": [2], **more}
    kinds = ["raw", *(str(life) for life in settings["ema_half_lives"])]
    small.fit(tmp_path / "straight", small.objective(**options), **settings)
    folder = tmp_path / "elastic"
    said = pair.work(folder, options, **settings, steps=2)
    assert not any("error" in each for each in said), said
    small.fit(folder, small.objective(**options), **settings, steps=4)
    said = pair.work(folder, options, **settings)
    assert not any("error" in each for each in said), said
    exact = more.get("precision") != "bf16"
    for kind in kinds:
        expected = small.weights(tmp_path / "straight", kind)
        assert small.close(tensors(said[0][kind]), expected, atol=1e-6 if exact else 2e-3), kind


@STAGES
def test_frozen_parts_and_low_rank_changes_on_two_processes_are_those_of_one(
    tmp_path: Path, group: None, pair: Any, zero_stage: int
) -> None:
    for name, kind, more in (("f", "mlp", {"freeze": ["0"]}), ("l", "clip", {"lora": {"rank": 2}})):
        settings = {"zero_stage": zero_stage, "ema_half_lives": [2], **more}
        one = small.fit(tmp_path / f"{name}1", small.objective(kind, noise=0.0), **settings)
        two = tensors(pair.work(tmp_path / f"{name}2", {"kind": kind, "noise": 0.0}, **settings)[0]["raw"])
        assert small.close(one, two)
        plain = small.module(kind).state_dict()
        still = [k for k in plain if more.get("lora") or k.startswith("0")]
        assert still and all(torch.equal(plain[k], two[k]) for k in still)
