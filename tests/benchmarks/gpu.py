"""What a GPU is worth to Longtake, for a machine that is there for ten minutes.

    python tests/benchmarks/gpu.py --out gpu.json [PART…] [--minutes 9] [--most 2] [--again] [--list]
    python tests/benchmarks/gpu.py --out tiny.json --tiny          # on any machine, to see that it works

PART is one of those below or the beginning of several; all by default, in this order: what is worth most comes first.

mfu/MODEL       seconds, TFLOP/s and MFU of a step of the stage's own objective in the training loop, bf16, ZeRO-1; batches are
                made once and lie in memory. Means of five steps, the median of those after the first third
correct/FAMILY  forward and backward of a family's training with a tiny model in fp32, here and on the CPU: the same weights,
                batch and random draws, without dropout or TF32. The loss may differ by 1e-4 of it, and the gradients of each
                engine by 1e-3 of their norm [assumption: sums in another order]. The CPU's are kept in `--out`.cpu
memory/MODEL    the peak of such a step, and what `longtake plan` says of it
latents         `cache_latents` from mp4s to a committed column: its rate as a share of the encoder's alone
loader/KIND     the share of a training's time that it waits for the loader, from mp4s or from latents
mfu/MODEL-compiled  as mfu/MODEL, with `compile: true`

A part's result is written to `--out` as soon as it is there; a part that is there without an error is not run again, so that
the same command continues. Parts run one after the other in one process. One that takes more than `--most` minutes, or that
breaks the process, gives an error, and the others go on in a new process; whatever it had started is ended first. After
`--minutes` in all the part that runs is ended too, and is `missing` with those after it.

Exit status: 0 all parts are there; 1 one has an error; 3 none has, but some are missing.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import psutil  # noqa: E402
import torch  # noqa: E402
from gpu_parts import FULL, PARTS, TINY, Found, end_references  # noqa: E402

from longtake.datasets import storage  # noqa: E402
from longtake.training import engines  # noqa: E402

BEGIN = 300  # seconds in which a process must have begun [assumption]
ERROR, MISSING = 1, 3  # exit statuses
Work = Callable[[tuple[str, ...], Path, bool, Any], None]


def work(names: tuple[str, ...], folder: Path, tiny: bool, connection: Any) -> None:
    """Say that it has begun, then send the result of each part; the process ends after an error.

    folder   for what parts keep
    """
    with engines.process_group():
        connection.send({})
        for name in names:
            begun = time.perf_counter()
            # the engines of the part before hold each other
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            try:
                found = PARTS[name](folder, TINY if tiny else FULL)
            except Exception as e:
                connection.send({"error": " ".join(f"{type(e).__name__}: {e}".split())[:500]})
                return
            connection.send(found | {"seconds": round(time.perf_counter() - begun, 1)})
    end_references()


def _leading(work: Work, *arguments: Any) -> None:
    """Work, as the leader of a group of processes: with it all ends that it has started."""
    os.setsid()
    work(*arguments)


def _end(process: Any) -> None:
    """End a process and all that it has started, wherever it has gone."""
    started = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    for each in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.join()


def results(
    names: Sequence[str], folder: Path, tiny: bool, most: float, until: float, work: Work = work
) -> Iterator[tuple[str, Found]]:
    """The result of each part, in processes that are ended where one takes too long.

    most    seconds of a part
    until   when all must be over, by `time.monotonic`; the part that runs then has no result
    """
    spawn, todo = multiprocessing.get_context("spawn"), list(names)
    while todo and time.monotonic() < until:
        here, there = spawn.Pipe()
        process = spawn.Process(target=_leading, args=(work, tuple(todo), folder, tiny, there))
        process.start()
        there.close()
        limit, found = float(BEGIN), Found()
        try:
            while todo and "error" not in found:
                left = until - time.monotonic()
                if not here.poll(max(0.0, min(limit, left))):
                    if left <= limit:
                        return
                    found = {"error": f"took more than {limit:.0f} s"}
                else:
                    found = _received(here, process)
                if found:
                    yield todo.pop(0), found
                limit = most
            if "error" not in found:
                wait([process.sentinel], max(0.0, until - time.monotonic()))
        finally:
            _end(process)


def _received(connection: Any, process: Any) -> Found:
    try:
        return Found(connection.recv())
    except EOFError:
        process.join(10)
        return {"error": f"the process ended with {process.exitcode}"}


def machine(tiny: bool) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    cores = len(os.sched_getaffinity(0))
    return {"device": name, "cores": cores, "torch": torch.__version__, "cuda": torch.version.cuda, "tiny": tiny}


def main() -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PART", help="Or what their names begin with; all by default.")
    parser.add_argument("--out", type=Path, help="JSON with the result of each part; continued where it is there.")
    parser.add_argument("--minutes", type=float, default=9.0, help="After which it ends with what is there (9).")
    parser.add_argument("--most", type=float, default=2.0, help="Minutes that a part may take (2).")
    parser.add_argument("--tiny", action="store_true", help="Tiny models and few steps, on any machine.")
    parser.add_argument("--again", action="store_true", help="Run the parts also where a result is there.")
    parser.add_argument("--list", action="store_true", help="Show the parts, and run nothing.")
    options = parser.parse_args()
    chosen = _chosen(parser, options.names)
    if options.list:
        print(*chosen, sep="\n")
        return 0
    if options.out is None:
        parser.error("name a file: --out FILE.json")
    kept: dict[str, Any] = {"machine": machine(options.tiny), "parts": {}}
    if options.out.exists():
        there = json.loads(options.out.read_text())
        if there["machine"] != kept["machine"]:
            parser.error(f"--out: {options.out} is of {there['machine']}, this is {kept['machine']}; name another file")
        kept = there
    # SIGTERM ends the process of the parts too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    left = [name for name in chosen if options.again or "error" in kept["parts"].get(name, {"error": ""})]
    print(f"{kept['machine']}: {len(chosen) - len(left)} of {len(chosen)} parts are there", flush=True)
    folder = options.out.with_name(f"{options.out.name}.cpu")
    folder.mkdir(parents=True, exist_ok=True)
    _write(options.out, kept, left)
    until = begun + 60 * options.minutes
    for name, found in results(left, folder, options.tiny, 60 * options.most, until):
        kept["parts"][name] = found
        left.remove(name)
        _write(options.out, kept, left)
        print(f"{name}: {json.dumps(found)}", flush=True)
    if left:
        print(f"missing after {options.minutes:g} minutes: {', '.join(left)}; the same command continues", flush=True)
    return ERROR if any("error" in kept["parts"].get(name, {}) for name in chosen) else MISSING if left else 0


def _chosen(parser: argparse.ArgumentParser, names: Sequence[str]) -> list[str]:
    """The parts of these names and beginnings, in their order; all without any."""
    if unknown := [name for name in names if not any(part.startswith(name) for part in PARTS)]:
        parser.error(f"no part {', '.join(unknown)}; `--list` shows all")
    named = {name for name in names if name in PARTS}
    begun = tuple(name for name in names if name not in PARTS)
    return [part for part in PARTS if not names or part in named or (begun and part.startswith(begun))]


def _write(file: Path, kept: dict[str, Any], missing: Sequence[str]) -> None:
    storage.write(str(file), (json.dumps(kept | {"missing": list(missing)}, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
