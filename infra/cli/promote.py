"""`longtake promote` and `longtake rollback`: choose the champion among the versions of a registered model."""

import json
from typing import Any

import click

from longtake.datasets.errors import UserError
from longtake.infra.cli import media

KEPT_BACK = 3  # exit code


@click.command()
@click.argument("name")
@click.option(
    "--candidate", required=True, metavar="VERSION", help="A version's number, or an alias such as candidate."
)
@click.option(
    "--gate", "path", required=True, metavar="FILE", help="Required gains and the data to measure them on; see below."
)
@click.option(
    "--evaluation", metavar="FOLDER", help="Measure nothing: decide by the figures of this `longtake evaluate --out`."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with all figures.")
def promote(name: str, candidate: str, path: str, evaluation: str | None, as_json: bool) -> None:
    """Make a version of the model NAME its champion, if it passes the gate.

    The version and the present champion are measured on the same clips of a dataset's val split. The old champion
    remains available as `previous`. The figures are in an MLflow run beside the candidate's. The gate is a YAML file:

    \b
      dataset: runs/quickstart/shards/0123456789ab
      view: runs/quickstart/shards/0123456789ab/views/0123456789ab.parquet    # optional
      metrics:                        # each must gain this much
        psnr_predicted: {better: higher, gain: 0.1}
      must_not_regress:               # none may lose more
        psnr_all: {better: higher, tolerance: 0.05}
      confidence: 0.95                # of each gain, over held-out sources
      least_sources: 8

    Priors have the metric loss, and need latents: (and low_latents:, text:, pooled:; a TATS tokens:, and audio_tokens:,
    captions: where it has learned them) beside dataset:.

    With --evaluation the gate names any of its figures, and no dataset. Both versions must have been evaluated there:

    \b
      longtake evaluate models:/latte/7 models:/latte@champion --dataset D --features i3d.pt --out fvd
      longtake promote latte --candidate 7 --gate fvd.yaml --evaluation fvd

    Exit codes: 0 the candidate is the champion, 3 kept back, 2 something to put right, 1 failure.
    """
    gate, inputs = read_gate(path, evaluation)
    uri = media.check_registry(f"models:/{name}" + (f"/{candidate}" if candidate.isdigit() else f"@{candidate}"))
    from longtake.training.registry import aliases
    from longtake.training.registry import store as model_store
    from longtake.training.registry.promote import let_through

    uri = str(model_store.resolve(uri)["uri"])
    number = aliases.split(uri)[1]
    with aliases.run_beside(uri, f"promote {name}/{number}") as run_id:
        outcome = let_through(uri, inputs, gate, run_id)
        aliases.log_metrics(run_id, outcome.figures())
    if as_json:
        facts = {"candidate": uri, "before": outcome.before, "champion": outcome.champion, "verdict": outcome.line()}
        click.echo(json.dumps(facts | {"run": run_id, "figures": outcome.figures()}))
    else:
        if outcome.verdict:
            click.echo(_table(outcome.verdict))
        click.echo(f"{outcome.line()}\nchampion: {outcome.champion or 'none'}   run {run_id}")
    if outcome.champion != uri:
        raise click.exceptions.Exit(KEPT_BACK)


@click.command()
@click.argument("name")
def rollback(name: str) -> None:
    """Make the `previous` version of the model NAME its champion again.

    The present champion becomes `previous`. Twice in a row changes nothing. The old champion gets the tags rollback.to
    and rollback.at.
    """
    media.check_registry(f"models:/{name}")
    from longtake.training.registry import promotion

    before, now = promotion.rollback(name)
    click.echo(f"models:/{name}: champion is v{now} again, previous is v{before}")


def read_gate(path: str, evaluation: str | None = None) -> tuple[Any, dict[str, str]]:
    """The gate of a file, and the inputs that the file names, or an evaluation in place of them. Raises UserError."""
    from pydantic import ValidationError, create_model

    from longtake.datasets import storage
    from longtake.datasets.stage import StageConfig
    from longtake.infra import recipe, yaml_text
    from longtake.training.registry.gate import Gate
    from longtake.training.registry.promote import COLUMNS

    names = ("dataset", "view", *COLUMNS)
    GateFile: Any = create_model("GateFile", __base__=Gate, **dict.fromkeys(names, (str | None, None)))  # type: ignore[call-overload]

    try:
        content = yaml_text.parse(storage.read(path).decode("utf-8-sig"), path)
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UserError(f"{path}: no such gate file") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not a text file") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: a gate is a mapping with the keys {', '.join(GateFile.model_fields)}")
    try:
        file = GateFile.model_validate(content)
    except ValidationError as e:
        model: type[StageConfig] = GateFile
        raise UserError(f"{path}: {recipe.first_line(e, 'gate', model)}") from e
    inputs = file.model_dump(include=set(names), exclude_none=True)
    if evaluation is None and "dataset" not in inputs:
        raise UserError(f"{path}: dataset: is missing; name the dataset to measure on, or give --evaluation")
    if evaluation is not None:
        if inputs:
            raise UserError(f"{path}: {min(inputs)}: the evaluation has its own clips; leave it out")
        inputs = {"evaluation": evaluation}
    return Gate(**file.model_dump(exclude=set(names), exclude_unset=True)), inputs


def _table(verdict: Any) -> str:
    lines = [f"{'metric':<16}{'candidate':>12}{'champion':>12}{'gain':>12}{'at least':>12}"]
    for metric, value in verdict.candidate.items():
        cells = [f"{value:>12.4g}", f"{verdict.champion[metric]:>12.4g}" if verdict.champion else f"{'-':>12}"]
        gain = verdict.gains.get(metric)
        cells += [f"{gain.gain:>+12.4g}", f"{gain.low:>+12.4g}"] if gain else [f"{'-':>12}"] * 2
        lines.append(f"{metric:<16}{''.join(cells)}")
    return "\n".join(lines)
