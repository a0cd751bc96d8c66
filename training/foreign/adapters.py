"""Low-rank changes of a transformer as files that other tools read, and theirs as ours.

In the house a layer `blocks.0.attn1.to_q` of diffusers' transformer has `net.blocks.0.attn1.to_q.lora_down.weight` and
`.lora_up.weight` (see `longtake.training.engines.lora`), and a change counts alpha / rank. Elsewhere the names differ (see
`names`), and not every loader looks for an alpha. So what is written counts 1 everywhere: the scale is in the upper
matrices, in fp32, and alpha, where it has a place, is the rank.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown
from longtake.training.config import LoraConfig
from longtake.training.engines.lora import merged
from longtake.training.foreign import names
from longtake.training.foreign.fused import Change, fused, split

Layout = Literal["peft", "comfyui"]

PEFT_FILE, DIFFUSERS_FILE, COMFYUI_FILE = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "comfyui_lora.safetensors",
)
_PEFT_CONFIG = "adapter_config.json"
PEFT_FILES = (PEFT_FILE, _PEFT_CONFIG)
_METADATA = "lora_adapter_metadata"  # key in the header of a file that diffusers wrote
_MOST_JSON = 1 << 20  # bytes
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_PREFIX = re.compile(r"(?:(?:base_model\.model|model|diffusion_model|transformer(?:_2)?|net)\.|lora_unet_)*")
_PLAIN = re.compile(r"[\w.]+")  # a pattern of PEFT that is a name
_TENSOR = re.compile(r"(.+)\.(?:(lora_A|lora_down|lora_B|lora_up)(?:\.default)?\.weight|(alpha))")


class Adapter(NamedTuple):
    """A low-rank change of a `Backbone`: `tensors` by house names, each of `rank`, which count `alpha` / `rank`.

    `low`: its file says that it is of the second transformer of two, that of low noise.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float
    low: bool = False

    @property
    def lora(self) -> LoraConfig:
        """Rank and alpha as a training's."""
        return LoraConfig(rank=self.rank, alpha=self.alpha)


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    lora: LoraConfig,
    class_name: str,
    layout: Layout,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter of a training as files of another tool, in fp32.

    `peft` writes `adapter_model.safetensors` with its config for PEFT, and `pytorch_lora_weights.safetensors` for
    diffusers, whose names have another prefix; `comfyui` one file with the names of the authors' code. Of a layer of
    theirs that holds several of diffusers' (HunyuanVideo), the change is block-diagonal, of the sum of their ranks: exact.

    Args:
        tensors: all that learned, by house names.
        class_name: of the transformer in diffusers.
        settings: the class's config.json; HunyuanVideo's `mlp_ratio` is read.

    Raises:
        UserError: a tensor is no low-rank change, or the layout has no name for its layer.
        Failure: a tensor is not finite.
    """
    changes = _changes_of(tensors, lora.scale)
    ones = {layer: Change(c.down.float(), c.up.float() * c.scale) for layer, c in changes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "peft":
        _write_peft(folder, ones, lora.rank)
    else:
        _write_native(folder, ones, class_name, settings or {})


def _changes_of(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Change]:
    """Pairs of house tensors by the layer's name in diffusers."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"net\.(.+)\.lora_(down|up)\.weight", name)
        if not match:
            raise UserError(
                f"lora.full: {name} learned in full, and an adapter has low-rank changes alone; take --format diffusers"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    changes = {layer: Change(pair["down"], pair["up"], scale) for layer, pair in sorted(found.items())}
    for layer, change in changes.items():
        _check_finite(layer, change, "train it again, with a lower lr")
    return changes


def _write_peft(folder: Path, changes: Mapping[str, Change], rank: int) -> None:
    # a pattern, as a list of names would also match what ends so: `proj_out` is in every single block of HunyuanVideo
    config = {"r": rank, "lora_alpha": rank, "target_modules": "|".join(re.escape(layer) for layer in changes)}
    whole = {"peft_type": "LORA", "bias": "none", "lora_dropout": 0.0, "inference_mode": True, **config}
    (folder / _PEFT_CONFIG).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    metadata = json.dumps({f"transformer.{key}": value for key, value in config.items()}, sort_keys=True)
    for file, prefix, more in (
        (PEFT_FILE, "base_model.model.", {}),
        (DIFFUSERS_FILE, "transformer.", {_METADATA: metadata}),
    ):
        tensors = {}
        for layer, change in changes.items():
            tensors[f"{prefix}{layer}.lora_A.weight"] = change.down
            tensors[f"{prefix}{layer}.lora_B.weight"] = change.up
        _save(folder / file, tensors, more)


def _write_native(folder: Path, changes: Mapping[str, Change], class_name: str, settings: Mapping[str, Any]) -> None:
    tensors = {}
    for layer, change in fused(changes, class_name, settings).items():
        # diffusers reads these names too: alphas of Wan's blocks, and none of LTX, HunyuanVideo or other layers
        down, up = ("lora_down", "lora_up") if class_name == names.WAN else ("lora_A", "lora_B")
        tensors[f"diffusion_model.{layer}.{down}.weight"] = change.down
        tensors[f"diffusion_model.{layer}.{up}.weight"] = change.up
        if class_name == names.WAN and layer.startswith("blocks."):
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(change.down.shape[0]))
    _save(folder / COMFYUI_FILE, tensors, {})


def _save(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, file, {"format": "pt", **metadata})
        storage.open_up(file)
    except SafetensorError as e:
        raise Failure(f"{file}: could not be written ({_line(e)}); free some space and go on") from e


def read(path: Path, class_name: str) -> Adapter:
    """Read an adapter of PEFT, diffusers, ComfyUI or musubi, or one of ours, recognised by its names.

    Without an alpha, in the file or in the adapter_config.json beside it, that is the rank. Where layers differ in rank,
    the lower are filled up with zeros; where they differ in scale, it goes into the upper matrices, in fp32, and alpha is
    the rank.

    Args:
        path: a safetensors file, or a folder with one.
        class_name: of the transformer in diffusers that it shall change.

    Raises:
        UserError: no adapter, a pickle, another kind of adapter than LoRA, or one of another family.
        Failure: it is damaged, or its tensors do not fit together or are not finite.
    """
    file = _file_of(path)
    tensors, metadata = _opened(file)
    found: dict[str, dict[str, Tensor]] = {}
    prefixes = set[str]()
    for name, tensor in tensors.items():
        prefix = _PREFIX.match(name)
        assert prefix
        prefixes.add(prefix[0])
        match = _TENSOR.fullmatch(name[prefix.end() :])
        if not match:
            raise UserError(
                f"{file}: {name[:100]!r} is no part of a LoRA, and only plain LoRA is read; convert it to one"
            )
        kind = "alpha" if match[3] else "down" if match[2] in ("lora_A", "lora_down") else "up"
        if kind in found.setdefault(match[1], {}):
            raise UserError(f"{file}: {match[1]} comes twice, in two ways of writing; leave one out")
        found[match[1]][kind] = tensor
    if len(prefixes) > 1:
        raise UserError(
            f"{file}: has names with {' and '.join(sorted(prefixes))}, as of two models; split it into a file for each"
        )
    _check_family(file, found, class_name)
    settings = _settings_of(file, metadata)
    if settings.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file}: is of the kind {str(settings['peft_type'])[:40]}, and only plain LoRA is read")
    changes: dict[str, Change] = {}
    for layer, parts in found.items():
        changes |= split(f"{file}: {layer}", layer, _paired(file, layer, parts, settings), class_name)
    return _uniform(changes)._replace(low=any("transformer_2." in prefix for prefix in prefixes))


def _file_of(path: Path) -> Path:
    """The safetensors file that is meant."""
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if file.is_file())
        files = [file for file in inside if file.suffix == ".safetensors"]
        known = [path / name for name in (PEFT_FILE, DIFFUSERS_FILE) if path / name in files]
        if not files and any(file.suffix in _PICKLES for file in inside):
            path = next(file for file in inside if file.suffix in _PICKLES)
        elif known or len(files) == 1:
            return (known or files)[0]
        else:
            what = f"has {len(files)} safetensors files; name one of them" if files else "has no adapter in safetensors"
            raise UserError(f"{path}: {what}")
    if path.suffix in _PICKLES:
        raise UserError(
            f"{path}: is a pickle, which can run code when it is read; save it as safetensors with the tool that wrote it"
        )
    if not path.is_file():
        raise UserError(
            f"{path}: no such file or folder; name an adapter's safetensors file, or the folder that has it"
        )
    return path


def _opened(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise Failure(f"{file}: cannot be read ({_line(e)}); get it again") from e
    if not tensors:
        raise UserError(f"{file}: has no tensors; name an adapter")
    return tensors, metadata


def _check_family(file: Path, layers: Iterable[str], class_name: str) -> None:
    def unknown(name: str) -> list[str]:
        return [layer for layer in layers if not (names.by_part(name, layer) or names.by_native(name, layer))]

    if strange := unknown(class_name):
        for other in names.LAYERS:
            if not unknown(other):
                raise UserError(
                    f"{file}: is an adapter of {other}, and the base is {class_name}; name a base of its own"
                )
        raise UserError(f"{file}: {class_name} has no layer {strange[0][:100]}; name the base that it was trained on")


def _settings_of(file: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """PEFT's settings: those that diffusers keeps in the file, or adapter_config.json beside it; {} for none."""
    where, text = f"{file}: {_METADATA}", metadata.get(_METADATA)
    beside = file.with_name(_PEFT_CONFIG)
    if text is None and file.name == PEFT_FILE and beside.exists():
        where = str(beside)
        with beside.open() as opened:
            text = opened.read(_MOST_JSON + 1)
    if text is None:
        return {}
    try:
        content = json.loads(text) if len(text) <= _MOST_JSON else None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise Failure(f"{where}: is no JSON object of at most {_MOST_JSON >> 20} MiB; get it again")
    settings = {_PREFIX.sub("", key, count=1): value for key, value in content.items()}
    if settings.get("use_dora"):
        raise UserError(f"{where}: use_dora: only plain LoRA is read; merge it with the tool that wrote it")
    return settings


def _paired(file: Path, layer: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Change:
    """A layer's matrices and their scale, checked."""
    if missing := [kind for kind in ("down", "up") if kind not in parts]:
        raise Failure(f"{file}: {layer} has no {missing[0]} matrix; get the whole file again")
    down, up = parts["down"], parts["up"]
    rank = down.shape[0] if down.ndim else 0
    if settings.get("r", rank) != rank and not settings.get("rank_pattern"):
        raise Failure(
            f"{file}: {layer} has rank {rank}, and its settings say {settings['r']}; get the whole adapter again"
        )
    if down.ndim not in (2, 4, 5) or up.ndim != down.ndim or up.shape[1] != rank or not rank:
        raise Failure(f"{file}: {layer}: matrices {tuple(down.shape)} and {tuple(up.shape)} do not fit; get it again")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise UserError(f"{file}: {layer}: is {down.dtype}; save it in fp32, fp16 or bf16 with the tool that wrote it")
    alpha = parts["alpha"].float().reshape(-1).tolist() if "alpha" in parts else [_alpha(file, settings, layer, rank)]
    if len(alpha) != 1 or not isinstance(alpha[0], int | float) or not 0 < alpha[0] < float("inf"):
        raise Failure(f"{file}: {layer}: alpha {alpha} is no positive number; get it again")
    change = Change(down, up, alpha[0] / (rank**0.5 if settings.get("use_rslora") else rank))
    _check_finite(f"{file}: {layer}", change, "get it again, or an earlier step of its training")
    return change


def _alpha(file: Path, settings: Mapping[str, Any], layer: str, rank: int) -> Any:
    """PEFT's alpha of a layer: that of the first pattern which is its name or the end of it, else that of all.

    UserError for a pattern that is more than a name, since a file of unknown origin shall not make us search for ever.
    """
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{file}: alpha_pattern of its adapter_config.json is no object; get it again")
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").replace("\\.", ".")
        if not _PLAIN.fullmatch(name):
            raise UserError(
                f"{file}: alpha_pattern {shown(pattern)[:80]!r} is a regular expression; name each layer, as"
                " `save_lora_adapter` of diffusers does"
            )
        if layer == name or (layer.endswith(f".{name}") and not pattern.startswith("^")):
            return value
    return settings.get("lora_alpha", rank)


def _uniform(changes: Mapping[str, Change]) -> Adapter:
    """The changes with one rank and one scale."""
    rank = max((change.down.shape[0] for change in changes.values()), default=1)
    scales = {change.scale for change in changes.values()}
    scale = scales.pop() if len(scales) == 1 else None
    tensors: dict[str, Tensor] = {}
    for layer, change in changes.items():
        down, up = change.down, change.up if scale else change.up.float() * change.scale
        if missing := rank - down.shape[0]:
            down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
            up = torch.cat([up, up.new_zeros(up.shape[0], missing, *up.shape[2:])], 1)
        tensors |= {f"net.{layer}.lora_down.weight": down, f"net.{layer}.lora_up.weight": up}
    return Adapter(tensors, rank, rank * (scale or 1.0))


def load_into(backbone: nn.Module, adapter: Adapter) -> None:
    """Add an adapter to the weights of a backbone: all of it, or nothing.

    Raises:
        UserError: the backbone has no such layer, or one of another shape.
    """
    layers = {name.rpartition(".lora_")[0] for name in adapter.tensors}
    modules = dict(backbone.named_modules())
    changed = {}
    for layer in sorted(layers):
        down, up = (adapter.tensors[f"{layer}.lora_{which}.weight"] for which in ("down", "up"))
        weight = getattr(modules.get(layer), "weight", None)
        if not isinstance(weight, Tensor):
            raise UserError(
                f"adapter: the base has no layer {layer.removeprefix('net.')}; name the base it was trained on"
            )
        if (up.shape[0], *down.shape[1:]) != tuple(weight.shape):
            raise UserError(
                f"adapter: {layer.removeprefix('net.')} is {tuple(weight.shape)} in the base, and the change is of"
                f" {(up.shape[0], *down.shape[1:])}; name the base it was trained on"
            )
        changed[layer] = weight
    with torch.no_grad():
        for layer, weight in changed.items():
            pair = {
                f"{layer}.lora_{which}.weight": adapter.tensors[f"{layer}.lora_{which}.weight"]
                for which in ("down", "up")
            }
            pair = {name: tensor.to(weight.device) for name, tensor in pair.items()}
            for _, value in merged({f"{layer}.weight": weight, **pair}, adapter.lora):
                weight.copy_(value)


def _check_finite(where: str, change: Change, remedy: str) -> None:
    if not (change.down.isfinite().all() and change.up.isfinite().all()):
        raise Failure(f"{where}: has numbers that are not finite; {remedy}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
