"""A Ray cluster through its dashboard: its version, the resources of its nodes, its jobs and their logs.

Only the dashboard must be reachable, at an address such as http://head:8265. The token is Ray's own: RAY_AUTH_TOKEN, or the
file that RAY_AUTH_TOKEN_PATH names.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from longtake.datasets.errors import Failure, UserError

STOPPED = 130  # exit code of a job that was stopped

_SECONDS = 20.0  # for an answer
_NODES = 10000  # the most that Ray lists
_QUIET_SECONDS = 30.0  # without a line of the log, before the job's status is asked for
_QUIET_TIMES = 10  # of these, before a new connection is made, as the old one may be dead
_ATTEMPTS = 20  # to connect to a log again, 0.1 to 15 seconds apart
_NOISY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def address_of(option: str | None) -> str:
    """The dashboard of the option --address, of RAY_API_SERVER_ADDRESS or of RAY_ADDRESS. Raises UserError."""
    url = option or next((url for url in map(os.environ.get, _ADDRESSES) if url and url.startswith("http")), None)
    if not url:
        raise UserError("which cluster? give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS to that")
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--address {url}: is no dashboard's address; write http://HEAD:8265")
    return url.rstrip("/")


def cluster_nodes(address: str) -> list[dict[str, float]]:
    """The resources of each node that is alive, such as [{"CPU": 8.0, "GPU": 1.0, "memory": 3e10}, ...], memory in bytes.

    Raises:
        UserError: nothing answers at the address, it is no Ray dashboard, or it wants another token.
    """
    return [dict(node["resources_total"]) for node in _nodes(address)]


def cluster_labels(address: str) -> list[dict[str, str]]:
    """The labels of the same nodes, in the same order. Raises as `cluster_nodes`."""
    return [dict(node["labels"] or {}) for node in _nodes(address)]


def cluster_version(address: str) -> str:
    """The version of Ray on the cluster, such as "2.60.0". Raises as `cluster_nodes`."""
    return str(_get(address, "/api/version").get("ray_version"))


def check_version(address: str) -> None:
    """Raise UserError if the cluster has another minor version of Ray than this machine."""
    ours, theirs = version("ray"), cluster_version(address)
    if ours.split(".")[:2] != theirs.split(".")[:2]:
        raise UserError(
            f"{address}: runs Ray {theirs}, here is Ray {ours}; give both the same minor version,"
            f' here by: pip install "ray[data,default]=={theirs}"'
        )


def _nodes(address: str) -> list[dict[str, Any]]:
    answer = _get(address, "/api/v0/nodes", detail="1", limit=str(_NODES))
    nodes = sorted(answer["data"]["result"]["result"], key=lambda node: str(node["node_id"]))
    return [node for node in nodes if node["state"] == "ALIVE"]


def _get(address: str, path: str, **parameters: str) -> dict[str, Any]:
    import requests

    try:
        answer = requests.get(address + path, parameters, headers=headers(), timeout=_SECONDS)
    except requests.exceptions.RequestException as e:
        raise UserError(
            f"{address}: no Ray dashboard answers ({type(e).__name__}); is it the head's, such as http://HEAD:8265?"
        ) from e
    if refusal := {401: "needs a token", 403: "refuses the token"}.get(answer.status_code):
        raise UserError(f"{address}: {refusal}; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that has it")
    try:
        content = answer.json()
    except ValueError:
        content = None
    if answer.status_code != 200 or not isinstance(content, dict):
        raise UserError(f"{address}: answers, but is no Ray dashboard (HTTP {answer.status_code} for {path})")
    return content


def headers() -> dict[str, str]:
    """The headers of a request, with the token if there is one. Raises UserError if its file cannot be read."""
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path and os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        path = str(Path.home() / ".ray" / "auth_token")
    if not token and path:
        try:
            token = Path(path).read_text().strip()
        except OSError as e:
            raise UserError(f"RAY_AUTH_TOKEN_PATH={path}: cannot be read ({e.strerror})") from e
    return {"Authorization": f"Bearer {token}"} if token else {}


def client(address: str) -> Any:
    """Ray's client of a cluster's jobs. Raises as `check_version` and `cluster_nodes`."""
    check_version(address)
    from ray.job_submission import JobSubmissionClient

    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # the client prefers these variables to the address
    hidden = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        return JobSubmissionClient(address, headers=headers())
    finally:
        os.environ |= hidden


@contextlib.contextmanager
def answered(client: Any) -> Iterator[None]:
    """Turn errors of Ray's client into UserError or Failure, in one line."""
    import requests
    from ray.exceptions import AuthenticationError

    address = client.get_address()
    try:
        yield
    except (UserError, Failure):
        raise
    except AuthenticationError as e:
        raise UserError(f"{address}: refuses the token; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file") from e
    except requests.exceptions.RequestException as e:
        raise Failure(f"{address}: the Ray dashboard does not answer any more ({type(e).__name__})") from e
    except RuntimeError as e:
        match = re.search(r"(?:Error|Exception): (.*)", str(e)) or re.search(r"(.*)", str(e))
        assert match
        raise Failure(f"{address}: Ray answers with an error ({match[1].strip()})") from e


def info(client: Any, job: str) -> Any:
    """Ray's `JobDetails` of a job. Raises UserError if the cluster does not know the job."""
    with answered(client):
        try:
            return client.get_job_info(job)
        except RuntimeError as e:
            if "status code 404" not in str(e):
                raise
            raise UserError(f"{client.get_address()}: has no job {job}; `longtake jobs list` shows those it has") from e


def ours(client: Any) -> list[Any]:
    """The jobs that `longtake submit` has started, the latest first."""
    with answered(client):
        jobs = [job for job in client.list_jobs() if (job.submission_id or "").startswith("longtake-")]
    return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)


def tries(client: Any, name: str) -> list[Any]:
    """The jobs NAME, NAME-2, NAME-3 and so on, in this order."""
    matches = ((re.fullmatch(re.escape(name) + r"(?:-(\d+))?", job.submission_id), job) for job in ours(client))
    return [job for _, job in sorted(((int(m[1] or 1), job) for m, job in matches if m), key=lambda pair: pair[0])]


def exit_code(job: Any) -> int | None:
    """The exit code of an ended job, as in a shell; None if its command never started."""
    if job.status == "STOPPED":
        return STOPPED
    code = 0 if job.status == "SUCCEEDED" else job.driver_exit_code
    return 128 - code if code is not None and code < 0 else code


def stop(client: Any, job: str, wait: bool) -> str:
    """Ask a job to save and stop; returns its status, with `wait` its last one."""
    status = info(client, job).status
    if not status.is_terminal():
        with answered(client):
            client.stop_job(job)
        while not (status := info(client, job).status).is_terminal() and wait:
            time.sleep(1)
    return str(status.value)


def log(client: Any, job: str) -> str:
    """The output of a job so far."""
    info(client, job)
    with answered(client):
        return str(client.get_job_logs(job))


def follow(client: Any, job: str, write: Callable[[str], Any]) -> Any:
    """Write the output of a job, from its first line on, until it has ended; returns its last `JobDetails`.

    Ray sends a log from its beginning for each connection; what was written already is skipped.

    Raises:
        UserError: the cluster does not know the job any more.
        Failure: the dashboard does not come back.
    """
    return asyncio.run(_follow(client, job, write))


async def _follow(client: Any, job: str, write: Callable[[str], Any]) -> Any:
    import aiohttp

    written, failures = 0, 0
    while True:
        received, start = 0, time.monotonic()
        try:
            async for text in _log_pieces(client, job):
                if new := text[max(0, written - received) :]:
                    write(new)
                    failures = 0
                received += len(text)
                written = max(written, received)
            details = await asyncio.to_thread(info, client, job)
            if details.status.is_terminal():
                return details
        except (OSError, RuntimeError, aiohttp.ClientError) as e:
            failures = 1 if time.monotonic() - start > _QUIET_SECONDS else failures + 1
            if failures >= _ATTEMPTS:
                raise Failure(f"{client.get_address()}: lost the log of job {job}, which may still run ({e})") from e
        await asyncio.sleep(min(15.0, 0.1 * 2**failures))


async def _log_pieces(client: Any, job: str) -> AsyncIterator[str]:
    """The pieces of a job's log, over one connection; ends with the job, or if the connection seems dead."""
    stream = client.tail_job_logs(job)
    quiet_times = 0
    piece = asyncio.ensure_future(anext(stream, None))
    try:
        while True:
            arrived, _ = await asyncio.wait({piece}, timeout=_QUIET_SECONDS)
            if arrived:
                quiet_times = 0
                text = piece.result()
                if text is None:
                    return
                yield text
                piece = asyncio.ensure_future(anext(stream, None))
                continue
            # a dead connection is as quiet as a long pause of the job
            quiet_times += 1
            ended = (await asyncio.to_thread(info, client, job)).status.is_terminal()
            if quiet_times >= (2 if ended else _QUIET_TIMES):
                return
    finally:
        piece.cancel()
        await asyncio.wait({piece})
        await stream.aclose()
