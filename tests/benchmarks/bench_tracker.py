"""What tracking costs a training step, with a live sqlite store and with one that is down.

    python tests/benchmarks/bench_tracker.py [--metrics 30] [--calls 600] [--step 0.1] [--turns 3]

`log` is called once a step, as with `log_every: 1`; a step is a sleep. `here`: median and 99th percentile of the time
that a call of `tracker.log` takes in the thread that trains. `thread`: processor time of the thread that sends, a step;
it runs beside training but shares Python's lock with it. Shares are of a step; the target is 1 %. `video`: encoding one
of 17 x 256 x 256, which is done in the thread that trains. Turns are parts of the calls.
"""

import argparse
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import figures
import numpy as np

os.environ["MLFLOW_LOGGING_LEVEL"] = "WARNING"
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "2"


class Watched:
    """Adds up the processor time of what the sending thread does."""

    def __init__(self, log: Any) -> None:
        self.seconds, self.real = 0.0, log._send
        log._send = self

    def __call__(self) -> None:
        start = time.thread_time()
        self.real()
        self.seconds += time.thread_time() - start


def measure(folder: Path, uri: str, metrics: int, calls: int, step: float) -> tuple[list[float], list[float], float]:
    """Seconds of each `log`, processor seconds of sending until then, seconds of encoding a video."""
    import mlflow

    from longtake.datasets.errors import Failure
    from longtake.training import tracker

    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
    run = "0" * 32
    if uri.startswith("sqlite"):
        client = mlflow.MlflowClient()
        run = client.create_run(client.create_experiment("e", str(folder / "artifacts"))).info.run_id
    os.environ["MLFLOW_RUN_ID"] = run
    log = tracker.connect(folder)
    watched = Watched(log)
    values = {f"metric_{n}": n / 7 for n in range(metrics)}
    taken, sending = [], []
    for number in range(calls):
        time.sleep(step)
        start = time.perf_counter()
        log.log(number, values)
        taken.append(time.perf_counter() - start)
        sending.append(watched.seconds)
    start = time.perf_counter()
    log.video(calls, "one", np.random.default_rng(0).integers(0, 255, (17, 256, 256, 3), np.uint8), 8)
    video = time.perf_counter() - start
    try:
        log.close()
    except Failure:
        assert not uri.startswith("sqlite")
    return taken, [*sending[:-1], watched.seconds], video


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--metrics", type=int, default=30)
    arguments.add_argument("--calls", type=int, default=600)
    arguments.add_argument("--step", type=float, default=0.1)
    figures.add_option(arguments, turns=3)
    asked = arguments.parse_args()
    shares = {}
    print(f"{asked.metrics} metrics a call, {asked.calls} steps of {asked.step * 1000:.0f} ms")
    for name in ("sqlite", "down"):
        with tempfile.TemporaryDirectory() as scratch:
            uri = f"sqlite:///{scratch}/mlflow.db" if name == "sqlite" else "http://127.0.0.1:9"
            taken, sending, video = measure(Path(scratch), uri, asked.metrics, asked.calls, asked.step)
        middle, worst = statistics.median(taken), sorted(taken)[int(len(taken) * 0.99)]
        beside = sending[-1] / asked.calls
        ends = [sending[(turn + 1) * asked.calls // asked.turns - 1] for turn in range(asked.turns)]
        parts = [(b - a) * asked.turns / asked.calls / asked.step for a, b in pairwise([0.0, *ends])]
        shares |= {f"here_{name}": [part / asked.step for part in figures.parts(taken, asked.turns)]}
        shares |= {f"thread_{name}": parts}
        print(
            f"{name:6}  here {middle * 1e6:6.0f} µs ({middle / asked.step:.3%}), p99 {worst * 1e6:6.0f} µs"
            f" ({worst / asked.step:.3%});  thread {beside * 1e6:6.0f} µs ({beside / asked.step:.2%});"
            f"  video {video * 1000:.0f} ms"
        )
    figures.write(asked.figures, shares)


if __name__ == "__main__":
    main()
