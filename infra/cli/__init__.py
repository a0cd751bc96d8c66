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
from longtake.infra.cli import dataset, generate, housekeeping, models, promote, recipe, reconstruct, retrieve, submit

_SHELL = """
Start here:

\b
  longtake run quickstart               a whole recipe, from videos to a registered model
  longtake run my.yaml --dry-run        what would run, and what is reused
  longtake status my.yaml               what has run, where it is
  longtake dataset ls DATASET           what is in a dataset
  longtake submit my.yaml --address http://head:8265    the same on a Ray cluster
  longtake models list                  the registered models

Exit codes: 0 done, 1 failure, 2 something to put right in the recipe or the command, 3 kept back by a gate (`longtake
promote` alone), 130 stopped by Ctrl-C. Stopped by
SIGTERM, or by a Ray cluster that takes a node away: 0 when the state is saved, for a scheduler to run it again; 1 if that
took longer than stop_seconds. The same command goes on.
"""

_STOPPED = 130


@click.group(epilog=_SHELL, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="longtake")
def cli() -> None:
    """Longtake turns raw videos into training shards, and the shards into registered video models."""


for command in (
    *(recipe.run, recipe.stage, recipe.graph, recipe.resolve, recipe.status, recipe.report),
    *(housekeeping.plan, housekeeping.doctor, housekeeping.clean),
    *(submit.submit, submit.jobs_group, submit.render),
    *(models.models, promote.promote, promote.rollback),
    *(dataset.footage, dataset.dataset, generate.generate, reconstruct.reconstruct, retrieve.retrieve),
):
    cli.add_command(command)


def main() -> None:
    """Entry point: our errors are one line and an exit code, never a stack trace."""
    environment.tidy()
    sys.excepthook = _print_trace
    signal.signal(signal.SIGTERM, _stop)
    came = _signals_noted()
    code = _guarded(lambda: cli(standalone_mode=False))
    if code == _STOPPED and signal.SIGINT not in came():
        # the state is saved: nothing went wrong that a scheduler should report, but one that takes 0 for done
        code = int(os.environ.get("LONGTAKE_STOPPED_CODE", "0"))
    # native threads of torch and its like have aborted a process that had done its work while it unloaded them
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _print_trace(*raised: Any) -> None:
    """A stack trace as Python prints it, but for passwords."""
    print(shown("".join(traceback.format_exception(*raised))), end="", file=sys.stderr)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def _signals_noted() -> Callable[[], set[int]]:
    """Note every signal that has come from now on, whoever handles it."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def came() -> set[int]:
        with contextlib.suppress(BlockingIOError):
            return set(os.read(read, 1 << 16))
        return set()

    return came


def _guarded(action: Callable[[], Any]) -> int:
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
        return _say(UserError(f'the package {e.name} is missing; run: pip install "longtake[all]"'), 2)
    except UserError as e:
        return _say(e, 2)
    except Failure as e:
        code = getattr(e, STAGE_ENDED, None)
        # a stage's own process has said what went wrong
        return code if code is not None else _say(e, 1)
    except Interrupted as e:
        return _stopped(str(e)) if e.args else _STOPPED
    except (KeyboardInterrupt, click.Abort):
        return _stopped("stopped")
    except SystemExit as e:
        # Ray's answer to SIGTERM
        if e.code != signal.SIGTERM:
            raise
        return _stopped("stopped")
    except Exception as e:
        line = _trouble(e)
        if line is None:
            raise
        return _say(Failure(line), 1)


def _trouble(error: BaseException | None) -> str | None:
    """What is wrong with a disk or an sqlite store, and the remedy; None of other errors.

    Libraries wrap it in errors of their own, some without keeping the cause.
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


def _stopped(what: str) -> int:
    print(f"\n{what}; run the same command again to go on", file=sys.stderr)
    return _STOPPED


def _say(error: Exception, code: int) -> int:
    line = shown(" ".join(str(error).split()))
    print(f"error: {line}", file=sys.stderr)
    return code
