"""`longtake evaluate`: models of any families side by side on the same held-out clips."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from longtake.datasets.errors import UserError
from longtake.datasets.masking import shown
from longtake.infra.cli import media


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--dataset", required=True, metavar="DATASET", help="Whose held-out clips the models are measured on.")
@click.option("--view", metavar="VIEW", help="Which of them: the URL of a view, or its name. [default: all]")
@click.option(
    "--suite",
    "suite_name",
    default="default",
    show_default=True,
    metavar="NAME|FILE.yaml",
    help="Which clips, prompts, seeds, lengths and measures: default, gap, long, recall, text, or a file.",
)
@click.option(
    "--out",
    default="evaluation",
    show_default=True,
    metavar="FOLDER",
    help="Where results, videos and the table are kept.",
)
@click.option("--measures", metavar="A,B,...", help="These alone. [default: all that the models and networks allow]")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the suite, e.g. --set suite.clips.most=64. May be repeated.",
)
@click.option(
    "--vbench",
    metavar="FOLDER",
    help="Write the first videos of the suite there too, in the layout that VBench's tool reads: a folder for each model.",
)
@click.option("--features", metavar="FILE", help="A feature network, for Fréchet and kernel distances, such as I3D.")
@click.option("--debiased", metavar="FILE", help="A second one, for the content-debiased distance, such as VideoMAE.")
@click.option("--classifier", metavar="FILE", help="A classifier of clips, for IS, CCS and ICS, such as C3D.")
@click.option("--perceptual", metavar="FILE", help="A network of images, for LPIPS, such as VGG16.")
@click.option("--linear", metavar="FILE", help="Its learned weights.")
@click.option(
    "--dual", metavar="FOLDER", help="An encoder of pictures and texts, for the agreement with prompts, such as CLIP."
)
@click.option("--embedder", metavar="FOLDER", help="An image encoder, for CLIP-RS.")
def evaluate(
    models: tuple[str, ...],
    dataset: str,
    view: str | None,
    suite_name: str,
    out: str,
    measures: str | None,
    overrides: tuple[str, ...],
    vbench: str | None,
    **networks: str | None,
) -> None:
    """Measure MODELs of any families side by side, on the same clips of a dataset's val split, prompts and seeds.

    A MODEL is in the registry (models:/pv-vae@champion), a model folder, or a folder of diffusers. Each gets the measures
    that its family makes sense of. Every figure comes with an interval of 95 % by a bootstrap over sources, and with its
    conditions; figures of other conditions are never put beside it. FOLDER keeps each result and each video as it is done:
    after a stop the same command continues, and another model is added to the table by a call of its own. The table is in
    FOLDER/evaluation.json, and with curves and videos in FOLDER/report.html. Where MLFLOW_TRACKING_URI is set, MLflow gets
    a run for the evaluation, and below it one for each model.

    \b
    Examples:
      export MLFLOW_TRACKING_URI=sqlite:///runs/quickstart/mlflow.db
      longtake evaluate models:/pv-vae@champion models:/latte@champion --dataset runs/quickstart/shards/0123456789ab
      longtake evaluate models:/latte/1 models:/latte/2 --dataset D --features i3d.pt --set suite.clips.most=2048
      longtake evaluate models:/memory-dit@champion --dataset D --suite long --out long
    """
    uris = [media.check_registry(model) for model in models]
    store = _store()
    suite = suite_of(suite_name, overrides, measures)
    with media.memory_errors("lower suite.chunk, suite.clips.frames or suite.clips.size"):
        from longtake.datasets import view as views
        from longtake.infra import report
        from longtake.training.evaluation import run, table, tracked
        from longtake.training.evaluation.suite import Networks

        folder, vbench_folder = folder_of("--out", out), folder_of("--vbench", vbench) if vbench else None
        place = views.address(dataset, view) if view else None
        made = run.evaluate(uris, dataset, place, suite, Networks(**networks), folder, _say, vbench_folder)
    click.echo(table.printed(made))
    page = report.build_of_evaluation(folder)
    click.echo(str(Path(out) / table.FILE))
    click.echo(f"{Path(out) / page.name}   <- open this in a browser")
    if store:
        with tracked.run(folder.resolve().name, _artifacts(store)) as run_id:
            tracked.write(made, folder, run_id)
            tracked.page(page, run_id)
        click.echo(f"run {run_id} in {shown(store)}")


def suite_of(name: str, overrides: tuple[str, ...] = (), measures: str | None = None) -> Any:
    """The suite of a name or a file, with overrides `suite.KEY=VALUE`. Raises UserError."""
    from pydantic import ValidationError

    from longtake.datasets import storage
    from longtake.infra import recipe, yaml_text
    from longtake.training.evaluation.suite import Suite, builtin, text_of

    if name in builtin():
        text = text_of(name)
    elif not name.endswith((".yaml", ".yml")) and not storage.exists(name):
        raise UserError(f"--suite: there is no {name!r}; there are {', '.join(builtin())}, or name a file")
    else:
        try:
            text = storage.read(name).decode("utf-8-sig")
        except (FileNotFoundError, IsADirectoryError) as e:
            raise UserError(f"--suite: {name}: no such file; there are {', '.join(builtin())}") from e
        except UnicodeDecodeError as e:
            raise UserError(f"--suite: {name}: not a text file") from e
    content = {"suite": yaml_text.parse(text, f"--suite: {name}") or {}}
    if not isinstance(content["suite"], dict):
        raise UserError(f"--suite: {name}: a suite is a mapping with the keys {', '.join(Suite.model_fields)}")
    for override in overrides:
        if not override.startswith("suite."):
            raise UserError(f"--set {override}: write suite.KEY=VALUE, such as suite.clips.most=64")
        recipe.set_in(content, override)
    if measures is not None:
        content["suite"]["measures"] = [part.strip() for part in measures.split(",") if part.strip()]
    try:
        return Suite.model_validate(content["suite"])
    except ValidationError as e:
        raise UserError(f"{name}: {recipe.first_line(e, 'suite', Suite)}") from e


def folder_of(option: str, out: str) -> Path:
    """The folder that an option names. Raises UserError for one that is elsewhere, a file, or not to be written."""
    from longtake.datasets import storage

    if not storage.is_local(out):
        raise UserError(f"{option}: {out}: is elsewhere; name a folder of this machine")
    folder = Path(storage.filesystem(out)[1])
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        what = "is a file" if there == folder else f"is below the file {there}"
        raise UserError(f"{option}: {out}: {what}; name a folder")
    try:
        with TemporaryDirectory(dir=there, prefix="."):
            pass
    except OSError as e:
        raise UserError(f"{option}: {out}: cannot be written ({e.strerror}); name another folder") from e
    return folder


def _say(line: str) -> None:
    click.echo(line, err=True)


def _store() -> str:
    """The URI of MLflow's store; empty where none is named. Raises UserError for a database that does not exist."""
    from longtake.infra.sqlite_store import path_of

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if (path := path_of(uri)) and not path.is_file():
        raise UserError(f"MLFLOW_TRACKING_URI={uri}: no such database")
    return uri


def _artifacts(store: str) -> str | None:
    """Where a store keeps artifacts, if it has no place of its own: beside the database, as that of a recipe does."""
    from longtake.infra.sqlite_store import path_of

    path = path_of(store)
    return None if path is None else f"{path.parent.absolute()}/artifacts"
