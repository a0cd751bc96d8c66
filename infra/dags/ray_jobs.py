"""Ray's Jobs API over plain HTTP, with the standard library alone: a scheduler needs neither Ray nor Longtake."""

import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_SECONDS = 30  # for one request
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_SHOWN = 200  # lines of a log at once

T = TypeVar("T")


class RayError(Exception):
    """A request to Ray failed. `passing`: another try may succeed."""

    def __init__(self, line: str, passing: bool) -> None:
        super().__init__(line)
        self.passing = passing


@dataclass(frozen=True)
class Ray:
    """A Ray cluster, by its dashboard."""

    address: str  # such as http://head:8265
    token: str = field(default="", repr=False)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the token to another machine."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPEN = urllib.request.build_opener(_NoRedirects).open


def call(ray: Ray, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """The answer to a request, from JSON; None if the thing does not exist (404).

    Raises:
        RayError: one line; passing for lost connections, time-outs, 429 and 5xx.
    """
    if not ray.address.startswith(("http://", "https://")):
        raise RayError(f"{ray.address}: Ray's address must begin with http:// or https://", passing=False)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {ray.token}"} if ray.token else {})
    data = None if body is None else json.dumps(body).encode()
    url = ray.address.rstrip("/") + path
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310
    try:
        with _OPEN(request, timeout=_SECONDS) as answer:
            content = answer.read()
    except urllib.error.HTTPError as e:
        body_text = _body(e)
        if e.code == 404 and "does not exist" in body_text:
            return None
        if e.code in (401, 403):
            line = f"{ray.address}: Ray refuses the token: set RAY_AUTH_TOKEN, or the connection's password, to Ray's"
            raise RayError(line, passing=False) from None
        lines = body_text.splitlines() or [str(e.reason)]
        last = ([line for line in lines if "Error: " in line] or lines)[-1].strip()[:500]
        passing = e.code >= 500 or e.code in (408, 429)
        raise RayError(f"{ray.address}: {method} {path}: HTTP {e.code}: {last}", passing) from None
    except (OSError, http.client.HTTPException) as e:
        raise RayError(f"{ray.address}: no answer ({getattr(e, 'reason', e) or type(e).__name__})", passing=True) from e
    try:
        return json.loads(content)
    except ValueError:
        raise RayError(f"{ray.address}: {path} is no JSON: this is not Ray's dashboard", passing=False) from None


def _body(error: urllib.error.HTTPError) -> str:
    try:
        with error:
            return error.read().decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return ""


def patiently(action: Callable[[], T], seconds: float) -> T:
    """The result of `action`; passing errors are retried for this many seconds."""
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while True:
        try:
            return action()
        except RayError as e:
            if not e.passing or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = longer(pause)


def longer(pause: float) -> float:
    """The next pause of a wait, in seconds: a fifth longer, up to a limit."""
    return min(1.2 * pause, _LONGEST_PAUSE)


def find(ray: Ray, job: str) -> dict[str, Any] | None:
    """Ray's details of a job: `status`, `message`, `start_time` (ms), `driver_exit_code`; None if Ray does not know it."""
    details: dict[str, Any] | None = call(ray, "GET", _path(job))
    if details is not None and "status" not in details:
        raise RayError(f"{ray.address}: {_path(job)} has no status: this is not Ray's dashboard", passing=False)
    return details


def logs(ray: Ray, job: str) -> str:
    """The whole log of a job."""
    return (call(ray, "GET", f"{_path(job)}/logs") or {}).get("logs") or ""


def stop(ray: Ray, job: str) -> None:
    """Ask a job to save its state and end; returns at once."""
    call(ray, "POST", f"{_path(job)}/stop")


def _path(job: str) -> str:
    return f"/api/jobs/{urllib.parse.quote(job, safe='')}"


class Started(NamedTuple):
    job: str
    attached: bool  # to a job that was running already


def start(ray: Ray, name: str, request: Mapping[str, Any]) -> Started:
    """Start a job, or attach to the job of this name that still runs, so that it never runs twice at once.

    Jobs of a name are NAME, NAME-2, NAME-3. An ended job is left as it is; the next one continues its work.
    """
    number = 1
    while True:
        job = name if number == 1 else f"{name}-{number}"
        details = find(ray, job)
        if details is None:
            try:
                call(ray, "POST", "/api/jobs/", {**request, "submission_id": job})
                return Started(job, attached=False)
            except RayError:
                # the answer was lost, or another submission was faster: Ray answers a taken name with HTTP 500
                details = find(ray, job)
                if details is None:
                    raise
        if details["status"] not in ENDED:
            return Started(job, attached=True)
        number += 1


def request(
    command: str,
    env: Mapping[str, str],
    resources: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A job's request; `resources` as in the graph of a recipe, without those that are zero or empty."""
    resources = resources or {}
    fields = {
        "entrypoint_num_cpus": resources.get("cpus"),
        "entrypoint_num_gpus": resources.get("gpus"),
        "entrypoint_memory": resources.get("memory_bytes"),
        "entrypoint_resources": resources.get("custom"),
        "entrypoint_label_selector": resources.get("labels"),
    }
    job = {"entrypoint": command, "runtime_env": {"env_vars": dict(env)}, "metadata": dict(metadata or {})}
    return job | {key: value for key, value in fields.items() if value}


def news(log: str, read: int) -> tuple[list[str], int]:
    """(complete lines after the first `read` characters, number of characters read now).

    A line that is overwritten, such as a progress bar, gives its last state. Of many lines, only the last are given.
    """
    end = log.rfind("\n") + 1
    if end <= read:
        return [], min(read, len(log))
    lines = [re.split("\r+", line.rstrip("\r"))[-1] for line in log[read : end - 1].split("\n")]
    if len(lines) > _SHOWN:
        lines = [f"({len(lines) - _SHOWN} lines are left out)", *lines[-_SHOWN:]]
    return lines, end


def ending(details: Mapping[str, Any]) -> str:
    """The end of a job in one line, with its exit code."""
    code = details.get("driver_exit_code")
    lines = [line.strip() for line in (details.get("message") or "").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    reason = (errors or lines[-1:] or [""])[-1].removeprefix("error:").strip()
    status = f"exit code {code}" if code is not None else str(details["status"]).lower()
    return f"{status}: {reason}" if reason else status


def seconds(details: Mapping[str, Any]) -> float:
    """The age of a running job, or the duration of an ended one, by Ray's times: a restart of ours does not reset it."""
    return float(details.get("end_time") or 1000 * time.time()) / 1000 - float(details["start_time"]) / 1000


def last_json(log: str) -> dict[str, Any]:
    """The last line of a log that is a JSON object.

    Raises:
        RayError: there is none.
    """
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            try:
                return dict(json.loads(line))
            except ValueError:
                continue
    raise RayError("the job's log has no line of JSON", passing=False)
