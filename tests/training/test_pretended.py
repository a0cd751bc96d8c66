"""Every family at its full size on a pretended accelerator: what it takes, and that the host never waits for the device."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pretended
import pytest
import yaml
from tiny_foreign import pipeline_folder

CLIP = {"short_side": 512, "fps": 24, "max_seconds": 60}
SHARDS = {"kind": "shard", "sources": ["/videos"], "clip": CLIP}
VAE = {"kind": "pretrain_vae", "dataset": "shards", "model": {"preset": "pv_vae"}, "sizes": [[256, 256]]}
LATENTS = {"kind": "cache_latents", "dataset": "shards", "encoder": "vae", "size": [256, 256], "join_seconds": 60}
VQGAN = {"kind": "pretrain_vqgan", "dataset": "shards", "model": {"preset": "vqgan_paper"}, "size": [128, 128]}
TOKENS = {"kind": "cache_tokens", "dataset": "shards", "encoder": "vqgan", "size": [128, 128]}
LOW = LATENTS | {"shrink": [4, 4]}
BEFORE = {"shards": SHARDS, "vae": VAE, "latents": LATENTS, "low": LOW, "vqgan": VQGAN, "tokens": TOKENS}
MEMORY = {
    "latents": "latents",
    "low_latents": "low",
    "model": {"preset": "memory_dit_xl"},
    "history_seconds": 20,
    "frames": 17,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "latte": {"kind": "finetune_latte", "latents": "latents", "model": {"preset": "latte_xl"}},
    "memory": {"kind": "pretrain_memory"} | MEMORY,
    "prior": {"kind": "finetune_memory_prior"} | MEMORY,
    "tats": {"kind": "pretrain_tats", "tokens": "tokens", "model": {"preset": "tats_paper"}},
    "vae": VAE,
    "vqgan": VQGAN,
    "encgan3": {"kind": "pretrain_encgan3", "model": {"preset": "encgan3"}, "recall": True},
    "mavin": {
        "kind": "finetune_mavin",
        "model": {"preset": "mavin_unet"},
        "vae": "vae",
        "image": None,
        "size": [256, 256],
        "frames": 62,
    },
    "wan": {"kind": "finetune_backbone", "latents": "own", "text": "/text", "frames": 81, "lora": {"rank": 32}},
}
# Wan 2.1's transformer for text at 480p and its autoencoder, as their config.json on the Hub have it; other fields as in
# any Wan
WAN = {
    "transformer": {
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 8960,
        "num_layers": 30,
        "rope_max_seq_len": 1024,
    },
    "vae": {
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "latents_mean": [0.0] * 16,
        "latents_std": [1.0] * 16,
    },
}
LATTE = 673_773_760  # the paper's Latte-XL has 673.68 million, with 2x2 patches of 4 channels in place of 64 channels
MEBI = 1 << 20


class Size(NamedTuple):
    """What a pass of one window takes.

    parameters   of each engine's module
    operations   of forward and backward, 10^12 [torch's formulas of matrices, convolutions and attention]
    activations  MiB when they are the most; None: they are not compared
    """

    parameters: dict[str, int]
    operations: float
    activations: float | None = None


SIZES = {
    "latte": Size({"model": LATTE}, 3.508, 3207),
    "tats": Size({"model": 336_917_504}, 2.319, 1738),
    "vae": Size({"generator": 675_758_508, "discriminator": 8_294_081}, 44.99, 9730),
    "vqgan": Size({"generator": 23_649_027, "discriminator": 16_588_162}, 2.520, 2111),
    # the encoder of its history has 4.6 million
    "memory": Size({"model": LATTE + 4_595_840}, 7.268, 5824),
    "prior": Size({"model": LATTE + 4_595_840}, 12.18, 8658),
    "encgan3": Size({"generator": 32_544_604, "discriminator": 11_118_274}, 0.3984, 1129),
    "mavin": Size({"model": 1_411_681_920}, 20.16),
    "wan": Size({"model": 1_418_996_800}, 874.2, 157_203),
}


class Machine(NamedTuple):
    process: pretended.Machine
    folder: Path

    def recipe(self, name: str, **changes: dict[str, Any]) -> str:
        """A recipe whose stage "training" is a family; `changes` of the stages before it."""
        training = {"dataset": "shards", "batch": 1, "steps": 400_000, "ema_half_lives": []} | FAMILIES[name]
        stages = {stage: config | changes.get(stage, {}) for stage, config in BEFORE.items()} | {"training": training}
        if name == "wan":
            base = self._wan()
            training["base"] = base
            stages["own"] = LATENTS | {"encoder": base, "size": [480, 832]}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": "r", "workspace": str(self.folder / "ws"), "stages": stages}))
        return str(path)

    def _wan(self) -> str:
        """A pipeline folder of full size, but for its weights, which nothing reads."""
        folder = self.folder / "pipeline"
        if not folder.exists():
            pipeline_folder(folder)
            for part, settings in WAN.items():
                path = folder / part / "config.json"
                path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return str(folder)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    process = pretended.Machine()
    yield Machine(process, tmp_path_factory.mktemp("pretended"))
    process.close()


def marked(*names: str, slow: set[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


@pytest.mark.parametrize("name", marked(*FAMILIES, slow={"memory", "prior", "mavin", "wan"}))
def test_a_family_trains_at_full_size_and_never_waits_for_the_device(machine: Machine, name: str) -> None:
    told, size = machine.process.run(pretended.trained, machine.recipe(name), "training"), SIZES[name]
    assert told.parameters == size.parameters
    assert told.operations == pytest.approx(size.operations * 1e12, rel=0.01)
    assert size.activations is None or told.activations == pytest.approx(size.activations * MEBI, rel=0.05)
    parameters = sum(told.parameters.values())
    codes = 2 * 16_384 * 256 * (name == "vqgan")  # and their sums, which are no parameters
    assert told.fit.weights == pytest.approx(4 * (parameters + codes), rel=0.04)  # smaller buffers and adapters too
    # codes ask once, in the first step, whether they were seeded
    assert sum(told.waits.values()) <= (name == "vqgan"), told.waits


SOLVED = {"latte": 3, "memory": 3, "prior": 2, "mavin": 2, "wan": 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVED)
def test_a_family_samples_at_full_size_and_no_step_of_its_solver_waits(machine: Machine, name: str) -> None:
    made = machine.process.run(pretended.sampled, machine.recipe(name), "training", SOLVED[name])
    assert made.steps and not any(made.steps), made
    # videos of a batch of one; of MAVIN the 12 frames of a gap
    assert all(shape[0] == (12 if name == "mavin" else 1) for shape in made.shapes)


@pytest.mark.slow
def test_a_step_of_a_higher_order_waits_for_its_equations_alone(machine: Machine) -> None:
    made = machine.process.run(pretended.sampled, machine.recipe("wan"), "training", 3, "unipc")
    assert made.steps and all(sum(step.values()) <= 1 for step in made.steps), made


@pytest.mark.parametrize("name", marked("vae", "vqgan", "encgan3", "tats", slow={"vae", "tats"}))
def test_a_family_without_a_solver_waits_a_few_times_a_chunk(machine: Machine, name: str) -> None:
    # a latent frame of tokens takes the full model many passes: a small picture has as many waits
    small = {stage: {"size": [32, 32]} for stage in ("vqgan", "tokens")} if name == "tats" else {}
    made = machine.process.run(pretended.sampled, machine.recipe(name, **small), "training", 3)
    # numbers that are drawn on the host go there, frames or tokens come back, and are looked at
    assert len(made.steps) == 2 and all(sum(step.values()) <= 3 for step in made.steps), made
    assert all(shape[0] == 1 for shape in made.shapes)


@pytest.mark.parametrize("fused", [None, False])
def test_a_step_of_the_loop_waits_once_and_once_for_an_update_that_is_not_fused(
    machine: Machine, tmp_path: Path, fused: bool | None
) -> None:
    changes = {"log_every": 3, "ema_half_lives": [10.0], "accumulate": 2, "fused_optimizer": fused}
    waits = machine.process.run(pretended.looped, str(tmp_path), 6, changes)
    # two engines, of which each decides whether its weights change
    updates, asked = {"finish_gradients": 2} if fused is False else {}, "ask_ranks"
    for number, places in enumerate(waits, 1):
        counts = _by_function(places)
        if number % 3:
            assert counts == updates | {asked: 1}, places
        else:
            # figures are logged: leaps of all ranks, and all metrics, norms of each engine's children too, in one copy
            assert counts == updates | {asked: 2, "_totals": 1}, places


def _by_function(places: dict[str, int]) -> dict[str, int]:
    return {place.rpartition(" ")[2]: count for place, count in places.items()}


STEPPED = [
    "latte",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("memory", "prior", "tats", "vqgan", "encgan3")),
    pytest.param("vae_against_a_discriminator", marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.soak) for name in ("mavin", "backbone")),
]


@pytest.mark.parametrize("name", STEPPED)
def test_a_step_of_a_family_waits_once(machine: Machine, tmp_path: Path, name: str) -> None:
    waits = machine.process.run(pretended.stepped, str(tmp_path), name)
    assert _by_function(waits) == {"ask_ranks": 1}, waits


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (pretended.left_on_the_host, "found at least two devices, pretended:0 and cpu"),
        (pretended.drawn_on_the_host, "Expected a 'pretended' device type for generator but found 'cpu'"),
        (pretended.read_from_the_device, "use Tensor.cpu"),
    ],
)
def test_what_fails_on_a_gpu_fails_there(machine: Machine, mistake: Any, error: str) -> None:
    with pytest.raises(pretended.Failed, match=error):
        machine.process.run(mistake)


def test_what_makes_the_host_wait_is_counted(machine: Machine) -> None:
    assert machine.process.run(pretended.waiting) == {
        "item": 1,
        "bool": 1,
        "tolist": 1,
        "cpu": 1,
        "mask": 1,
        "bincount": 1,
        "tensor": 1,
        "list as an index": 1,
        "late copy": 0,
        "where": 0,
        "full": 0,
        "filled mask": 0,
    }
