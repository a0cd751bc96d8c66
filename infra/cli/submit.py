"""Commands about clusters: submit, jobs list | logs | stop, render kuberay."""

import datetime
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from longtake.infra.cli.recipe import load_pinned, recipe_argument, set_option

_address = click.option(
    "--address",
    metavar="URL",
    help="The Ray dashboard, http://HEAD:8265; else RAY_API_SERVER_ADDRESS or RAY_ADDRESS.",
)
_stage = click.option("--stage", metavar="STAGE", help="This stage alone; its inputs must have finished.")


@click.command()
@recipe_argument
@set_option
@_address
@_stage
@click.option("--detach", is_flag=True, help="Do not wait for the job; print its id.")
@click.option("--force", is_flag=True, help="Do the work anew even if a job has done it.")
@click.option("--no-check", is_flag=True, help="Submit even if no node has room: for a cluster that grows by itself.")
def submit(
    recipe: str,
    overrides: tuple[str, ...],
    address: str | None,
    stage: str | None,
    detach: bool,
    force: bool,
    no_check: bool,
) -> None:
    """Run RECIPE as a job of a Ray cluster, and print its output.

    The job gets the code that is installed here. The same recipe is the same job. Submitted again, it attaches to the
    job that runs. After a job that failed or was stopped, a new one continues its work. Ctrl-C leaves the job running.
    The exit code is the job's.

    The workspace and the sources must be where the nodes reach them. Of the variables that are set here, a job gets
    those that `deploy.env` of the recipe names. A token of the cluster is read from RAY_AUTH_TOKEN or
    RAY_AUTH_TOKEN_PATH.

    \b
    Examples:
      longtake submit my.yaml --address http://head:8265
      longtake submit my.yaml --address http://head:8265 --stage vae --detach
    """
    from longtake.infra.cluster import jobs
    from longtake.infra.cluster import submit as submission

    url = jobs.address_of(address)
    loaded = load_pinned(recipe, overrides)
    client = jobs.client(url)
    submitted = submission.submit(client, loaded, stage, force, not no_check)
    if submitted.how == "done":
        _note(f"job {submitted.job} {submitted.note}: nothing to do; --force does it anew")
        return
    attached = "; attached to it" if submitted.how == "attached" else ""
    _note(f"job {submitted.job} {submitted.note or 'is submitted'}{attached}")
    if detach:
        _note(_ways_back(url, submitted.job))
        click.echo(submitted.job)
        return
    _attach(client, url, submitted.job)


def _attach(client: Any, address: str, job: str) -> NoReturn:
    from longtake.infra.cluster import submit as submission

    try:
        code, line = submission.watch(client, job, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        _note(f"\njob {job} goes on; {_ways_back(address, job)}")
        _leave(130)
    _note(f"error: {line}" if code else line)
    _leave(code)


def _leave(code: int) -> NoReturn:
    # not by an exception of ours: `longtake` would turn 130 into 0 for a command that was stopped itself
    sys.exit(code)


def _ways_back(address: str, job: str) -> str:
    where = shlex.join([job, "--address", address])
    return f"watch it: longtake jobs logs {where} --follow; stop it: longtake jobs stop {where}"


def _note(line: str) -> None:
    click.echo(line, err=True)


@click.group(name="jobs")
def jobs_group() -> None:
    """The jobs that `longtake submit` has started on a Ray cluster."""


@jobs_group.command(name="list")
@_address
def list_(address: str | None) -> None:
    """List the jobs of the cluster, the latest first."""
    from longtake.infra.cluster import jobs

    ours = jobs.ours(jobs.client(jobs.address_of(address)))
    for job in ours:
        start = datetime.datetime.fromtimestamp((job.start_time or 0) / 1000).astimezone()
        code = jobs.exit_code(job) if job.status.is_terminal() else None
        ending = "" if code is None else f"exit {code}"
        click.echo(f"{job.submission_id:<50} {job.status.value:<10} {start:%Y-%m-%d %H:%M:%S}  {ending}".rstrip())
    if not ours:
        click.echo("no jobs")


@jobs_group.command()
@click.argument("job")
@_address
@click.option("--follow", is_flag=True, help="Continue until the job has ended; the exit code is the job's.")
def logs(job: str, address: str | None, follow: bool) -> None:
    """Print the output of JOB."""
    from longtake.infra.cluster import jobs

    url = jobs.address_of(address)
    client = jobs.client(url)
    if follow:
        jobs.info(client, job)
        _attach(client, url, job)
    click.echo(jobs.log(client, job), nl=False)


@jobs_group.command()
@click.argument("job")
@_address
@click.option("--wait", is_flag=True, help="Wait until it has saved its state and ended.")
def stop(job: str, address: str | None, wait: bool) -> None:
    """Ask JOB to save its state and stop. It has `deploy.stop_seconds` of its recipe; a new submission continues."""
    from longtake.infra.cluster import jobs

    status = jobs.stop(jobs.client(jobs.address_of(address)), job, wait)
    click.echo(f"{job}: {status.lower()}" + ("" if status in ("STOPPED", "SUCCEEDED", "FAILED") else ", asked to stop"))


@click.group()
def render() -> None:
    """Write manifests of a recipe for other systems."""


@render.command()
@recipe_argument
@set_option
@_stage
@click.option("--to", "folder", metavar="FOLDER", help="Write FOLDER/NAME.yaml; else to the standard output.")
def kuberay(recipe: str, overrides: tuple[str, ...], stage: str | None, folder: str | None) -> None:
    """RECIPE as a RayJob of KubeRay, with the ConfigMap that has the recipe: for kubectl apply.

    `deploy.image` of the recipe names the image of the pods, and `deploy.kuberay` their number and size. Values of variables
    are written down only for those that `deploy.kuberay.plain` names; the others come from a Secret.

    \b
    Examples:
      longtake render kuberay my.yaml | kubectl apply -f -
      longtake render kuberay my.yaml --stage vae --to manifests
    """
    from longtake.infra.cluster import kuberay as manifests
    from longtake.infra.cluster import submit as submission

    loaded = load_pinned(recipe, overrides)
    text = manifests.render(loaded, loaded.deploy.kuberay, stage)
    if folder is None:
        click.echo(text, nl=False)
        return
    path = Path(folder) / f"{submission.work(loaded, stage).name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    click.echo(str(path))
