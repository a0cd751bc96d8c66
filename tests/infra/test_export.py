"""`longtake export`, and adapters that are imported: loaded by the other tools themselves; what is said where that cannot be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foreign_stages
import pytest
import tiny_foreign
import torch
from called import assert_close, called
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake.datasets.errors import Failure, UserError
from longtake.infra.cli import cli
from longtake.training import registry
from longtake.training.config import LoraConfig
from longtake.training.engines import lora
from longtake.training.foreign import adapters, export, load
from longtake.training.models.backbone.base import prepare
from longtake.training.models.backbone.config import Config
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.registry import disk

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

LORA = LoraConfig(rank=3, alpha=2.0, targets=(r"net\.blocks\.\d+\.attn\d\.to_[qkv]",))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new store; `wan` and `a14b` beside it are pipelines."""
    import mlflow

    place = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patched:
        uri = f"sqlite:///{place}/mlflow.db"
        patched.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        patched.setenv("LONGTAKE_CACHE", str(place / "cache"))
        for kind, name in (("wan", "wan"), ("wan22_a14b", "a14b")):
            tiny_foreign.pipeline_folder(place / name, kind)
        (place / "wan" / "LICENSE.txt").write_text("theirs")
        yield place
        mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module", autouse=True)
def outputs(place: Path) -> dict[str, Tensor]:
    """What the fine-tuned transformers say: `ft` and `low` learned by LoRA, `full` in full, all registered; `ours` is a PV-VAE."""
    vae = PVVAE(config_from_preset("pv_vae_tiny"))
    registered(place, "ours", "pv_vae", vae.config, vae.state_dict(), {}, {})
    return {
        "ft": trained(place, "ft", place / "wan"),
        "low": trained(place, "low", place / "a14b", expert="low"),
        "full": trained(place, "full", place / "wan", full=True),
    }


def trained(place: Path, name: str, base: Path, expert: Any = None, full: bool = False) -> Tensor:
    """Register a backbone whose change is random, as its training does; what its transformer says."""
    module, facts = load.backbone_of(base, expert)
    facts = {"base": {"uri": str(base), "sha256": "0" * 64}}
    torch.manual_seed(0)
    if not full:
        lora.attach(module, LORA)
    learned = {key: value for key, value in module.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in learned.values():
            value.add_(torch.randn_like(value), alpha=0.1)
    module.set_empty(torch.ones(1, module.config.text_width))
    weights = dict(lora.merged(module.state_dict(), LORA))
    registered(place, name, "backbone", module.config, weights, facts, {} if full else learned)
    return called(module.net)


def registered(
    place: Path, name: str, kind: str, config: Any, weights: Any, facts: Any, learned: dict[str, Tensor]
) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name("e")
    run = client.create_run(found.experiment_id if found else client.create_experiment("e", f"{place}/artifacts"))
    disk.save(place / "models" / name, kind, config.model_dump(mode="json"), weights, facts, max_bytes=40_000)
    if learned:
        learned = {key: value.detach() for key, value in learned.items()}
        adapters.write(place / "adapters" / name / export.ADAPTER, learned, LORA, config.class_name, "peft")
        client.log_artifacts(run.info.run_id, str(place / "adapters" / name))
    registry.register(place / "models" / name, name, run.info.run_id)


def said(*arguments: object) -> str:
    done = CliRunner().invoke(cli, list(map(str, arguments)), standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stdout.strip()


def refused(line: str, *arguments: object) -> None:
    with pytest.raises((UserError, Failure), match=line) as caught:
        said("export", *arguments)
    assert "\n" not in str(caught.value)


def pipeline(folder: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("model", ["models:/ft@candidate", "models/ft"])
def test_a_pipeline_that_was_exported_is_loaded_by_diffusers(
    place: Path, outputs: dict[str, Tensor], tmp_path: Path, model: str
) -> None:
    named = model if model.startswith("models:") else place / model
    to = tmp_path / "new" / "wan-ft"
    assert said("export", named, "--format", "diffusers", "--to", to) == str(to)
    loaded = pipeline(to)
    assert_close(called(loaded.transformer), outputs["ft"])
    assert not torch.allclose(called(pipeline(place / "wan").transformer), outputs["ft"], atol=1e-2)

    # all else is as in the base
    before = files(place / "wan")
    assert files(to) == before
    for name in before - {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}:
        assert (to / name).read_bytes() == (place / "wan" / name).read_bytes()
        assert (to / name).stat().st_nlink == 1
    # and it is a base again
    module, _ = load.backbone_of(to)
    assert_close(called(module.net), outputs["ft"])
    assert [path.name for path in to.parent.iterdir()] == ["wan-ft"]


def test_two_experts_are_exported_one_onto_the_other(place: Path, outputs: dict[str, Tensor], tmp_path: Path) -> None:
    said("export", "models:/low@candidate", "--format", "diffusers", "--to", tmp_path / "low")
    loaded = pipeline(tmp_path / "low")
    assert_close(called(loaded.transformer_2), outputs["low"])
    high = called(pipeline(place / "a14b").transformer)
    assert torch.equal(called(loaded.transformer), high)

    # the other way round, of a base that is named
    shutil.rmtree(tmp_path / "low" / "transformer")
    shutil.copytree(place / "wan" / "transformer", tmp_path / "low" / "transformer")
    options = ("--format", "diffusers", "--base", tmp_path / "low", "--to", tmp_path / "both")
    said("export", "models:/low@candidate", *options)
    loaded = pipeline(tmp_path / "both")
    assert_close(called(loaded.transformer_2), outputs["low"])
    assert torch.equal(called(loaded.transformer), called(pipeline(place / "wan").transformer))


def test_large_weights_are_several_files(place: Path, outputs: dict[str, Tensor], tmp_path: Path) -> None:
    plan = export.planned(export.found("models:/full@candidate"), None)
    written: list[int] = []
    export.write_pipeline(plan, tmp_path / "out", progress=written.append, max_bytes=30_000)
    assert len(list((tmp_path / "out" / "transformer").glob("diffusion_pytorch_model-0000?-of-*.safetensors"))) > 1
    assert_close(called(pipeline(tmp_path / "out").transformer), outputs["full"])
    assert 0.9 * plan.size < sum(written) <= plan.size


def test_the_base_of_a_base_is_found(place: Path, outputs: dict[str, Tensor], tmp_path: Path) -> None:
    module = disk.load(place / "models" / "ft")
    config: Any = module.config
    registered(place, "second", "backbone", config, module.state_dict(), {"base": {"uri": "models:/ft/1"}}, {})
    said("export", "models:/second/1", "--format", "diffusers", "--to", tmp_path / "out")
    assert_close(called(pipeline(tmp_path / "out").transformer), outputs["ft"])


def test_a_registered_pipeline_is_a_base(place: Path, outputs: dict[str, Tensor], tmp_path: Path) -> None:
    said("models", "import", place / "wan", "--name", "wan")
    said("models", "import", place / "wan", "--name", "there", "--by-reference")
    for name in ("wan", "there"):
        options = ("--format", "diffusers", "--base", f"models:/{name}@champion", "--to", tmp_path / name)
        said("export", place / "models" / "ft", *options)
        assert_close(called(pipeline(tmp_path / name).transformer), outputs["ft"])


def test_links_take_no_space(place: Path, outputs: dict[str, Tensor], tmp_path: Path) -> None:
    to = place / "linked"
    said("export", "models:/ft/1", "--format", "diffusers", "--to", to, "--link")
    linked = {str(path.relative_to(to)) for path in to.rglob("*") if path.stat().st_nlink > 1 and path.is_file()}
    assert linked == {
        name for name in files(to) if name.endswith(".safetensors") and not name.startswith("transformer/")
    }
    assert_close(called(pipeline(to).transformer), outputs["ft"])


def test_an_autoencoder_is_exported_in_its_pipeline(place: Path, tmp_path: Path) -> None:
    codec, _ = load.codec_of(place / "wan")
    with torch.no_grad():
        for parameter in codec.net.decoder.parameters():
            parameter.mul_(1.5)
    facts = {"lineage": {"inputs": {"parent": {"uri": str(place / "wan")}}}}
    registered(place, "vae", "foreign_vae", codec.config, codec.state_dict(), facts, {})
    said("export", "models:/vae@candidate", "--format", "diffusers", "--to", tmp_path / "out")
    video = torch.rand(1, 3, 5, 16, 16)
    with torch.no_grad():
        loaded, ours = (each(video).sample for each in (pipeline(tmp_path / "out").vae, codec.net))
    assert_close(loaded, ours)
    refused("has left no adapter", "models:/vae@candidate", "--format", "peft", "--to", tmp_path / "adapter")


def test_an_adapter_is_exported_for_other_tools(place: Path, outputs: dict[str, Tensor], tmp_path: Path) -> None:
    for layout in ("peft", "comfyui"):
        to = tmp_path / layout
        assert said("export", "models:/ft@candidate", "--format", layout, "--to", to) == str(to)
        loaded = pipeline(place / "wan")
        loaded.load_lora_weights(str(to))
        assert_close(called(loaded.transformer), outputs["ft"])
    said("export", "models:/low@candidate", "--format", "peft", "--to", tmp_path / "low")
    loaded = pipeline(place / "a14b")
    loaded.load_lora_weights(str(tmp_path / "low"), load_into_transformer_2=True)
    assert_close(called(loaded.transformer_2), outputs["low"])


def test_what_cannot_be_exported_is_one_line(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = tmp_path / "out"
    for_diffusers, for_peft = ("--format", "diffusers", "--to", to), ("--format", "peft", "--to", to)
    refused("longtake models pull models:/ours@candidate --to FOLDER", "models:/ours@candidate", *for_diffusers)
    said("models", "import", place / "wan", "--name", "as-it-was")
    refused("is a pipeline of another library.* models pull", "models:/as-it-was@champion", *for_diffusers)
    refused("run has left no adapter.*take --format diffusers", "models:/full@candidate", *for_peft)
    refused("its adapter is with the run.*models:/NAME@ALIAS", place / "models" / "ft", *for_peft)
    refused("no longtake model here", place / "wan" / "scheduler", *for_diffusers)
    refused("--link: an adapter has no other parts", "models:/ft/1", *for_peft, "--link")
    base = ("--base", place / "wan" / "transformer")
    refused("is one part alone.*--base FOLDER", "models:/ft/1", *for_diffusers, *base)
    refused("has no transformer_2", "models:/low/1", *for_diffusers, "--base", place / "wan")
    ltx = tiny_foreign.pipeline_folder(tmp_path / "ltx", "ltx")
    refused("is a LTXVideoTransformer3DModel, and models:/ft/1 a Wan", "models:/ft/1", *for_diffusers, "--base", ltx)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    for layout in ("diffusers", "peft"):
        options = ("--format", layout, "--to", tmp_path / "full")
        refused("is there already; name another folder", "models:/ft/1", *options)
    inside = ("--format", "diffusers", "--to", place / "wan" / "fine-tuned")
    refused("is inside of the pipeline", "models:/ft/1", *inside)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    refused("MLFLOW_TRACKING_URI is not set", "models:/ft/1", *for_diffusers)
    assert not to.exists()


def test_a_model_whose_base_is_unknown_or_whose_weights_are_others_is_refused(place: Path, tmp_path: Path) -> None:
    module = disk.load(place / "models" / "ft")
    config: Any = module.config
    registered(place, "orphan", "backbone", config, module.state_dict(), {}, {})
    options = ("--format", "diffusers", "--to", tmp_path / "out")
    refused("does not say which pipeline.*--base FOLDER", "models:/orphan/1", *options)
    copied = shutil.copytree(place / "models" / "ft", tmp_path / "ft")
    weights = sorted(copied.glob("*.safetensors"))[0]
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    refused("not the weights that config.json describes", copied, *options)


def test_an_export_is_whole_or_not_at_all(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(shutil, "copyfile", full)
    to = tmp_path / "out" / "wan"
    refused("No space left on device; free some space", "models:/ft/1", "--format", "diffusers", "--to", to)
    assert not list((tmp_path / "out").iterdir())


# Adapters in


def adapter(folder: Path, kind: str = "wan", part: str = "transformer") -> Tensor:
    """Let diffusers save a random adapter of a base; what the transformer says with it."""
    import peft

    loaded = pipeline(folder.parent / kind)
    transformer = getattr(loaded, part)
    targets = ["to_q", "to_out.0"]
    transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    loaded.save_lora_weights(
        str(folder),
        transformer_lora_layers=peft.get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    return called(transformer)


def test_an_adapter_of_another_tool_is_a_registered_backbone(place: Path, tmp_path: Path) -> None:
    output = adapter(place / "style")
    options = ("--base", place / "wan", "--name", "style")
    uri = said("models", "import", place / "style", *options)
    assert uri == "models:/style/1"
    module, facts = registry.load_with_facts("models:/style@champion")
    assert_close(called(module.net), output)
    assert facts["base"]["uri"] == str(place / "wan")
    assert facts["adapter"] == {"file": "style", "rank": 2, "alpha": 3.0}
    # the same is not registered twice
    assert said("models", "import", place / "style", *options) == uri

    # it is a base like any other: of a training, of another adapter, and out again
    again, _ = registry.load_with_facts("models:/style@champion", part="transformer")
    assert_close(called(again.net), output)
    file = place / "style" / adapters.DIFFUSERS_FILE
    assert said("models", "import", file, "--base", "models:/style@champion", "--name", "twice") == "models:/twice/1"
    said("export", "models:/style@champion", "--format", "diffusers", "--to", tmp_path / "whole")
    assert_close(called(pipeline(tmp_path / "whole").transformer), output)
    said("export", "models:/style@champion", "--format", "comfyui", "--to", tmp_path / "comfyui")
    loaded = pipeline(place / "wan")
    loaded.load_lora_weights(str(tmp_path / "comfyui"))
    assert_close(called(loaded.transformer), output)


@pytest.mark.parametrize("kind", ["ltx", "hunyuan"])
def test_adapters_of_other_families_come_in_and_go_out(place: Path, tmp_path: Path, kind: str) -> None:
    tiny_foreign.pipeline_folder(place / kind, kind)
    output = adapter(place / f"{kind}-style", kind)
    said("models", "import", place / f"{kind}-style", "--base", place / kind, "--name", f"{kind}-style")
    model, facts = registry.load_with_facts(f"models:/{kind}-style@champion")
    assert_close(called(model.net), output)
    assert facts["window"] and ("pooled" in facts) == (kind == "hunyuan")
    said("export", f"models:/{kind}-style@champion", "--format", "peft", "--to", tmp_path / "peft")
    said("export", f"models:/{kind}-style@champion", "--format", "diffusers", "--to", tmp_path / "whole")
    loaded = pipeline(place / kind)
    loaded.load_lora_weights(str(tmp_path / "peft"))
    for transformer in (loaded.transformer, pipeline(tmp_path / "whole").transformer):
        assert_close(called(transformer), output)


def test_videos_are_generated_with_an_adapter_as_the_exported_pipeline_has_it(place: Path, tmp_path: Path) -> None:
    adapter(place / "painted")
    said("models", "import", place / "painted", "--base", place / "wan", "--name", "painted")
    said("export", "models:/painted@champion", "--format", "diffusers", "--to", tmp_path / "whole")
    asked = ("--prompt", "a red square", "--size", "32x64", "--frames", 5, "--steps", 2, "--precision", "fp32")
    for name, model in (("ours", "models:/painted@champion"), ("theirs", tmp_path / "whole"), ("base", place / "wan")):
        said("generate", model, *asked, "--out", tmp_path / f"{name}.mp4")
    ours, theirs, base = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("ours", "theirs", "base"))
    assert ours == theirs != base


@pytest.mark.slow
def test_a_training_begins_from_an_adapter_that_was_imported(place: Path, dataset: str, tmp_path: Path) -> None:
    inputs = foreign_stages.inputs(tmp_path, dataset)
    shutil.copytree(inputs["base"], place / "dancing-base")
    output = adapter(place / "dancing", "dancing-base")
    said("models", "import", place / "dancing", "--base", inputs["base"], "--name", "dancing")
    inputs |= {"vae": inputs["base"], "base": "models:/dancing@champion"}
    settings = {"kind": "finetune_backbone", "frames": 5, "fps": 12.0} | inputs
    setup = prepare(Config.model_validate(settings), inputs, tmp_path)
    assert_close(called(setup.model.net.cpu()), output)
    # texts of another encoder are still refused, by what is known of them
    assert setup.facts["text"]["encoder"]["encoder"] == inputs["vae"]


def test_an_adapter_of_one_of_two_experts_is_imported(place: Path, tmp_path: Path) -> None:
    output = adapter(place / "low-style", "a14b", "transformer_2")
    options = ("--base", place / "a14b", "--name", "low-style")
    with pytest.raises(UserError, match="one for low; say which"):
        said("models", "import", place / "low-style", *options)
    said("models", "import", place / "low-style", *options, "--expert", "low")
    module, _ = registry.load_with_facts("models:/low-style@champion")
    assert_close(called(module.net), output)
    said("export", "models:/low-style@champion", "--format", "diffusers", "--to", tmp_path / "out")
    assert_close(called(pipeline(tmp_path / "out").transformer_2), output)


def test_what_is_no_adapter_of_the_base_is_refused(place: Path, tmp_path: Path) -> None:
    ltx = {f"transformer.transformer_blocks.0.attn1.to_q.lora_{name}.weight": torch.ones(2, 2) for name in "AB"}
    save_file(ltx, tmp_path / "ltx.safetensors")
    (tmp_path / "pickle.pt").touch()
    layer = "blocks.0.attn1.to_q"
    width = load.backbone_of(place / "wan")[0].net.get_submodule(layer).in_features
    shapes = {"A": (2, width), "B": (width, 2)}
    for file, prefix, value in (("zero", "transformer", 0.0), ("low", "transformer_2", 1.0)):
        pair = {f"{prefix}.{layer}.lora_{name}.weight": torch.full(shape, value) for name, shape in shapes.items()}
        save_file(pair, tmp_path / f"{file}.safetensors")
    base, name = ("--base", place / "wan"), ("--name", "none")
    for line, arguments in [
        ("is an adapter of LTXVideo.*, and the base is Wan", [tmp_path / "ltx.safetensors", *base]),
        ("changes nothing", [tmp_path / "zero.safetensors", *base]),
        ("is of the transformer for low noise", [tmp_path / "low.safetensors", *base]),
        ("is a pickle", [tmp_path / "pickle.pt", *base]),
        ("no such file or folder", [tmp_path / "nothing", *base]),
        ("no such folder", [tmp_path / "ltx.safetensors", "--base", tmp_path / "nothing"]),
        ("is no video transformer", [tmp_path / "ltx.safetensors", "--base", "models:/ours@candidate"]),
        ("--expert: is for an adapter", [place / "wan", "--expert", "low"]),
        ("--by-reference: with --base", [tmp_path / "ltx.safetensors", *base, "--by-reference"]),
    ]:
        with pytest.raises((UserError, Failure), match=line) as caught:
            said("models", "import", *arguments, *name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="registered: "):
        said("models", "show", "none")
