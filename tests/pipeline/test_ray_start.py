"""Ray that does not start: tried once more, then one line. Plain tasks: each job once, however many there are."""

from typing import Any

import pytest
import ray

from longtake.datasets.errors import Failure, UserError
from longtake.pipeline import cluster, groups


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of Ray, which is not connected and never starts."""
    calls = list[str]()

    def init(**options: Any) -> None:
        calls.append(f"init {options['address']}")
        raise TimeoutError("The current node timed out during startup.\nThis could happen because")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(ray, "init", init)
    return calls


def test_a_start_that_times_out_is_tried_again_and_then_one_line(
    starts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(Failure, match="stage shards: Ray did not start on this machine, twice") as e,
        cluster.connected("shards"),
    ):
        pass
    assert "\n" not in str(e.value) and "timed out during startup" in str(e.value)
    assert starts == ["init local", "shutdown"] * 2


def test_a_second_start_that_succeeds_is_used(starts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    fail = ray.init

    def init(**options: Any) -> None:
        if not starts:
            fail(**options)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    with cluster.connected("shards") as connection:
        assert connection is ray
    assert starts == ["init local", "shutdown", "shutdown"]


def test_a_cluster_that_does_not_answer_is_asked_once(starts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setattr(cluster.environment, "ray_address", lambda: "192.0.2.1:6379")
    with pytest.raises(UserError, match="no Ray cluster answers"), cluster.connected("shards"):
        pass
    assert starts == ["init 192.0.2.1:6379"]


class InOrder:
    """As much of Ray as tasks need: each is done when it is waited for, the last one first."""

    def __init__(self) -> None:
        self.most, self.options, self.cancelled = 0, dict[str, Any](), list[Any]()

    def remote(self, function: Any) -> Any:
        ours = self

        class Task:
            @staticmethod
            def options(**options: Any) -> Any:
                ours.options = options
                return Task

            @staticmethod
            def remote(*arguments: Any) -> Any:
                return function, arguments

        return Task

    def wait(self, running: list[Any]) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(running))
        return running[-1:], running[:-1]

    def get(self, done: list[Any]) -> list[Any]:
        return [function(*arguments) for function, arguments in done]

    def cancel(self, task: Any) -> None:
        self.cancelled.append(task)


def test_tasks_do_each_job_once_and_hold_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_IN_FLIGHT", 3)
    one = InOrder()
    results = list(groups.tasks(one, lambda job, factor: job * factor, range(10), {"num_cpus": 2}, 5))
    assert sorted(results) == [5 * job for job in range(10)]
    assert one.most == 3 and one.options == {"max_retries": -1, "num_cpus": 2} and not one.cancelled


def test_tasks_that_nobody_waits_for_are_cancelled() -> None:
    one = InOrder()
    results = groups.tasks(one, lambda job: job, range(4), {})
    assert next(results) == 3
    results.close()  # type: ignore[attr-defined]
    assert len(one.cancelled) == 3
