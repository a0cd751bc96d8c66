"""What a GPU is worth to Longtake, for a machine that is there for ten minutes.

    python tests/benchmarks/gpu.py --out gpu.json [PART…] [--minutes 2] [--again] [--list]
    python tests/benchmarks/gpu.py --out tiny.json --tiny          # on any machine, to see that it works

PART is one of those below or the beginning of several; all by default, in this order.

correct/FAMILY  forward and backward of a family's training with a tiny model in fp32, here and on the CPU: the same weights,
                batch and random draws, without dropout or TF32. The loss may differ by 1e-4 of it, and the gradients of each
                engine by 1e-3 of their norm [assumption: sums in another order]
mfu/MODEL       seconds, TFLOP/s and MFU of a step of the stage's own objective in the training loop, bf16, ZeRO-1; batches are
                made once and lie in memory. Means of five steps, the median of those after the first third
mfu/MODEL-compiled  the same with `compile: true`
memory/MODEL    the peak of such a step, and what `longtake plan` says of it
latents         `cache_latents` from mp4s to a committed column: its rate as a share of the encoder's alone
loader/KIND     the share of a training's time that it waits for the loader, from mp4s or from latents

A part's result is written to `--out` as soon as it is there; a part that is there without an error is not run again, so that
the same command continues. Parts run one after the other in one process. One that takes more than `--minutes`, or that breaks
the process, gives an error, and the others go on in a new process. Exit status 1 where a part has an error.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from gpu_parts import FULL, PARTS, TINY, Found  # noqa: E402

from longtake.datasets import storage  # noqa: E402
from longtake.training import engines  # noqa: E402

BEGIN = 300  # seconds in which a process must have begun [assumption]


def work(names: tuple[str, ...], tiny: bool, connection: Any) -> None:
    """Say that it has begun, then send the result of each part; the process ends after an error."""
    with engines.process_group():
        connection.send({})
        for name in names:
            begun = time.perf_counter()
            # the engines of the part before hold each other
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            try:
                found = PARTS[name](names, TINY if tiny else FULL)
            except Exception as e:
                connection.send({"error": " ".join(f"{type(e).__name__}: {e}".split())[:500]})
                return
            connection.send(found | {"seconds": round(time.perf_counter() - begun, 1)})


def results(names: Sequence[str], tiny: bool, seconds: float) -> Iterator[tuple[str, Found]]:
    """The result of each part, in processes that are ended where one takes too long."""
    todo = list(names)
    while todo:
        here, there = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=work, args=(tuple(todo), tiny, there))
        process.start()
        there.close()
        limit, found = float(BEGIN), Found()
        while todo and "error" not in found:
            try:
                found = here.recv() if here.poll(limit) else {"error": f"took more than {limit:.0f} s"}
            except EOFError:
                process.join()
                found = {"error": f"the process ended with {process.exitcode}"}
            if found:
                yield todo.pop(0), found
            limit = seconds
        process.kill() if "error" in found else None
        process.join()


def machine(tiny: bool) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    cores = len(os.sched_getaffinity(0))
    return {"device": name, "cores": cores, "torch": torch.__version__, "cuda": torch.version.cuda, "tiny": tiny}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PART", help="Or what their names begin with; all by default.")
    parser.add_argument("--out", type=Path, help="JSON with the result of each part; continued where it is there.")
    parser.add_argument("--minutes", type=float, default=2.0, help="The most that a part may take (2).")
    parser.add_argument("--tiny", action="store_true", help="Tiny models and few steps, on any machine.")
    parser.add_argument("--again", action="store_true", help="Run the parts also where a result is there.")
    parser.add_argument("--list", action="store_true", help="Show the parts, and run nothing.")
    options = parser.parse_args()
    if unknown := [name for name in options.names if not any(part.startswith(name) for part in PARTS)]:
        parser.error(f"no part {', '.join(unknown)}; `--list` shows all")
    named = {name for name in options.names if name in PARTS}
    begun = tuple(name for name in options.names if name not in PARTS)
    chosen = [part for part in PARTS if not options.names or part in named or (begun and part.startswith(begun))]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    if options.out is None:
        parser.error("name a file: --out FILE.json")
    kept = {"machine": machine(options.tiny), "parts": {}}
    if options.out.exists():
        there = json.loads(options.out.read_text())
        if there["machine"] != kept["machine"]:
            parser.error(f"--out: {options.out} is of {there['machine']}, this is {kept['machine']}; name another file")
        kept = there
    left = [name for name in chosen if options.again or "error" in kept["parts"].get(name, {"error": ""})]
    print(f"{kept['machine']}: {len(chosen) - len(left)} of {len(chosen)} parts are there", flush=True)
    for name, found in results(left, options.tiny, 60 * options.minutes):
        kept["parts"][name] = found
        storage.write(str(options.out), (json.dumps(kept, indent=1) + "\n").encode())
        print(f"{name}: {json.dumps(found)}", flush=True)
    return int(any("error" in kept["parts"][name] for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
