"""Commands about recipes: run, stage, graph, resolve, status, report."""

import json
import textwrap
import time
from typing import Any

import click

from longtake.datasets.masking import shown

STAGE_ENDED = "code"  # attribute of an error: the exit code of a stage's process, which has printed its own error

recipe_argument = click.argument("recipe")
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the recipe, e.g. --set stages.vae.steps=200. May be repeated.",
)


def load_pinned(path: str, overrides: tuple[str, ...]) -> Any:
    """The recipe with digests of what its stages read from outside."""
    from longtake.infra.graph import pin
    from longtake.infra.recipe import load

    return pin(load(path, overrides))


@click.command()
@recipe_argument
@set_option
@click.option(
    "--from", "start", metavar="STAGE", help="Run this stage and all that depend on it, even if they have finished."
)
@click.option("--only", metavar="STAGE", help="Run or reuse this stage alone.")
@click.option("--force", is_flag=True, help="Run the chosen stages even if they have finished.")
@click.option("--dry-run", is_flag=True, help="Say what would run and what would be reused, and stop.")
def run(
    recipe: str, overrides: tuple[str, ...], start: str | None, only: str | None, force: bool, dry_run: bool
) -> None:
    """Run RECIPE: its stages, in order, and its report.

    RECIPE is a YAML file or URL, or the name of a recipe of the package, such as quickstart. A stage that has finished
    with the same settings, code version and inputs is reused. Whatever stops a run, the same command continues it.

    \b
    Examples:
      VIDEOS=~/footage longtake run quickstart
      longtake run my.yaml --set stages.vae.steps=2000
      longtake run my.yaml --from vae
    """
    from longtake.infra import graph as graphs
    from longtake.infra import runner, runs

    begin = time.time()
    loaded = load_pinned(recipe, overrides)
    choice = runner.Choice(start, only, force)
    if dry_run:
        nodes = graphs.build(loaded)
        todo = runner.plan(loaded, nodes, runs.connect(loaded), choice)
        runner.check_observers([node for node in nodes if todo.get(node.name)])
        for name, needed in todo.items():
            click.echo(f"{name}: {'would run' if needed else 'would be reused'}")
        for node in nodes:
            for text in graphs.warnings(node) if todo.get(node.name) else ():
                click.echo(f"warning: {text}", err=True)
        return
    page = runner.run(loaded, choice, lambda line: click.echo(shown(line)))
    nodes = graphs.build(loaded)
    store = runs.connect(loaded)
    click.echo(f"\n{loaded.name}: done in {runner.elapsed(begin)}")
    for node in nodes:
        if finished := store.finished(node.fingerprint):
            click.echo(f"  {node.name:<10} {shown(finished.uri)}")
    if page:
        click.echo(f"  {'report':<10} {page}   <- open this in a browser")
    click.echo(f"  {'runs':<10} mlflow ui --backend-store-uri {shown(store.tracking_uri)}")


def _explain(context: click.Context, parameter: click.Parameter, kind: str | None) -> None:
    """Print the command's help, or the settings of a kind of stage."""
    if kind is None or context.resilient_parsing:
        return
    if not kind:
        click.echo(context.get_help())
        context.exit()
    from longtake.datasets.errors import UserError
    from longtake.infra import settings, stages
    from longtake.infra.deploy import Deploy

    if kind != "deploy" and kind not in stages.STAGES:
        raise UserError(
            f"--help {kind}: there is no such kind of stage; there are {', '.join(stages.STAGES)}, and deploy"
        )
    config = Deploy if kind == "deploy" else stages.load(kind).Config
    rows = list(settings.settings_of(config))
    keys, defaults = (max(len(row[n]) for row in rows) for n in (0, 1))
    defaults = min(defaults, 24)
    click.echo(f"{settings.summary_of(config)}\n")
    for key, default, text in rows:
        indent = " " * (keys + defaults + 4)
        beside = default if len(default) <= defaults else ""
        text_with_default = text if beside == default else f"{text} [default: {default}]"
        lines = textwrap.wrap(text_with_default, max(40, 118 - len(indent))) or [""]
        click.echo(f"{key:<{keys}}  {beside:<{defaults}}  {lines[0]}".rstrip())
        for line in lines[1:]:
            click.echo(indent + line)
    context.exit()


@click.command(add_help_option=False)
@click.option(
    "--help",
    metavar="[KIND]",
    is_flag=False,
    flag_value="",
    is_eager=True,
    expose_value=False,
    callback=_explain,
    help="Show this message, or the settings of a kind of stage, such as `--help pretrain_vae`, or of `deploy`.",
)
@recipe_argument
@click.argument("name")
@set_option
@click.option("--parent", metavar="RUN_ID", help="MLflow run of the recipe that this stage's run belongs to.")
@click.option("--force", is_flag=True, help="Run it even if it has finished.")
def stage(recipe: str, name: str, overrides: tuple[str, ...], parent: str | None, force: bool) -> None:
    """Run exactly the stage NAME of RECIPE, in this process. Its inputs must have finished.

    This is what `longtake run`, a cluster job and a scheduled task execute. A stage that trains may have several
    processes: by its `run.launcher` in the recipe ({by: torchrun, processes: 2}, or ray), or by a launcher of your own that
    starts this command, on every node of a job:

    \b
      torchrun --nproc-per-node 2 -m longtake.infra.cli stage my.yaml vae
      deepspeed --hostfile HOSTS --no_local_rank --module longtake.infra.cli stage my.yaml vae

    Such launchers exit with a code of their own when they are stopped. torchrun kills after 30 seconds: set
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT to the run.stop_seconds of the stage.
    """
    from longtake.training.launch.processes import spin_briefly

    # before torch is imported
    spin_briefly()
    from longtake.infra import runner
    from longtake.training import launch

    with launch.together():
        result = runner.run_stage(load_pinned(recipe, overrides), name, parent, force)
    if result:
        click.echo(f"{name}: {shown(result['uri'])}")


@click.command()
@recipe_argument
@set_option
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="The whole graph as JSON, for schedulers; of overrides it takes those of `deploy`.",
)
def graph(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show the stages of RECIPE, their inputs and order."""
    from longtake.datasets.errors import UserError
    from longtake.infra import graph as graphs

    for override in overrides if as_json else ():
        if not override.startswith("deploy."):
            raise UserError(
                f"--set {override}: a scheduler resolves {recipe} anew, without it; write a recipe that has it and `base: {recipe}`"
            )
    loaded = load_pinned(recipe, overrides)
    nodes = graphs.build(loaded)
    if as_json:
        click.echo(json.dumps(graphs.describe(loaded, nodes), indent=2))
        return
    for node in nodes:
        inputs = ", ".join(f"{field}={shown(value)}" for field, value in node.inputs.items())
        click.echo(f"{node.name:<12} {node.kind:<14} {inputs or '-':<30} {node.fingerprint[:12]}")


@click.command()
@recipe_argument
@set_option
@click.option("--to", "target", required=True, metavar="URL", help="File to write; an existing one is kept.")
def resolve(recipe: str, overrides: tuple[str, ...], target: str) -> None:
    """Write RECIPE with everything resolved, for a scheduler.

    Resolved are bases, overrides, variables, and digests of what its stages read from outside. Commands that get this
    file see the same sources, even if some are added later. The last line printed is JSON: `recipe`, the file, its
    `workspace`, and `todo`, the stages that have not finished.
    """
    from longtake.datasets import storage
    from longtake.datasets.errors import UserError
    from longtake.infra import graph as graphs
    from longtake.infra import recipe as recipes
    from longtake.infra import runner, runs

    target = storage.absolute(target)
    recipes.refuse_login("--to", target)
    if not storage.exists(target):
        loaded = load_pinned(recipe, overrides)
        with storage.failing_clearly(target):
            # a second process that resolves at the same time takes the file of the first
            storage.write_if_absent(target, loaded.to_yaml().encode())
    elif overrides:
        raise UserError(f"--set: {target} is there already; name another file, or leave --set out")
    loaded = recipes.load(target)
    nodes = graphs.build(loaded)
    todo = runner.plan(loaded, nodes, runs.connect(loaded), runner.Choice())
    unfinished = [name for name, needed in todo.items() if needed]
    click.echo(json.dumps({"recipe": target, "workspace": loaded.workspace, "todo": unfinished}))


@click.command()
@recipe_argument
@set_option
def status(recipe: str, overrides: tuple[str, ...]) -> None:
    """Show the run of each stage of RECIPE with these settings, and its product."""
    from longtake.infra import graph as graphs
    from longtake.infra import runs

    loaded = load_pinned(recipe, overrides)
    store = runs.connect(loaded)
    for node in graphs.build(loaded):
        run = store.find(node.fingerprint)
        if run is None:
            click.echo(f"{node.name:<12} {'not run':<10}")
        else:
            facts = f"{run.status.lower():<10} {run.seconds:8.1f} s   {shown(run.uri or run.error)}   run {run.id}"
            click.echo(f"{node.name:<12} {facts}")
    click.echo(f"\nruns: mlflow ui --backend-store-uri {shown(store.tracking_uri)}")


@click.command()
@recipe_argument
@set_option
def report(recipe: str, overrides: tuple[str, ...]) -> None:
    """Write report.html of RECIPE's workspace again, from what has run so far."""
    from longtake.infra import graph as graphs
    from longtake.infra import runner, runs

    loaded = load_pinned(recipe, overrides)
    nodes = graphs.build(loaded)
    store = runs.connect(loaded)
    whole = graphs.whole_fingerprint(nodes)
    before = store.find(whole)
    parent = store.open_parent(loaded, whole)
    path = runner.make_report(loaded, nodes, store, parent, reused=set())
    stages = {node.name: store.find(node.fingerprint) for node in nodes}
    unfinished = {name: run for name, run in stages.items() if run is None or run.status != "FINISHED"}
    if not unfinished:
        store.finish(parent, {"uri": str(path)})
    elif before is None or before.status != "RUNNING":
        failed = "FAILED" in {run.status for run in (before, *unfinished.values()) if run}
        store.end(parent, "FAILED" if failed else "KILLED", f"not finished: {', '.join(unfinished)}")
    click.echo(str(path))
