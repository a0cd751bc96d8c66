"""Modules of the parts of a folder: the library's own weights, once in memory; what does not fit is one line."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_foreign
import torch
from safetensors.torch import load_file, save_file

from longtake.datasets.errors import Failure, UserError
from longtake.training import registry
from longtake.training.foreign import load
from longtake.training.foreign.files import _sha256
from longtake.training.foreign.folder import digest_of, part_of
from longtake.training.models import kind_of
from longtake.training.registry import disk

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "diffusion_pytorch_model.safetensors"


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {f"net.{name}": tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(module: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    found = module.state_dict()
    return found.keys() - {"empty"} == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan 2.2 with two experts, without texts."""
    made = tiny_foreign.pipeline("wan22_a14b")
    return saved(made, tmp_path_factory.mktemp("pipelines") / "wan")


def test_the_parts_of_a_pipeline_are_the_modules_that_its_files_have(wan: Path) -> None:
    codec, facts = registry.load_with_facts(str(wan), "vae")
    assert same(codec, state(wan / "vae")) and not codec.training
    assert kind_of(facts).module is type(codec) and facts["config"] == codec.config.model_dump(mode="json")
    assert disk.digest(facts) == digest_of(part_of(wan, "vae"))
    assert facts["foreign"] == {"folder": str(wan), "part": "vae", "class_name": "AutoencoderKLWan"}
    for expert, name in (("high", "transformer"), ("low", "transformer_2")):
        backbone, facts = registry.load_with_facts(f"file://{wan}", "transformer", expert)
        assert same(backbone, state(wan / name)) and facts["model"] == "backbone"
        config = backbone.config
        assert (config.expert, config.boundary, config.strides) == (expert, 0.875, (4, 8))
        assert config.scheduler["class_name"] == "UniPCMultistepScheduler" and config.scheduler["flow_shift"] == 3.0
        assert facts["foreign"]["part"] == name
    with pytest.raises(UserError, match="has a transformer for high noise and one for low; say which by `expert`"):
        registry.load(str(wan), "transformer")
    with pytest.raises(UserError, match="is the expert of high noise; name the whole pipeline"):
        registry.load_with_facts(str(wan / "transformer"), "transformer", "low")
    with pytest.raises(
        UserError, match="is a pipeline of another library; name it as the `encoder` of a `cache_latents`"
    ):
        registry.load(str(wan))


def test_one_file_or_several_and_a_pipeline_or_the_part_alone_are_one_model(wan: Path, tmp_path: Path) -> None:
    whole = state(wan / "transformer")
    split = saved(tiny_foreign.tiny_wan_transformer(), tmp_path / "split", max_shard_size="30KB")
    assert len(list(split.glob("*.safetensors"))) > 2
    alone = shutil.copytree(wan / "transformer", tmp_path / "alone")
    for folder in (split, alone):
        backbone, facts = load.backbone_of(folder)
        assert same(backbone, whole) and backbone.config.scheduler == {} and backbone.config.stride is None
        with pytest.raises(UserError, match="has no second transformer; leave `expert` out"):
            load.backbone_of(folder, "low")
        assert set(facts["sha256"]) == {
            "config.json",
            *(path.name for path in folder.glob("*.safetensors")),
        }


@pytest.mark.parametrize(("name", "expert"), [("transformer", "high"), ("transformer_2", "low")])
def test_a_transformer_in_its_pipeline_is_that_of_the_pipeline(wan: Path, name: str, expert: Any) -> None:
    backbone, facts = load.backbone_of(wan / name)
    whole, whole_facts = load.backbone_of(wan, expert)
    assert backbone.config == whole.config and backbone.config.boundary == 0.875 and backbone.config.scheduler
    assert facts == whole_facts
    assert load.config_of(wan / name, "transformer") == ("backbone", whole.config)


def test_weights_keep_the_dtype_of_the_file_but_for_what_the_class_has_in_fp32(tmp_path: Path) -> None:
    folder = saved(tiny_foreign.tiny_wan_transformer().to(torch.bfloat16), tmp_path / "half")
    backbone, _ = load.backbone_of(folder)
    kept = backbone.keep_fp32()
    assert kept and backbone.dtype == torch.bfloat16
    for name, value in backbone.named_parameters():
        assert value.dtype == (torch.float32 if name in kept else torch.bfloat16)
        assert value.requires_grad and torch.equal(value.float(), state(folder)[name].float())


def test_an_autoencoder_with_the_names_of_before_is_read(tmp_path: Path) -> None:
    folder = saved(
        tiny_foreign.of_class("AutoencoderKL", {"block_out_channels": (8,), "norm_num_groups": 4}), tmp_path / "kl"
    )
    expected = state(folder)
    olds = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {
        re.sub(rf"(attentions\.0)\.({'|'.join(olds)})\.", lambda now: f"{now[1]}.{olds[now[2]]}.", name): tensor
        for name, tensor in load_file(folder / WEIGHTS).items()
    }
    assert any(".query." in name for name in old)
    save_file(old, folder / WEIGHTS)
    assert same(load.codec_of(folder)[0], expected)


def test_tensors_that_the_class_leaves_out_are_left_out(tmp_path: Path) -> None:
    folder = saved(tiny_foreign.tiny_wan_i2v_transformer(**tiny_foreign.WAN_I2V_21), tmp_path / "i2v")
    expected = state(folder)
    changed(lambda t: t.update({"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}))(folder)
    assert same(load.backbone_of(folder)[0], expected)


def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def described(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return spoil


FAULTS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "missing": (changed(lambda t: t.pop("proj_out.bias")), Failure, r"1 tensors are missing .* net.proj_out.bias$"),
    "unknown": (changed(lambda t: t.update(x=torch.zeros(1))), Failure, r"1 tensors are not known .* net.x$"),
    "shape": (
        changed(lambda t: t.update({"proj_out.bias": torch.zeros(3)})),
        Failure,
        r"net.proj_out.bias has shape \[3\], its config needs \[16\]",
    ),
    "other config": (described(num_layers=3), Failure, "tensors are missing to this config, such as net.blocks.2"),
    "odd config": (described(patch_size="x"), UserError, "config.json: makes no WanTransformer3DModel"),
    "one number for three": (described(patch_size=2), UserError, "settings: not those of a WanTransformer3DModel"),
    "no layer ends": (
        described(num_layers=10**9),
        UserError,
        r"num_layers is 1e\+09, and the weights have \d+ tensors",
    ),
    "huge": (described(in_channels=10**12), UserError, r"in_channels is 1e\+12, and the weights have"),
    "odd head": (described(attention_head_dim=25), Failure, r"makes no WanTransformer3DModel \(AssertionError"),
    "text for a number": (described(eps="x"), UserError, "eps is 'x', and no number"),
    "quantised": (
        changed(lambda t: t.update({"proj_out.bias": torch.zeros(16, dtype=torch.float8_e4m3fn)})),
        UserError,
        "has weights in F8_E4M3; name those in bf16 or fp32",
    ),
    "class": (
        described(_class_name="CogTransformer3DModel"),
        UserError,
        r"config.json: makes no CogTransformer3DModel \(.* no video transformer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_one_line(tmp_path: Path, fault: str) -> None:
    spoil, error, why = FAULTS[fault]
    folder = saved(tiny_foreign.tiny_wan_transformer(), tmp_path / "wan")
    spoil(folder)
    with pytest.raises(error, match=why) as e:
        load.backbone_of(folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


@pytest.mark.parametrize("std", [[0.0] * 16, [-1.0] * 16, [1.0], [float("nan")] * 16, ["x"] * 16, 1.0, None])
def test_statistics_that_normalise_no_latents_are_one_line(tmp_path: Path, std: Any) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    config = {"_class_name": "AutoencoderKLWan", "z_dim": 16, "latents_std": std}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"latents_std must be a list of 16 finite numbers above 0\)$"):
        load.codec_of(folder)


def test_a_file_is_read_for_its_digest_once(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Counter[str]()
    digest = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        read[str(Path(file.name).relative_to(wan))] += 1
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    _sha256.cache_clear()
    for _ in range(2):
        load.codec_of(wan)
    assert read == {f"vae/{WEIGHTS}": 1}
    (wan / "vae" / WEIGHTS).touch()
    load.codec_of(wan)
    assert read == {f"vae/{WEIGHTS}": 2}, "a file that was written since is read again"


def test_a_model_of_14b_is_compared_with_its_files_without_memory(tmp_path: Path) -> None:
    import diffusers
    from accelerate import init_empty_weights

    sizes = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
    with init_empty_weights(include_buffers=False):
        model = diffusers.WanTransformer3DModel(**sizes)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **sizes}))
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)  # a hole, which takes no disk
    assert end > 28e9
    before = resident()
    load.check(part_of(tmp_path, "transformer"))
    assert resident() - before < 500e6
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.truncate(8 + len(content) + end - 1)
    with pytest.raises(UserError, match="half a download"):
        load.check(part_of(tmp_path, "transformer"))


def resident() -> int:
    """Bytes of memory that this process has, at most until now."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


_MEASURE = """
import re, sys
from pathlib import Path
from longtake.training.foreign import load
def now(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
load.check(load.part_of(Path(sys.argv[1]), "transformer"))
before = now()
module, _ = load.backbone_of(Path(sys.argv[1]))
sum(p.sum() for p in module.parameters())
print(now() - before, sum(p.nbytes for p in module.parameters()))
"""


@pytest.mark.slow
def test_weights_are_in_memory_once(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 16, "attention_head_dim": 64, "ffn_dim": 4096, "num_layers": 6}
    folder = saved(tiny_foreign.tiny_wan_transformer(**sizes), tmp_path / "wan", max_shard_size="150MB")
    said = subprocess.run([sys.executable, "-c", _MEASURE, folder], capture_output=True, text=True, check=True)
    taken, weights = map(int, said.stdout.splitlines()[-1].split())
    assert weights > 300e6 and taken < 1.25 * weights
