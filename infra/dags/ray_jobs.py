"""Ray's Jobs API over plain HTTP, with Python's own library alone: a scheduler needs neither Ray nor Longtake."""

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
_SECONDS = 30  # that one request may take
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_SHOWN = 200  # lines of a log that are shown at once

T = TypeVar("T")


class RayError(Exception):
    """Ray did not do what it was asked. `passing`: another try may go well."""

    def __init__(self, line: str, passing: bool) -> None:
        super().__init__(line)
        self.passing = passing


@dataclass(frozen=True)
class Ray:
    """Where Ray's dashboard answers, such as http://head:8265."""

    address: str
    token: str = field(default="", repr=False)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another machine."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPEN = urllib.request.build_opener(_NoRedirects).open


def call(ray: Ray, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """The answer to a request, from JSON; None where there is no such thing (404).

    Raises:
        RayError: one line; passing for lost connections, time-outs and 5xx.
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
        said = _said(e)
        if e.code == 404 and "does not exist" in said:
            return None
        if e.code in (401, 403):
            line = f"{ray.address}: Ray refuses the token: set RAY_AUTH_TOKEN, or the connection's password, to Ray's"
            raise RayError(line, passing=False) from None
        lines = said.splitlines() or [str(e.reason)]
        last = ([line for line in lines if "Error: " in line] or lines)[-1].strip()[:500]
        passing = e.code >= 500 or e.code in (408, 429)
        raise RayError(f"{ray.address}: {method} {path}: HTTP {e.code}: {last}", passing) from None
    except (OSError, http.client.HTTPException) as e:
        raise RayError(f"{ray.address}: no answer ({getattr(e, 'reason', e) or type(e).__name__})", passing=True) from e
    try:
        return json.loads(content)
    except ValueError:
        raise RayError(f"{ray.address}: {path} is no JSON: this is not Ray's dashboard", passing=False) from None


def _said(error: urllib.error.HTTPError) -> str:
    try:
        with error:
            return error.read().decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return ""


def patiently(action: Callable[[], T], seconds: float) -> T:
    """What `action` returns; an error that passes is met by another try, for so long."""
    end, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while True:
        try:
            return action()
        except RayError as e:
            if not e.passing or time.monotonic() + pause > end:
                raise
        time.sleep(pause)
        pause = longer(pause)


def longer(pause: float) -> float:
    """The next pause of a wait, in seconds: a fifth of what has passed."""
    return min(1.2 * pause, _LONGEST_PAUSE)


def find(ray: Ray, job: str) -> dict[str, Any] | None:
    """What Ray knows of a job: `status`, `message`, `start_time` (ms), `driver_exit_code`; None if it knows no such job."""
    found: dict[str, Any] | None = call(ray, "GET", _path(job))
    if found is not None and "status" not in found:
        raise RayError(f"{ray.address}: {_path(job)} has no status: this is not Ray's dashboard", passing=False)
    return found


def logs(ray: Ray, job: str) -> str:
    """All that a job has written."""
    return (call(ray, "GET", f"{_path(job)}/logs") or {}).get("logs") or ""


def stop(ray: Ray, job: str) -> None:
    """Tell a job to save its state and end; returns at once."""
    call(ray, "POST", f"{_path(job)}/stop")


def _path(job: str) -> str:
    return f"/api/jobs/{urllib.parse.quote(job, safe='')}"


class Started(NamedTuple):
    job: str
    attached: bool  # to a job that was there before


def start(ray: Ray, name: str, request: Mapping[str, Any]) -> Started:
    """Start a job, or attach to the one of this name that still runs: it never runs twice at once.

    Jobs of a name are NAME, NAME-2, NAME-3: an ended one is left as it is, the next goes on with what it has done.
    """
    number = 1
    while True:
        job = name if number == 1 else f"{name}-{number}"
        found = find(ray, job)
        if found is None:
            try:
                call(ray, "POST", "/api/jobs/", {**request, "submission_id": job})
                return Started(job, attached=False)
            except RayError:
                # its answer was lost, or another was faster: a name that is taken is HTTP 500
                found = find(ray, job)
                if found is None:
                    raise
        if found["status"] not in ENDED:
            return Started(job, attached=True)
        number += 1


def request(
    command: str,
    env: Mapping[str, str],
    resources: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A job's request: `resources` as in the graph of a recipe, of which only what is asked for goes in."""
    asked = resources or {}
    fields = {
        "entrypoint_num_cpus": asked.get("cpus"),
        "entrypoint_num_gpus": asked.get("gpus"),
        "entrypoint_memory": asked.get("memory_bytes"),
        "entrypoint_resources": asked.get("custom"),
        "entrypoint_label_selector": asked.get("labels"),
    }
    described = {"entrypoint": command, "runtime_env": {"env_vars": dict(env)}, "metadata": dict(metadata or {})}
    return described | {key: value for key, value in fields.items() if value}


def news(log: str, seen: int) -> tuple[list[str], int]:
    """(lines that came after the first `seen` characters, how many characters are seen now).

    A line counts when its end is there. Of a line that was written over and over, such as a progress bar, the last
    state; of many lines the last ones.
    """
    end = log.rfind("\n") + 1
    if end <= seen:
        return [], min(seen, len(log))
    lines = [re.split("\r+", line.rstrip("\r"))[-1] for line in log[seen : end - 1].split("\n")]
    if len(lines) > _SHOWN:
        lines = [f"({len(lines) - _SHOWN} lines are left out)", *lines[-_SHOWN:]]
    return lines, end


def why(found: Mapping[str, Any]) -> str:
    """How a job ended, in one line with its exit code."""
    code = found.get("driver_exit_code")
    lines = [line.strip() for line in (found.get("message") or "").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    said = (errors or lines[-1:] or [""])[-1].removeprefix("error:").strip()
    ended = f"exit code {code}" if code is not None else str(found["status"]).lower()
    return f"{ended}: {said}" if said else ended


def seconds(found: Mapping[str, Any]) -> float:
    """How long ago a job was submitted, or how long it took: by Ray's times, so that no restart winds the clock back."""
    return float(found.get("end_time") or 1000 * time.time()) / 1000 - float(found["start_time"]) / 1000


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
