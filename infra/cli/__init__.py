"""The `longtake` command. Heavy packages are imported by the commands that need them, so that --help is instant."""

import atexit
import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from longtake.datasets import environment
from longtake.datasets.errors import Failure, Interrupted, UserError
from longtake.datasets.masking import shown
from longtake.infra.cli import (
    browse,
    dataset,
    evaluate,
    export,
    generate,
    housekeeping,
    infill,
    layouts,
    models,
    promote,
    recipe,
    reconstruct,
    retrieve,
    submit,
)

_EPILOG = """
Start here:

\b
  longtake run quickstart               a whole recipe, from videos to a registered model
  longtake run my.yaml --dry-run        what would run, and what is reused
  longtake status my.yaml               what has run, where it is
  longtake dataset ls DATASET           what is in a dataset
  longtake browse DATASET               look through its clips
  longtake submit my.yaml --address http://head:8265    the same on a Ray cluster
  longtake models list                  the registered models

Exit codes:

\b
  0    done; or stopped by SIGTERM or a lost node of a Ray cluster, with the state saved
  1    failure; or stopped like that, but saving took longer than stop_seconds
  2    something to put right in the recipe or the command
  3    kept back by a gate (`longtake promote` alone)
  130  stopped by Ctrl-C

After a stop the same command continues where it was.
"""

_STOPPED = 130


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="longtake")
def cli() -> None:
    """Longtake turns raw videos into training shards, and the shards into registered video models."""


for command in (
    *(recipe.run, recipe.stage, recipe.graph, recipe.resolve, recipe.status, recipe.report),
    *(housekeeping.plan, housekeeping.doctor, housekeeping.clean),
    *(submit.submit, submit.jobs_group, submit.render),
    *(models.models, evaluate.evaluate, promote.promote, promote.rollback, export.export),
    *(dataset.footage, layouts.dataset, browse.browse),
    *(generate.generate, infill.infill, reconstruct.reconstruct, retrieve.retrieve),
):
    cli.add_command(command)


def main() -> None:
    """Entry point: our errors are one line and an exit code, never a stack trace."""
    environment.tidy()
    sys.excepthook = _print_trace
    signal.signal(signal.SIGTERM, _stop)
    signals = _record_signals()
    code = exit_code(lambda: cli(standalone_mode=False))
    if code == _STOPPED and signal.SIGINT not in signals():
        # the state is saved: no failure, unless the scheduler takes 0 for finished work
        code = int(os.environ.get("LONGTAKE_STOPPED_CODE", "0"))
    # native threads, such as torch's, can abort a process that has finished while it unloads them
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _print_trace(*error: Any) -> None:
    """Print a stack trace as Python does, without passwords."""
    print(shown("".join(traceback.format_exception(*error))), end="", file=sys.stderr)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def _record_signals() -> Callable[[], set[int]]:
    """Record every signal from now on, whoever handles it; returns a function that gives them."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def signals() -> set[int]:
        with contextlib.suppress(BlockingIOError):
            return set(os.read(read, 1 << 16))
        return set()

    return signals


def exit_code(action: Callable[[], Any]) -> int:
    """The exit code of an action; our errors are printed as one line, others are raised."""
    from longtake.infra.cli.recipe import STAGE_ENDED

    try:
        return action() or 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        e.show()
        return 2
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("longtake"):
            raise
        return _print_error(UserError(f'the package {e.name} is missing; run: pip install "longtake[all]"'), 2)
    except UserError as e:
        return _print_error(e, 2)
    except Failure as e:
        code = getattr(e, STAGE_ENDED, None)
        # a stage's own process has printed its error
        return code if code is not None else _print_error(e, 1)
    except Interrupted as e:
        return _print_stop(str(e)) if e.args else _STOPPED
    except (KeyboardInterrupt, click.Abort):
        return _print_stop("stopped")
    except SystemExit as e:
        # Ray's answer to SIGTERM
        if e.code != signal.SIGTERM:
            raise
        return _print_stop("stopped")
    except Exception as e:
        line = _disk_error(e)
        if line is None:
            raise
        return _print_error(Failure(line), 1)


def _disk_error(error: BaseException | None) -> str | None:
    """An error of a disk or an sqlite store, with its remedy; None for other errors.

    Libraries wrap such errors in their own, sometimes without the cause.
    """
    store = f"MLFLOW_TRACKING_URI={os.environ.get('MLFLOW_TRACKING_URI')}"
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "disk is full" in str(error):
            return "the disk is full; free some space, then run the same command again"
        if "database is locked" in str(error):
            return f"{store}: another program keeps it locked; end it, then run the same command again"
        if "readonly database" in str(error) or "unable to open database file" in str(error):
            return f"{store}: cannot be written; give write permission, or choose another workspace or store"
        error = error.__cause__ or error.__context__
    return None


def _print_stop(message: str) -> int:
    print(f"\n{message}; run the same command again to go on", file=sys.stderr)
    return _STOPPED


def _print_error(error: Exception, code: int) -> int:
    line = shown(" ".join(str(error).split()))
    print(f"error: {line}", file=sys.stderr)
    return code
