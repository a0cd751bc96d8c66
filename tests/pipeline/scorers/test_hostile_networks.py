"""Files of networks that would run code or take all memory: each is refused in one line, before anything of it is loaded."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pictures
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from longtake.datasets import dual
from longtake.datasets.errors import UserError
from longtake.pipeline.scorers import load

pytestmark = pytest.mark.usefixtures("one_thread")


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self._mark, "was here")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(tiny_pictures.folder("clip", tmp_path / "clip"))


def asked(model: Path) -> dict[str, dict[str, Any]]:
    """The settings of each scorer that takes a folder."""
    prompts = {"a": "a red square"}
    return {
        "classifier": {"model": model},
        "embedding": {"model": model},
        "prompt": {"model": model, "prompts": prompts},
    }


def refused(name: str, settings: dict[str, Any], line: str) -> None:
    """Every door of a scorer refuses its files with one line."""
    scorer = load(name)
    config = scorer.config(**{key: str(v) if isinstance(v, Path) else v for key, v in settings.items()})
    doors: list[Callable[[], Any]] = [
        lambda: scorer.digest(config),
        lambda: scorer.load(config, "cpu"),
    ]
    # the fields of prompts are known without the folder
    for door in [*doors, *([lambda: scorer.fields(config)] if name != "prompt" else [])]:
        with pytest.raises(UserError, match=line) as caught:
            door()
        assert "\n" not in str(caught.value)


def spoil(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_pickle_of_these_tests_does_write_a_file(mark: Path) -> None:
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.read_text() == "was here"


@pytest.mark.parametrize("kind", ["plain", "torch", "old torch", "in an archive"])
def test_a_pickle_as_torchscript_is_not_opened(kind: str, mark: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    if kind == "plain":
        file.write_bytes(pickle.dumps(Hostile(mark)))
    elif kind == "in an archive":
        with zipfile.ZipFile(file, "w") as archive:
            for name in ("constants.pkl", "data.pkl"):
                archive.writestr(f"net/{name}", pickle.dumps(Hostile(mark)))
            archive.writestr("net/version", "3")
            archive.writestr("net/code/__torch__.py", "class M(Module):\n  pass\n")
    else:
        torch.save(Hostile(mark), file, _use_new_zipfile_serialization=kind == "torch")
    line = r"not a TorchScript (archive|file, and so not opened)"
    for name, settings in {"torchscript": {"file": file}, "embedding": {"model": file}}.items():
        scorer = load(name)
        config = scorer.config(**{key: str(value) for key, value in settings.items()})
        for door in (lambda: scorer.fields(config), lambda: scorer.load(config, "cpu")):  # noqa: B023
            with pytest.raises(UserError, match=line) as caught:
                door()
            assert "\n" not in str(caught.value) and "net.pt" in str(caught.value)
    assert not mark.exists()


def test_torchscript_that_writes_files_is_refused(tmp_path: Path) -> None:
    class Saves(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.save(x, "/tmp/never")
            return x.mean((2, 3))

    file = tmp_path / "net.pt"
    torch.jit.script(Saves()).save(str(file))
    for name, settings in {"torchscript": {"file": str(file)}, "embedding": {"model": str(file)}}.items():
        with pytest.raises(UserError, match=r"net.pt: its code calls save, which a network has no use for"):
            load(name).fields(load(name).config(**settings))


def test_an_archive_that_unfolds_to_far_more_is_refused(tmp_path: Path) -> None:
    file = Path(tiny_pictures.script(tmp_path / "net.pt", 1))
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/extra/zeros", bytes(80 << 20))
    with pytest.raises(UserError, match=r"net.pt: unfolds to \d+ bytes; write it again with `torch.jit.save`"):
        load("torchscript").fields(load("torchscript").config(file=str(file)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_weights_that_are_pickles_are_not_opened(name: str, model: Path, mark: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": Hostile(mark)}, model / name)
    for scorer, settings in asked(model).items():
        refused(
            scorer,
            settings,
            rf"model: .*clip: has its weights in {name}, which may run code.*convert them to safetensors",
        )
    assert not mark.exists()


def test_a_pickle_that_is_called_safetensors_is_not_opened(model: Path, mark: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Hostile(mark)))
    for scorer, settings in asked(model).items():
        refused(scorer, settings, r"model: .*model.safetensors: no whole safetensors file \(.*\); copy it again")
    head = tmp_path / "head.safetensors"
    head.write_bytes(pickle.dumps(Hostile(mark)))
    good = tiny_pictures.folder("vit", tmp_path / "vit")
    config = load("embedding").config(model=good, head=str(head))
    for door in (lambda: load("embedding").fields(config), lambda: load("embedding").load(config, "cpu")):
        with pytest.raises(UserError, match=r"head: .*: no safetensors, and so not opened \(.*\); write it with"):
            door()
    assert not mark.exists()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_never_run(name: str, model: Path, mark: Path) -> None:
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w').write('was here')\nclass Evil: pass\n")
    auto = ("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoTokenizer")
    spoil(model / name, auto_map=dict.fromkeys(auto, "evil.Evil"))
    for scorer, settings in asked(model).items():
        refused(scorer, settings, rf"model: .*{name}: asks for code of its own \(auto_map\), which is never run")
    assert not mark.exists()


def test_an_index_names_no_file_elsewhere(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for other in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), "weights.bin"):
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": other}}))
        refused("embedding", {"model": model}, r"model: .*index.json: names other files than safetensors beside it")


def _header(tensors: dict[str, Any], body: bytes = b"") -> bytes:
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + body


def _huge() -> dict[str, Any]:
    return {"layers.0.weight": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}}


@pytest.mark.parametrize("data", [struct.pack("<Q", 1 << 60), _header(_huge()), b"", _header({"__metadata__": 3})])
def test_safetensors_of_absurd_sizes_are_refused(data: bytes, model: Path, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    head.write_bytes(data)
    with pytest.raises(UserError, match=r"head: .*: no safetensors, and so not opened"):
        load("embedding").fields(load("embedding").config(model=str(model), head=str(head)))
    (model / "model.safetensors").write_bytes(data)
    refused("embedding", {"model": model}, r"model: .*model.safetensors: no whole safetensors file")


def test_files_of_absurd_sizes_are_not_read(model: Path, tmp_path: Path) -> None:
    """Holes in files take no room on a disk."""
    head, picture = tmp_path / "head.safetensors", tmp_path / "picture.png"
    for file, size in ((head, 1 << 40), (picture, 1 << 40), (model / "model.safetensors", 1 << 40)):
        with file.open("ab") as f:
            f.truncate(size)
    refused("embedding", {"model": model}, r"model: .*: has 1024 GiB of weights, more than 64")
    good = tiny_pictures.folder("vit", tmp_path / "vit")
    refused("embedding", {"model": good, "head": head}, "head: .*: has more than 256 MiB")
    config = load("embedding").config(model=good, likeness={"dog": str(picture)})
    with pytest.raises(UserError, match=r"likeness.dog: .*: has more than 64 MiB"):
        load("embedding").digest(config)


@pytest.mark.parametrize(
    ("where", "values", "line"),
    [
        ("config.json", {"num_labels": 1 << 40}, "says a num_labels that no network of pictures has"),
        ("config.json", {"vision_config": {"num_hidden_layers": 100_000}}, "says more layers than its weights have"),
        ("config.json", {"vision_config": {"hidden_size": 100_000}}, r"says \d+ values, its weights have \d+"),
        ("config.json", {"model_type": 7}, r"no model here \(config.json with a model_type\)"),
        ("config.json", {"model_type": "of-nobody"}, "transformers cannot load it"),
        ("config.json", {"model_type": "bert"}, "is a bert; name a model that gives pictures vectors"),
        ("config.json", {"transformers_weights": "other.bin"}, "names other files as its weights"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 1e9}}, "pictures have more than 4096 pixels a side"),
        ("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "/etc"}, "is an adapter; merge it"),
    ],
)
def test_configs_that_fit_no_network_of_pictures_are_refused(
    where: str, values: dict[str, Any], line: str, model: Path
) -> None:
    (model / where).touch()
    old = json.loads((model / where).read_text() or "{}")
    new = old | {
        k: old[k] | v if isinstance(old.get(k), dict) and isinstance(v, dict) else v for k, v in values.items()
    }
    (model / where).write_text(json.dumps(new))
    config = load("embedding").config(model=str(model))
    for door in (lambda: load("embedding").fields(config), lambda: load("embedding").load(config, "cpu")):
        with pytest.raises(UserError, match=line) as caught:
            door()
        assert "\n" not in str(caught.value) and str(caught.value).startswith("model: ")


@pytest.mark.parametrize("text", ["[" * 100_000, "not JSON", "[]", "\x00"])
def test_a_config_that_is_no_json_object_is_refused(text: str, model: Path) -> None:
    (model / "config.json").write_text(text)
    refused("embedding", {"model": model}, r"model: .*config.json: cannot be read \(.*\); copy it again")


def test_a_folder_without_what_it_needs_is_refused(tmp_path: Path, model: Path) -> None:
    refused(
        "embedding",
        {"model": tmp_path / "none"},
        "no such folder or file; name a model of transformers, or TorchScript",
    )
    refused("prompt", asked(tmp_path / "none")["prompt"], "no such folder; name a folder that `save_pretrained` wrote")
    refused("torchscript", {"file": tmp_path / "none.pt"}, r"none.pt: no such file; write one with `torch.jit.script")
    refused("embedding", {"model": model, "size": 224}, "its preprocessor config says the size; leave `size` out")
    refused("embedding", {"model": model, "head": tmp_path / "none"}, r"head: .*none: no such file; write one with")
    (model / "tokenizer.json").unlink()
    refused("prompt", asked(model)["prompt"], "has no tokenizer.json; save its fast tokenizer there")
    (model / "preprocessor_config.json").unlink()
    refused("embedding", {"model": model}, r"has no preprocessor_config.json; copy it there")
    vit = Path(tiny_pictures.folder("vit", tmp_path / "vit"))
    refused("prompt", asked(vit)["prompt"], "encodes no texts; name a dual encoder, such as CLIP or SigLIP")
    with pytest.raises(UserError, match="no such folder"):
        dual.encode_text(str(tmp_path / "none"), "a red square")


def test_weights_that_are_missing_are_named(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, model / "model.safetensors")
    with pytest.raises(UserError, match=r"its weights lack visual_projection.weight; copy the whole model there"):
        load("embedding").load(load("embedding").config(model=str(model)), "cpu")
    # a model that classifies needs the layer that does: it would be random
    with pytest.raises(UserError, match=r"its weights lack classifier.bias"):
        load("classifier").load(load("classifier").config(model=str(model)), "cpu")


def test_a_model_that_leaves_out_parts_by_chance_is_refused(tmp_path: Path) -> None:
    config = load("embedding").config(model=tiny_pictures.folder("masked", tmp_path / "masked"))
    with pytest.raises(UserError, match=r"masked: gives one picture two values, by chance; name a model that does not"):
        load("embedding").load(config, "cpu")


@pytest.mark.parametrize(
    ("layers", "line"),
    [
        ({"weight": (1, 7)}, r"has layers 7 to 1; 16 values must become one number"),
        ({"0.weight": (4, 16), "1.weight": (2, 4)}, r"has layers 16 to 4 -> 4 to 2; 16 values must become one number"),
        ({"0.weight": (4, 16), "0.bias": (3,)}, "a layer's weight and bias do not fit"),
        ({"0.bias": (4,)}, "a layer's weight and bias do not fit"),
        ({"conv.kernel": (4, 16)}, "conv.kernel is of no linear layer"),
        ({"0.weight": (4, 16, 1)}, "0.weight is of no linear layer"),
        ({}, "has no layer"),
    ],
)
def test_heads_that_are_none_are_refused(layers: dict[str, tuple[int, ...]], line: str, tmp_path: Path) -> None:
    good = tiny_pictures.folder("vit", tmp_path / "vit")
    save_file({name: torch.zeros(shape) for name, shape in layers.items()}, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match=line):
        load("embedding").fields(load("embedding").config(model=good, head=str(tmp_path / "head.safetensors")))


class Flat(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3))


class Sized(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] == 64, "wants 64 pixels"
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("net", "line"), [(Flat, r"gives \(1,\) for 1 frames"), (Sized, r"does not take \(1, 3, 32, 32\)")]
)
def test_torchscript_that_gives_no_rows_is_refused(net: type[torch.nn.Module], line: str, tmp_path: Path) -> None:
    torch.jit.script(net()).save(str(tmp_path / "net.pt"))
    config = load("torchscript").config(file=str(tmp_path / "net.pt"), size=32)
    with pytest.raises(UserError, match=rf"file: .*net.pt: {line}.*; change `size`, or name another file"):
        load("torchscript").fields(config)


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("prompt", {"prompts": {}}, "at least 1"),
        ("prompt", {"prompts": {"A dog": "a dog"}}, "pattern"),
        ("prompt", {"prompts": {"label": "a dog"}}, "label is the name of another field"),
        ("prompt", {"prompts": {"dog": ""}}, "at least 1"),
        ("prompt", {"prompts": {"dog": []}}, "at least 1"),
        ("embedding", {"likeness": {"vector": "dog.png"}}, "vector is the name of another field"),
        ("embedding", {"frames": 0}, "greater than or equal to 1"),
        ("classifier", {"pool": "median"}, "'mean', 'max' or 'min'"),
    ],
)
def test_settings_that_say_nothing_are_refused(name: str, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        load(name).config(**({"model": "clip"} | settings))


def test_values_that_are_no_numbers_are_left_to_the_column(tmp_path: Path) -> None:
    """It stores nothing that is not finite, and says why."""
    torch.jit.script(NaNs()).save(str(tmp_path / "net.pt"))
    scorer = load("torchscript")
    looker: Any = scorer.load(scorer.config(file=str(tmp_path / "net.pt"), size=8), "cpu")
    (values,) = looker.look(np.zeros((1, 2, 8, 8, 3), np.uint8))
    assert np.isnan(values["value"])


class NaNs(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3))[:, None] / 0
