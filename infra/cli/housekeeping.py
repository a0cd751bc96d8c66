"""Commands that look after machines and workspaces: doctor, clean, plan."""

import json
import re
from collections.abc import Mapping
from typing import Any

import click

from longtake.datasets.masking import shown, shown_within
from longtake.infra.cli.recipe import load_pinned, recipe_argument, set_option

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def _bytes(count: float) -> str:
    unit = 0
    while count >= 1000 and unit + 1 < len(_UNITS):
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} B" if not unit else f"{count:.1f} {_UNITS[unit]}"


@click.command()
@recipe_argument
@set_option
@click.option(
    "--checkpoints",
    "kinds",
    flag_value="checkpoints",
    multiple=True,
    help="Checkpoints that no run would resume, and copies.",
)
@click.option("--latents", "kinds", flag_value="latents", multiple=True, help="Latents of unused versions of encoders.")
@click.option("--tokens", "kinds", flag_value="tokens", multiple=True, help="Tokens of unused versions of encoders.")
@click.option("--text", "kinds", flag_value="text", multiple=True, help="Texts of encoders that no stage names.")
@click.option(
    "--scores", "kinds", flag_value="scores", multiple=True, help="Scores and clusters that no stage makes any more."
)
@click.option("--debris", "kinds", flag_value="debris", multiple=True, help="What killed processes left behind.")
@click.option("--cache", "kinds", flag_value="cache", multiple=True, help="Pulled models that no URI names any more.")
@click.option("--captions", "kinds", flag_value="captions", multiple=True, help="Captions that no stage uses any more.")
@click.option("--older", default=1.0, show_default=True, metavar="HOURS", help="Least age of debris.")
@click.option("--yes", is_flag=True, help="Delete; without it nothing is touched.")
def clean(recipe: str, overrides: tuple[str, ...], kinds: tuple[str, ...], older: float, yes: bool) -> None:
    """List what RECIPE's workspace no longer needs, and why; with --yes, delete it.

    Without a choice: checkpoints, latents, tokens, texts, scores and debris; not captions, which may have cost money. What a
    run would resume or reuse stays. So do shards, sources and views, and everything used by a run that is RUNNING in MLflow or
    holds the lock of its checkpoints.

    \b
    Examples:
      longtake clean my.yaml
      longtake clean my.yaml --checkpoints --yes
    """
    from longtake.infra import graph as graphs
    from longtake.infra import runs
    from longtake.infra.upkeep import clean as cleaning
    from longtake.infra.upkeep import debris

    loaded = load_pinned(recipe, overrides)
    store = runs.connect(loaded)
    chosen = [kind for kind in cleaning.KINDS if kind in (kinds or cleaning.USUAL)]
    candidates = list(cleaning.find(loaded, graphs.build(loaded), store, chosen, older * 3600))
    kept = [each for each in candidates if isinstance(each, debris.Kept)]
    items = []
    for item in candidates:
        if isinstance(item, debris.Kept):
            continue
        if yes and (refusal := cleaning.remove(item, store)):
            kept.append(refusal)
            continue
        items.append(item)
        click.echo(
            f"{'gone' if yes else 'would go':<9} {_bytes(item.bytes):>9}  {item.kind:<13} {shown(item.where)}: {shown(item.reason)}"
        )
    for item in kept:
        click.echo(f"{'stays':<9} {'':>9}  {'':<13} {shown(item.where)}: {shown(item.reason)}")
    total = f"{len(items)} of {_bytes(sum(item.bytes for item in items))}"
    click.echo(f"{total} deleted" if yes else f"{total} would go; add --yes to delete")


@click.command()
@click.argument("recipe", required=False)
@set_option
@click.option("--address", metavar="URL", help="Dashboard of the Ray cluster to run on, http://HEAD:8265.")
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON.")
def doctor(recipe: str | None, overrides: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Check this machine and, with RECIPE, its servers, storage, sources and cluster.

    Exit code 1 if a check fails. Whatever is written for a check is deleted again.

    \b
    Examples:
      longtake doctor
      longtake doctor my.yaml --address http://head:8265
    """
    from longtake.infra import graph as graphs
    from longtake.infra import recipe as recipes
    from longtake.infra.upkeep import doctor as doctors

    # sources that cannot be listed are a finding, so they are not pinned
    loaded = recipes.load(recipe, overrides) if recipe else None
    lines = []
    for line in doctors.examine(loaded, graphs.build(loaded) if loaded else None, address):
        lines.append(line)
        if not as_json:
            click.echo(f"{line.level:<5} {line.check}: {line.says}" + (f"; {line.fix}" if line.fix else ""))
    if as_json:
        click.echo(json.dumps([line._asdict() for line in lines], indent=2))
    if any(line.level == "fail" for line in lines):
        raise click.exceptions.Exit(1)


def _size(context: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """Bytes of "80GB" or "80 GiB"."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kMGT]?)(i?)B", text)
    if not match or not float(match[1]):
        raise click.BadParameter(f"{text!r} is no size; write such as 80GB or 24GiB")
    return float(match[1]) * (1024 if match[3] else 1000) ** ("", "k", "M", "G", "T").index(match[2])


@click.command()
@recipe_argument
@set_option
@click.option("--sample", default=5, show_default=True, type=click.IntRange(1), help="Sources to measure.")
@click.option(
    "--trial",
    default=0.0,
    metavar="SECONDS",
    help="Where no run with these settings was measured, run the recipe on the sample with few steps, for at most this long.",
)
@click.option("--cpu-hour", default=0.0, metavar="PRICE", help="Price of a CPU hour.")
@click.option("--gpu-hour", default=0.0, metavar="PRICE", help="Price of a GPU hour.")
@click.option(
    "--gpu-memory", metavar="SIZE", callback=_size, help="Of one GPU, such as 80GB; by default this machine's."
)
@click.option("--json", "as_json", is_flag=True, help="The estimate as JSON.")
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    sample: int,
    trial: float,
    cpu_hour: float,
    gpu_hour: float,
    gpu_memory: float | None,
    as_json: bool,
) -> None:
    """Estimate what a run of RECIPE would make and cost: clips, bytes, hours, by stage. Only a sample is run.

    Rates are measured. For sources, frames of a few are cut here. For training, runs with the same settings count or, with
    --trial, some steps on this machine: so also for stages that pass over the clips, but for those of a dataset that is
    there already, to which a trial would write. What has not been measured is reported as unknown.

    The memory of each training is that of one GPU at its largest batch, computed without data, weights or a GPU. Where it
    does not fit, the smallest change by which it does is named.

    \b
    Examples:
      longtake plan my.yaml --cpu-hour 0.05 --gpu-hour 2.5
      longtake plan my.yaml --gpu-memory 80GB
      longtake plan my.yaml --trial 600
    """
    from longtake.infra import graph as graphs
    from longtake.infra import runs
    from longtake.infra.upkeep import estimate as estimates
    from longtake.infra.upkeep import memory as memories

    loaded = load_pinned(recipe, overrides)
    nodes = graphs.build(loaded)
    estimate = estimates.estimate(loaded, nodes, runs.connect(loaded), trial, sample)
    gpu = gpu_memory or memories.device_memory()
    estimate["memory"] = list(memories.memory(nodes, gpu))
    price = estimates.money(estimate, cpu_hour, gpu_hour) if cpu_hour or gpu_hour else None
    if as_json:
        click.echo(json.dumps(shown_within(estimate | {"money": price and price._asdict()}), indent=2))
        return
    for source in estimate["sources"]:
        why = f", no clip: {source['rejected']}" if source["rejected"] else ""
        size = f"{source['width']}x{source['height']}, {_bytes(source['bytes'])}"
        click.echo(f"  {shown(source['uri'])}: {source['seconds']:.1f} s, {size}{why}")
    for stage in estimate["stages"]:
        click.echo(f"{stage['name']:<12} {_costs(stage) if stage['todo'] else 'nothing to do'}   ({stage['how']})")
    todo = any(stage["todo"] for stage in estimate["stages"])
    click.echo(f"{'total':<12} {_costs(estimate['total']) if todo else 'nothing to do'}")
    disk = estimate["disk"]
    if disk["free"] is not None and disk["needed"]:
        enough = "enough for what is known" if disk["enough"] else "NOT enough: free some, or choose another workspace"
        click.echo(f"{'disk':<12} {_bytes(disk['needed']['high'])} at most of {_bytes(disk['free'])} free, {enough}")
    for row in estimate["memory"]:
        click.echo(f"{'memory':<12} {row['name']}: {_memory(row, gpu)}")
    if price:
        click.echo(f"{'money':<12} {price.value:.4g} ({price.low:.4g} to {price.high:.4g}) for the hours above")
    for line in estimate["unknown"]:
        click.echo(f"{'unknown':<12} {shown(line.replace('not known: ', ''))}")
    if estimate["to_try"] and not trial:
        click.echo(f"{'':<12} --trial SECONDS measures some steps of each stage here")


def _memory(row: Mapping[str, Any], gpu: float | None) -> str:
    """What a training takes of a GPU, of what it consists, and by which changes it fits."""
    if row["takes"] is None:
        return f"not known: {shown(row['why'])}"
    parts = sorted(row["takes"].items(), key=lambda part: -part[1])
    of = ", ".join(f"{name} {_bytes(size)}" for name, size in parts if size and name != "total")
    said = f"{_bytes(row['takes']['total'])} a GPU ({of})"
    if gpu is None or row["fits"]:
        return said + (f", fits {_bytes(gpu)}" if gpu else "")
    if not row["changes"]:
        return f"{said}, does NOT fit {_bytes(gpu)}, whatever is changed but the optimizer: choose a smaller model, window or batch"
    return f"{said}, does NOT fit {_bytes(gpu)}; {', '.join(row['changes'])} makes it {_bytes(row['then']['total'])}"


def _costs(stage: Mapping[str, Any]) -> str:
    parts = [f"{stage['sources']} sources of {_bytes(stage['source_bytes'])}"] if stage.get("sources") else []
    if clips := stage.get("clips"):
        parts.append(f"{clips['value']:.0f} clips ({clips['low']:.0f} to {clips['high']:.0f})")
    if written := stage.get("bytes"):
        parts.append(f"{_bytes(written['value'])} ({_bytes(written['low'])} to {_bytes(written['high'])})")
    for key, unit in (("wall_hours", "h"), ("cpu_hours", "CPU h"), ("gpu_hours", "GPU h")):
        if hours := stage.get(key):
            parts.append(f"{hours['value']:.3g} {unit} ({hours['low']:.3g} to {hours['high']:.3g})")
    return ", ".join(parts) or "not known"
