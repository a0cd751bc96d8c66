"""Folders of other libraries: what they are is read from their files alone, and what is wrong with one is a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from longtake.datasets.errors import UserError
from longtake.training.foreign import folder as folders
from longtake.training.foreign.folder import Part, part_of

VAE = "diffusion_pytorch_model.safetensors"
SHARDS = [f"diffusion_pytorch_model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
INDEX = f"{VAE}.index.json"


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """A pipeline: an autoencoder in one file, a transformer in two, a text encoder, a scheduler."""
    root = tmp_path / "wan"
    parts = {"vae": "AutoencoderKLWan", "transformer": "WanTransformer3DModel", "scheduler": "UniPCMultistepScheduler"}
    index = {name: ["diffusers", kind] for name, kind in parts.items()} | {"text_encoder": ["transformers", "UMT5"]}
    write(
        root / "model_index.json",
        index | {"transformer_2": [None, None], "boundary_ratio": 0.875, "_class_name": "WanPipeline"},
    )
    write(root / "vae" / "config.json", {"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.3", "z_dim": 16})
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float16)}, root / "vae" / VAE)
    write(root / "transformer" / "config.json", {"_class_name": "WanTransformer3DModel", "num_layers": 2})
    for name, shard in zip("ab", SHARDS, strict=True):
        save_file({name: np.arange(4, dtype=np.float32)}, root / "transformer" / shard)
    write(root / "transformer" / INDEX, {"weight_map": dict(zip("ab", SHARDS, strict=True))})
    write(root / "text_encoder" / "config.json", {"architectures": ["UMT5EncoderModel"], "d_model": 8})
    save_file({"a": np.zeros(2, np.float32)}, root / "text_encoder" / "model.safetensors")
    scheduler = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "_diffusers_version": "0.3"}
    write(root / "scheduler" / "scheduler_config.json", scheduler)
    return root


def test_a_pipeline_is_its_parts_and_a_part_is_the_same_alone(wan: Path) -> None:
    vae = part_of(wan, "vae")
    assert vae == Part(
        wan / "vae",
        "vae",
        "AutoencoderKLWan",
        {"z_dim": 16},
        {"config.json": wan / "vae" / "config.json", VAE: wan / "vae" / VAE},
    )
    assert part_of(wan / "vae", "vae") == vae
    assert part_of(wan / "transformer", "transformer_2").class_name == "WanTransformer3DModel"
    assert sorted(part_of(wan, "transformer").files) == ["config.json", *SHARDS, INDEX]
    assert part_of(wan, "text_encoder").class_name == "UMT5EncoderModel"
    assert folders.parts_of(wan) == ("text_encoder", "transformer", "vae")
    assert folders.index_of(wan)["boundary_ratio"] == 0.875 and folders.index_of(wan / "vae") == {}
    assert folders.scheduler_of(wan) == {"class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}
    assert folders.scheduler_of(wan / "vae") == {}
    assert [folders.is_foreign(wan / name) for name in ("", "vae", "text_encoder", "scheduler")] == [
        True,
        True,
        False,
        False,
    ]
    assert {name: tensor.shape for name, tensor in folders.tensors_of(vae).items()} == {"a": (2, 3), "b": (4,)}
    assert sum(tensor.bytes for tensor in folders.tensors_of(vae).values()) == 32


def test_a_digest_is_that_of_config_and_weights_wherever_they_lie(wan: Path, tmp_path: Path) -> None:
    digest = folders.digest_of(part_of(wan, "vae"))
    copy = Path(shutil.copytree(wan / "vae", tmp_path / "other"))
    config = json.loads((copy / "config.json").read_text())
    write(copy / "config.json", config | {"_diffusers_version": "0.9", "_name_or_path": "elsewhere"})
    assert folders.digest_of(part_of(copy, "vae")) == digest, "who has written it changes nothing"
    write(copy / "config.json", config | {"z_dim": 17})
    assert folders.digest_of(part_of(copy, "vae")) != digest
    write(copy / "config.json", config)
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float16)}, copy / VAE)
    assert folders.digest_of(part_of(copy, "vae")) != digest


def test_weights_without_a_variant_are_taken_else_those_of_the_only_one(wan: Path) -> None:
    vae = wan / "vae"
    variant = VAE.replace(".safe", ".fp16.safe")
    shutil.copy(vae / VAE, vae / variant)
    assert [path.name for path in part_of(wan, "vae").weights] == [VAE]
    (vae / VAE).unlink()
    assert [path.name for path in part_of(wan, "vae").weights] == [variant]
    shutil.copy(vae / variant, vae / VAE.replace(".safe", ".bf16.safe"))
    with pytest.raises(
        UserError, match=r"has both .*bf16.safetensors and .*fp16.safetensors, and only one can be meant"
    ):
        part_of(wan, "vae")


def test_a_link_into_the_cache_of_a_download_is_the_file(wan: Path, tmp_path: Path) -> None:
    blob = (wan / "vae" / VAE).rename(tmp_path / "blob")
    (wan / "vae" / VAE).symlink_to(blob)
    assert len(folders.digests_of(part_of(wan, "vae"))) == 2
    blob.unlink()
    with pytest.raises(UserError, match="is a link to a file that is not there: half a download"):
        part_of(wan, "vae")


def pickled(wan: Path) -> None:
    (wan / "vae" / VAE).rename(wan / "vae" / "diffusion_pytorch_model.bin")


def truncated(wan: Path) -> None:
    path = wan / "vae" / VAE
    path.write_bytes(path.read_bytes()[:-5])


def begun(wan: Path) -> None:
    (wan / "vae" / VAE).unlink()
    path = wan / ".cache" / "huggingface" / "download" / "vae" / "x.safetensors.incomplete"
    path.parent.mkdir(parents=True)
    path.touch()


def cases() -> dict[str, tuple[Callable[[Path], object], str, str]]:
    """For each fault: how a folder gets it, the part that is asked for, and the line."""
    return {
        "no folder": (shutil.rmtree, "vae", "wan: no such folder"),
        "empty": (lambda wan: [shutil.rmtree(wan), wan.mkdir()], "vae", r"is no model \(no model_index.json"),
        "no such part": (lambda wan: None, "transformer_2", "has no transformer_2; its parts are text_encoder, transf"),
        "pickle": (pickled, "vae", r"model.bin, a pickle, .* `AutoencoderKLWan.from_pretrained\(FOLDER\).save_pretr"),
        "truncated": (truncated, "vae", r"has \d+ bytes of \d+: half a download; copy or download it again"),
        "begun": (begun, "vae", r"half a download \(x.safetensors.incomplete is unfinished\)"),
        "shard": (
            lambda wan: (wan / "transformer" / SHARDS[1]).unlink(),
            "transformer",
            "names 2 files, and 1 are miss",
        ),
        "no index": (
            lambda wan: (wan / "transformer" / INDEX).unlink(),
            "transformer",
            "00001-of-00002.* but no index",
        ),
        "part": (lambda wan: shutil.rmtree(wan / "scheduler"), "text_encoder_2", "names scheduler, which is not there"),
        "config": (lambda wan: (wan / "vae" / "config.json").unlink(), "vae", "no vae/config.json, though model_index"),
        "no json": (lambda wan: (wan / "vae" / "config.json").write_text("{"), "vae", r"config.json: damaged \(Expect"),
        "large": (lambda wan: (wan / "vae" / "config.json").write_text(" " * 5_000_000), "vae", "damaged .larger than"),
        "deep": (lambda wan: (wan / "vae" / "config.json").write_text('{"a":' * 99999), "vae", r"config.json: damaged"),
        "header": (lambda wan: (wan / "vae" / VAE).write_bytes(b"\xff" * 99), "vae", "is damaged or half a download"),
        "pointer": (lambda wan: (wan / "vae" / VAE).write_text("version https://git-lfs"), "vae", "pointer of git-lfs"),
        "outside": (
            lambda wan: write(wan / "transformer" / INDEX, {"weight_map": {"a": "../vae/x.safetensors"}}),
            "transformer",
            "index.json: names no files of weights",
        ),
        "other index": (
            lambda wan: write(wan / "transformer" / INDEX, {"weight_map": dict(zip("ac", SHARDS, strict=True))}),
            "transformer",
            "index.json: names c, which no file has",
        ),
        "both": (
            lambda wan: shutil.copy(wan / "vae" / VAE, wan / "transformer"),
            "transformer",
            "only one can be meant",
        ),
    }


@pytest.mark.parametrize("case", cases())
def test_a_folder_that_cannot_be_used_is_one_line_that_names_the_remedy(wan: Path, case: str) -> None:
    spoil, part, why = cases()[case]
    spoil(wan)
    with pytest.raises(UserError, match=why) as e:
        part_of(wan, part)
    assert "\n" not in str(e.value) and str(wan) in str(e.value)


def test_other_layouts_and_other_parts_are_named(wan: Path) -> None:
    with pytest.raises(UserError, match="is a single file in another layout; convert it to a folder of diffusers"):
        part_of(wan / "vae" / VAE, "vae")
    with pytest.raises(
        UserError, match="is a WanTransformer3DModel, and no vae; name the folder of a pipeline, or of a v"
    ):
        part_of(wan / "transformer", "vae")
    write(wan / "transformer" / "config.json", {"_class_name": "WanModel", "dim": 8})
    with pytest.raises(UserError, match="is the layout of Wan's authors"):
        part_of(wan / "transformer", "transformer")
    (wan / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=f"has {VAE}, but nothing that says what it is"):
        part_of(wan / "vae", "vae")
