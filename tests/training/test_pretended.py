"""Every family at its full size on a pretended accelerator: what it takes, and that the host never waits for the device."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pretended
import pytest
import torch
import yaml
from tiny_foreign import pipeline_folder

from longtake.datasets import text

CLIP = {"short_side": 512, "fps": 24, "max_seconds": 60}
SHARDS = {"kind": "shard", "sources": ["/videos"], "clip": CLIP}
VAE = {"kind": "pretrain_vae", "dataset": "shards", "model": {"preset": "pv_vae"}, "sizes": [[256, 256]]}
LATENTS = {"kind": "cache_latents", "dataset": "shards", "encoder": "vae", "size": [256, 256], "join_seconds": 60}
VQGAN = {"kind": "pretrain_vqgan", "dataset": "shards", "model": {"preset": "vqgan_paper"}, "size": [128, 128]}
TOKENS = {"kind": "cache_tokens", "dataset": "shards", "encoder": "vqgan", "size": [128, 128]}
LOW = LATENTS | {"shrink": [4, 4]}
BEFORE = {"shards": SHARDS, "vae": VAE, "latents": LATENTS, "low": LOW, "vqgan": VQGAN, "tokens": TOKENS}
REMEMBERED = {"history_seconds": 20, "frames": 17}
MEMORY = {"latents": "latents", "low_latents": "low", "model": {"preset": "memory_dit_xl"}} | REMEMBERED
LATTE = {"kind": "finetune_latte", "latents": "latents", "model": {"preset": "latte_xl"}}
MAVIN = {"kind": "finetune_mavin", "vae": "vae", "image": None, "size": [256, 256], "frames": 62}
BACKBONE = {"kind": "finetune_backbone", "latents": "own", "text": "/text", "lora": {"rank": 32}}
FAMILIES: dict[str, dict[str, Any]] = {
    "latte": LATTE,
    "latte_told": LATTE | {"text": "texts"},
    "memory": {"kind": "pretrain_memory"} | MEMORY,
    "prior": {"kind": "finetune_memory_prior"} | MEMORY,
    "tats": {"kind": "pretrain_tats", "tokens": "tokens", "model": {"preset": "tats_paper"}},
    "vae": VAE,
    "vae_of_wan": {"kind": "pretrain_vae", "sizes": [[256, 256]]},
    "vqgan": VQGAN,
    "sound": {"kind": "pretrain_sound_vqgan", "model": {"preset": "sound_vqgan_paper"}},
    "encgan3": {"kind": "pretrain_encgan3", "model": {"preset": "encgan3"}, "recall": True},
    "mavin": MAVIN | {"model": {"preset": "mavin_unet"}},
    "mavin_dit": MAVIN | {"model": {"preset": "mavin"}},
    "wan": BACKBONE | {"frames": 81},
    "ltx": BACKBONE | {"frames": 121},
    "hunyuan": BACKBONE | {"frames": 129, "pooled": "/pooled"},
    "wan_memory": {
        "kind": "finetune_memory_prior",
        "latents": "own",
        "low_latents": "own_low",
        "text": "/text",
        "model": {"cross_attention": True},
        "lora": {"rank": 128, "full": ["memory", "cross"]},
    }
    | REMEMBERED,
}
# what a pipeline's transformer/config.json on the Hub has beside the defaults of its class, which are HunyuanVideo's and
# LTX-Video's own; of Wan 2.1's autoencoder too. Wan's is that for text at 480p
PIPELINES: dict[str, dict[str, Any]] = {
    "wan": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "ltx": {},
    "hunyuan": {},
}


class Of(NamedTuple):
    """The pipeline that a family is of, the field that names it, and the size of its videos."""

    pipeline: str
    field: str = "base"
    size: tuple[int, int] = (480, 832)


FOREIGN = {
    "vae_of_wan": Of("wan", "parent"),
    "wan": Of("wan"),
    "wan_memory": Of("wan"),
    "ltx": Of("ltx", size=(512, 768)),
    "hunyuan": Of("hunyuan"),
}
XL = 673_773_760  # the paper's Latte-XL has 673.68 million, with 2x2 patches of 4 channels in place of 64 channels
ENCODER = 4_595_840  # of a history
WAN, WAN_VAE = 1_418_996_800, 126_892_531
WAN_MEMORY = 8_904_640 + 30 * 6_297_600  # for it: an encoder, and attention in each of 30 blocks
WAN_LORA = 30 * 1_458_176  # of rank 32
PATCHGAN = 8_294_081
CODES = {"vqgan": 16_384, "sound": 1024}
MEBI = 1 << 20


class Size(NamedTuple):
    """What a pass of one window takes.

    parameters   of each engine's module
    operations   of forward and backward, 10^12 [torch's formulas of matrices, convolutions and attention]
    activations  MiB when they are the most
    gradients    MiB when all together is the most: those of a whole engine where its update is
    adapters     of a low-rank change, which learn in place of the parameters
    full         parameters that learn beside them
    """

    parameters: dict[str, int]
    operations: float
    activations: float
    gradients: float
    adapters: int = 0
    full: int = 0


SIZES = {
    "latte": Size({"model": XL}, 3.508, 3207, 10.4),
    "latte_told": Size({"model": XL + 153_496_640}, 4.206, 4222, 10.4),
    "tats": Size({"model": 336_917_504}, 2.319, 1738, 0),
    "vae": Size({"generator": 675_758_508, "discriminator": PATCHGAN}, 44.99, 9730, 7.1),
    # it is taught to predict, by a token of 16 channels
    "vae_of_wan": Size({"generator": WAN_VAE + 16, "discriminator": PATCHGAN}, 46.30, 34_241, 0),
    "vqgan": Size({"generator": 23_649_027, "discriminator": 2 * PATCHGAN}, 2.520, 2111, 0.4),
    "sound": Size({"model": 23_643_841}, 0.1577, 139.8, 0.4),
    "memory": Size({"model": XL + ENCODER}, 7.247, 5772, 10.4),
    "prior": Size({"model": XL + ENCODER}, 12.16, 8612, 10.4),
    "encgan3": Size({"generator": 32_544_604, "discriminator": 11_118_274}, 0.3984, 1129, 0),
    "mavin": Size({"model": 1_411_681_920}, 20.16, 5633, 5059),
    "mavin_dit": Size({"model": XL + 1_624_320}, 28.32, 12_029, 0),
    "wan": Size({"model": WAN}, 874.2, 157_203, 1.3, WAN_LORA),
    "ltx": Size({"model": 1_923_385_472}, 72.75, 30_353, 1.2, 47_710_208),
    "hunyuan": Size({"model": 12_821_012_544}, 8342, 663_816, 2.2, 137_625_600),
    # and 16 channels of a first latent
    "wan_memory": Size({"model": WAN + 16 + WAN_MEMORY}, 378.0, 129_590, 0, 4 * WAN_LORA, WAN_MEMORY),
}


class Machine(NamedTuple):
    process: pretended.Machine
    folder: Path

    def recipe(self, name: str, **changes: dict[str, Any]) -> str:
        """A recipe whose stage "training" is a family; `changes` of the stages before it."""
        training = {"dataset": "shards", "batch": 1, "steps": 400_000, "ema_half_lives": [6931.0]} | FAMILIES[name]
        stages = {stage: config | changes.get(stage, {}) for stage, config in BEFORE.items()} | {"training": training}
        if training.get("text") == "texts":
            training["text"] = self._texts()
        if of := FOREIGN.get(name):
            training[of.field] = base = self._pipeline(of.pipeline)
            own = {"encoder": base, "size": list(of.size)}
            stages |= {"own": LATENTS | own, "own_low": LOW | own}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": "r", "workspace": str(self.folder / "ws"), "stages": stages}))
        return str(path)

    def _pipeline(self, kind: str) -> str:
        """A pipeline folder of full size, but for its weights, which nothing reads."""
        folder = self.folder / kind
        if not folder.exists():
            pipeline_folder(folder, kind)
            for part, settings in (("transformer", PIPELINES[kind]), ("vae", {})):
                path = folder / part / "config.json"
                tiny = json.loads(path.read_text())
                path.write_text(json.dumps({"_class_name": tiny["_class_name"]} | settings))
        return str(folder)

    def _texts(self) -> str:
        """The record of a column of T5-XXL's states."""
        folder, encoder = self.folder / "texts", text.TextConfig(length=120).model_dump() | {"width": 4096}
        column = text.Text("/videos", "text-t5", encoder, "caption", None, {}, {}, {})
        text.write_text(str(folder), column, torch.zeros(1, 4096, dtype=torch.bfloat16))
        return str(folder)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    process = pretended.Machine()
    yield Machine(process, tmp_path_factory.mktemp("pretended"))
    process.close()


SLOW = {"memory", "prior", "mavin", "wan", "vae_of_wan", "latte_told"}
SOAK = {"mavin_dit", "ltx", "hunyuan", "wan_memory"}  # 5 to 10 s each
RARELY = SOAK | {"latte_told", "vae_of_wan"}  # sampled in soaks alone


def marked(*names: str, slow: set[str], soak: set[str]) -> list[Any]:
    marks = {name: [pytest.mark.soak] if name in soak else [pytest.mark.slow] if name in slow else [] for name in names}
    return [pytest.param(name, marks=marks[name]) for name in names]


@pytest.mark.parametrize("name", marked(*FAMILIES, slow=SLOW, soak=SOAK))
def test_a_family_trains_at_full_size_and_never_waits_for_the_device(machine: Machine, name: str) -> None:
    told, size = machine.process.run(pretended.trained, machine.recipe(name), "training"), SIZES[name]
    assert told.parameters == size.parameters
    assert told.operations == pytest.approx(size.operations * 1e12, rel=0.01)
    assert told.activations == pytest.approx(size.activations * MEBI, rel=0.05)

    # What lies there all the time. Codes and their sums are no parameters; smaller buffers come too.
    beside = 2 * CODES.get(name, 0) * 256 + size.adapters
    assert told.fit.weights == pytest.approx(4 * (sum(told.parameters.values()) + beside), rel=1e-3)
    learning = {"model": size.adapters + size.full} if size.adapters else told.parameters
    assert told.learning == learning
    assert told.fit.optimizer == 8 * sum(learning.values())
    assert told.fit.averages == 4 * next(iter(learning.values()))

    # Each weight that learns gets a gradient, but for what stands for frames that a largest batch does not lack.
    assert told.gradients == pytest.approx(4 * max(learning.values()), rel=1e-4)
    assert told.fit.gradients == pytest.approx(size.gradients * MEBI, rel=0.05, abs=MEBI / 10)
    # codes ask once, in the first step, whether they were seeded
    assert sum(told.waits.values()) <= (name in CODES), told.waits


SOLVED = {"latte": 3, "latte_told": 3, "memory": 3, "prior": 2, "mavin": 2, "mavin_dit": 2}
SOLVED |= {"wan": 3, "ltx": 3, "hunyuan": 2, "wan_memory": 2}


@pytest.mark.parametrize("name", marked(*SOLVED, slow=set(SOLVED), soak=RARELY))
def test_a_family_samples_at_full_size_and_no_step_of_its_solver_waits(machine: Machine, name: str) -> None:
    made = machine.process.run(pretended.sampled, machine.recipe(name), "training", SOLVED[name])
    assert made.steps and not any(made.steps), made
    # videos of a batch of one; of MAVIN the 12 frames of a gap
    assert all(shape[0] == (12 if name.startswith("mavin") else 1) for shape in made.shapes)


@pytest.mark.slow
def test_a_step_of_a_higher_order_waits_for_its_equations_alone(machine: Machine) -> None:
    made = machine.process.run(pretended.sampled, machine.recipe("wan"), "training", 3, "unipc")
    assert made.steps and all(sum(step.values()) <= 1 for step in made.steps), made


CHUNKED = marked("vae", "vae_of_wan", "vqgan", "sound", "encgan3", "tats", slow={"vae", "tats"}, soak=RARELY)


@pytest.mark.parametrize("name", CHUNKED)
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
