"""Speed and memory: what is counted, of models of each kind, and in which circumstances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tats_stages
import torch
from materials import FPS, Fixed, loaded, suite
from priors import awake, save_vae

from longtake.datasets.errors import UserError
from longtake.datasets.latents import encoder_digest
from longtake.training.evaluation import peak, work
from longtake.training.evaluation.measures import load, speed
from longtake.training.models.encgan3.config import EncGAN3Config
from longtake.training.models.encgan3.model import EncGAN3
from longtake.training.models.mavin.config import MavinConfig
from longtake.training.models.mavin.model import Mavin
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.registry import disk

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = suite(clips={"frames": 10, "size": (32, 32)}, videos=({"frames": 16},), gaps={"frames": 4}, seconds=2)
WINDOW = {"stride": 1, "size": [32, 32], "fps": FPS}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny models: `vae`, `vqgan`, `encgan3`, a `mavin` of pixels, and a `memory` that retrieves."""
    folder = tmp_path_factory.mktemp("models")
    vae = save_vae(folder / "vae")
    tats_stages.saved(tats_stages.vqgan(), folder / "vqgan")

    gan = awake(EncGAN3(EncGAN3Config(size=16, width=2, content=5, movement=3, attention=None, groups=1)))
    gan.scale_latents(torch.randn(8, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    window = {"frames": 16, "fps": 2 * FPS, "size": [16, 16]}
    save(folder / "encgan3", "encgan3", gan, window=window, sampling={"content": "encode"})

    mavin = awake(Mavin(MavinConfig(depth=2, width=16, heads=2, channels=3, image_width=0)))
    context = {"context": [1, 8], "gap": [2, 8], "image": None}
    sampling = {"steps": 2, "shift": 1.0}
    save(folder / "mavin", "mavin", mavin, vae=None, window={"frames": 12, **WINDOW}, sampling=sampling, **context)

    small: dict[str, Any] = {"depth": 2, "width": 24, "heads": 2, "channels": 8, "rates": ("2x2x2",)}
    small |= {"memory_widths": (4, 8), "memory_heads": 2, "history": 9, "shape": (3, 2, 2), "window": 2}
    window = {"frames": 9, "steps": 3, "factor": 4, **WINDOW}
    origin = {"uri": str(folder / "vae"), "sha256": "0", "encoder": encoder_digest(vae)}
    sampling = {"steps": 2, "guidance": 1.0, "shift": 1.0}
    memory = awake(MemoryDiT(MemoryDiTConfig(**small)))
    save(
        folder / "memory", "memory_dit", memory, vae=origin, window=window, sampling=sampling, rates=["2x2x2"],
        stage="retrieval",
    )  # fmt: skip
    return folder


def save(folder: Path, kind: str, model: Any, **facts: Any) -> None:
    described = {"lineage": {}, "classes": [], "text": None, **facts}
    disk.save(folder, kind, model.config.model_dump(mode="json"), model.state_dict(), described)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vae", [("encoded", 9, "32x32"), ("decoded", 9, "32x32")]),
        ("vqgan", [("encoded", 8, "32x32"), ("decoded", 8, "32x32")]),
        ("encgan3", [("made", 32, "16x16 at 16 fps, in 100 steps")]),
        ("mavin", [("filled", 4, "32x32, in 2 steps")]),
        ("memory", [("retrieved", 13, "32x32, in 2 steps")]),
    ],
)
def test_each_kind_of_model_does_what_it_does_for_as_long_as_the_suite_says(
    models: Path, name: str, expected: list[tuple[str, int, str]]
) -> None:
    works = list(work.of(loaded(models / name), SMALL))
    assert [(each.name, each.frames, each.told) for each in works] == expected
    found = load("speed").run(loaded(models / name), Fixed(SMALL))
    assert found.pooled.keys() == {f"speed_{each.name}" for each in works}
    for pooled in found.pooled.values():
        assert pooled.value > 0 and len(pooled.replicates) == SMALL.resamples
    assert set(found.pooled) <= set(load("speed").figures)


def test_what_is_not_counted_comes_first_and_the_median_decides(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times, calls = iter([9.0, 0.5, 0.25, 4.0, 0.5, 0.5]), []
    job = work.Work("made", 8, lambda: calls.append(1), "x")
    monkeypatch.setattr(work, "of", lambda *_: iter([job]))
    monkeypatch.setattr(speed, "_seconds", lambda call: (call(), next(times))[1])
    found = load("speed").run(loaded(models / "vae"), Fixed(SMALL))
    assert len(calls) == 6 and found.pooled["speed_made"].value == 16
    assert set(np.round(found.pooled["speed_made"].replicates, 6)) <= {32.0, 16.0, 2.0}
    assert found.notes == ["made: 8 frames of x"]


def test_speed_and_memory_are_those_of_a_machine_and_of_what_is_asked_for() -> None:
    for name in ("speed", "memory"):
        conditions = load(name).conditions
        assert conditions(SMALL).keys() >= {"machine", "device", "threads", "videos"}
        assert conditions(SMALL) == conditions(SMALL.model_copy(update={"resamples": 200}))
        longer = SMALL.model_copy(update={"videos": (SMALL.videos[0].model_copy(update={"frames": 32}),)})
        assert conditions(longer) != conditions(SMALL)


def test_a_model_takes_as_much_memory_as_its_own_process_and_a_larger_clip_more(models: Path) -> None:
    # what this process has does not count
    here = torch.zeros(1 << 27)
    here += 1
    found = load("memory").run(loaded(models / "vae"), Fixed(SMALL))
    value, before = found.pooled["memory_gb"].value, float(found.notes[0].split()[0])
    assert 0.05 < before < value < before + 0.5
    large = suite(clips={"frames": 33, "size": (256, 256)})
    assert peak.measured(str(models / "vae"), large).most / 1e9 - value > 33 * 256 * 256 * 3 * 4 / 1e9


def test_what_a_model_refuses_is_said_in_one_line_from_the_other_process(models: Path) -> None:
    odd = suite(clips={"frames": 9, "size": (30, 32)})
    with pytest.raises(UserError, match=r"^clips: size: 30x32; .* takes sides in multiples of 16$"):
        peak.measured(str(models / "vae"), odd)
