"""One Ray job over groups: connect, make each group in one task, show progress, report what failed."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from longtake.datasets import storage
from longtake.datasets.errors import Failure, Interrupted
from longtake.datasets.masking import shown
from longtake.pipeline.board import Board, watched
from longtake.pipeline.cluster import TaskConfig, connected

Start = Callable[[Any, Any], Iterable[dict[str, Any]]]
_IN_FLIGHT = 4096  # tasks that Ray holds at once: more than a cluster has CPUs, so that one that grows by demand grows


def run(
    stage: str,
    jobs: Sequence[Mapping[str, Any]],
    task: TaskConfig,
    start: Start,
    *,
    unit: str,
    total: int,
    failed: str = "groups could not be written",
) -> Counter[str]:
    """Make each job's group, in any order, and add up the counts of the results.

    Args:
        stage: name of the work, for the bar and in errors.
        jobs: plain data; each is one task, so that a retry repeats no other.
        task: what one task needs of the cluster.
        start: `start(ray, board)` gives the result of each job as it comes: counts, among them `units`, and an `error`,
            which is empty where there is none. Tasks report to `board`, a `Board`.
        unit, total: what the bar counts, and its end.
        failed: the message about groups with an error.

    Returns:
        The sums of all numbers in the results.

    Raises:
        UserError: no node has room for a task.
        Failure: some groups have an error; nothing has moved for `task.stall_seconds`.
        Interrupted: stopped; what is committed is kept.
    """
    errors, totals = list[str](), Counter[str]()
    try:
        with connected(stage, task) as ray, tqdm(desc=stage, total=total, unit=unit) as bar:
            # if its node dies it restarts empty, and tasks report to it anew
            board = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()

            def show(units: int, line: str) -> None:
                bar.update(max(0, units - bar.n))
                if line:
                    bar.write(f"{stage}: {shown(storage.printable(line))}", file=sys.stderr)

            results = watched(iter(start(ray, board)), ray, board, stage, task.stall_seconds, show)
            for number, result in enumerate(results, 1):
                if error := result.pop("error"):
                    errors.append(error)
                totals.update({name: int(value) for name, value in result.items() if isinstance(value, int | float)})
                bar.set_postfix(done=f"{number}/{len(jobs)}", clips=totals["clips"], refresh=False)
                show(totals["units"], "")
    except KeyboardInterrupt as e:
        raise Interrupted(f"{stage}: stopped; committed shards are kept") from e
    if errors:
        raise Failure(f"{len(errors)} of {len(jobs)} {failed}, the first: {errors[0]}")
    return totals


def tasks(
    ray: Any, make: Callable[..., Any], jobs: Sequence[Any], options: Mapping[str, Any], *arguments: Any
) -> Iterator[Any]:
    """`make(job, *arguments)` of each job as it comes, each in a Ray task that is done again where its node or worker dies.

    Plain tasks: Ray Data would start actors of its own and load itself into every worker, which takes seconds.

    Args:
        options: what a task needs, as in Ray's `options`.
        arguments: references to what is in Ray's store, or small values.
    """
    task = ray.remote(make).options(max_retries=-1, **options)
    running = list[Any]()
    try:
        for job in jobs:
            if len(running) == _IN_FLIGHT:
                done, running = ray.wait(running)
                yield from ray.get(done)
            running.append(task.remote(job, *arguments))
        while running:
            done, running = ray.wait(running)
            yield from ray.get(done)
    finally:
        for unneeded in running:
            ray.cancel(unneeded)
