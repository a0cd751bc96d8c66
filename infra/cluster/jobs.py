"""A Ray cluster by its dashboard's address: its version, what its nodes have, its jobs and their logs.

The address is that of the dashboard, such as http://head:8265; nothing else of the cluster need be reachable. The token is
Ray's own: RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names.
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
_QUIET_SECONDS = 30.0  # without a line of the log, then the job is asked how it is
_QUIET_TIMES = 10  # then the connection may be dead: a new one is made
_ATTEMPTS = 20  # to connect to a log again, a tenth of a second to fifteen apart
_NOISY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def address_of(given: str | None) -> str:
    """The dashboard that is given, else what RAY_API_SERVER_ADDRESS or RAY_ADDRESS names. Raises UserError."""
    found = given or next((url for url in map(os.environ.get, _ADDRESSES) if url and url.startswith("http")), None)
    if not found:
        raise UserError("which cluster? give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS to that")
    if not found.startswith(("http://", "https://")):
        raise UserError(f"--address {found}: is no dashboard's address; write http://HEAD:8265")
    return found.rstrip("/")


def cluster_nodes(address: str) -> list[dict[str, float]]:
    """The resources of each living node, such as [{"CPU": 8.0, "GPU": 1.0, "memory": 3e10}, ...], bytes for memory.

    Raises:
        UserError: nothing answers at the address, it is no Ray dashboard, or it wants another token.
    """
    return [dict(node["resources_total"]) for node in _nodes(address)]


def cluster_labels(address: str) -> list[dict[str, str]]:
    """The labels of the same nodes, in the same order. Raises as `cluster_nodes` does."""
    return [dict(node["labels"] or {}) for node in _nodes(address)]


def cluster_version(address: str) -> str:
    """Ray's version there, such as "2.60.0". Raises as `cluster_nodes` does."""
    return str(_get(address, "/api/version").get("ray_version"))


def check_version(address: str) -> None:
    """Raises UserError where the cluster has another minor version of Ray than this machine."""
    ours, theirs = version("ray"), cluster_version(address)
    if ours.split(".")[:2] != theirs.split(".")[:2]:
        raise UserError(
            f"{address}: runs Ray {theirs}, here is Ray {ours}; give both the same minor version,"
            f' here by: pip install "ray[data,default]=={theirs}"'
        )


def _nodes(address: str) -> list[dict[str, Any]]:
    found = _get(address, "/api/v0/nodes", detail="1", limit=str(_NODES))
    listed = sorted(found["data"]["result"]["result"], key=lambda node: str(node["node_id"]))
    return [node for node in listed if node["state"] == "ALIVE"]


def _get(address: str, path: str, **parameters: str) -> dict[str, Any]:
    import requests

    try:
        answer = requests.get(address + path, parameters, headers=headers(), timeout=_SECONDS)
    except requests.exceptions.RequestException as e:
        raise UserError(
            f"{address}: no Ray dashboard answers ({type(e).__name__}); is it the head's, such as http://HEAD:8265?"
        ) from e
    _refused(address, answer.status_code)
    try:
        content = answer.json()
    except ValueError:
        content = None
    if answer.status_code != 200 or not isinstance(content, dict):
        raise UserError(f"{address}: answers, but is no Ray dashboard (HTTP {answer.status_code} for {path})")
    return content


def _refused(address: str, status: int) -> None:
    what = {401: "needs a token", 403: "refuses the token"}.get(status)
    if what:
        raise UserError(f"{address}: {what}; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that has it")


def headers() -> dict[str, str]:
    """Of a request: the token, if there is one. Raises UserError where its file cannot be read."""
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
    """Ray's client of the jobs there. Raises as `check_version` and `cluster_nodes` do."""
    check_version(address)
    from ray.job_submission import JobSubmissionClient

    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # they would win over the address
    hidden = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        return JobSubmissionClient(address, headers=headers())
    finally:
        os.environ |= hidden


@contextlib.contextmanager
def answered(client: Any) -> Iterator[None]:
    """Turn the errors of Ray's client into one line. Raises UserError, Failure."""
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
        said = re.search(r"(?:Error|Exception): (.*)", str(e)) or re.search(r"(.*)", str(e))
        assert said
        raise Failure(f"{address}: Ray answers with an error ({said[1].strip()})") from e


def info(client: Any, job: str) -> Any:
    """Ray's `JobDetails`. Raises UserError where the cluster knows no such job."""
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
        found = [job for job in client.list_jobs() if (job.submission_id or "").startswith("longtake-")]
    return sorted(found, key=lambda job: job.start_time or 0, reverse=True)


def tries(client: Any, name: str) -> list[Any]:
    """The jobs NAME, NAME-2, NAME-3 and so on, in this order."""
    matches = ((re.fullmatch(re.escape(name) + r"(?:-(\d+))?", job.submission_id), job) for job in ours(client))
    return [job for _, job in sorted(((int(m[1] or 1), job) for m, job in matches if m), key=lambda pair: pair[0])]


def exit_code(job: Any) -> int | None:
    """Of a job that has ended, as a shell would say it; None where its command has not even started."""
    if job.status == "STOPPED":
        return STOPPED
    code = 0 if job.status == "SUCCEEDED" else job.driver_exit_code
    return 128 - code if code is not None and code < 0 else code


def stop(client: Any, job: str, wait: bool) -> str:
    """Ask a job to save and stop; returns its status, with `wait` the one that it ends with."""
    status = info(client, job).status
    if not status.is_terminal():
        with answered(client):
            client.stop_job(job)
        while not (status := info(client, job).status).is_terminal() and wait:
            time.sleep(1)
    return str(status.value)


def log(client: Any, job: str) -> str:
    """What a job has printed so far."""
    info(client, job)
    with answered(client):
        return str(client.get_job_logs(job))


def follow(client: Any, job: str, write: Callable[[str], Any]) -> Any:
    """Write what a job prints, from its first line on, until it has ended; returns its `JobDetails` then.

    Ray sends a log from its beginning each time: after a broken connection, what was written already is left out.

    Raises:
        UserError: the cluster does not know the job any more.
        Failure: the dashboard stays away.
    """
    return asyncio.run(_follow(client, job, write))


async def _follow(client: Any, job: str, write: Callable[[str], Any]) -> Any:
    import aiohttp

    written, failures = 0, 0
    while True:
        seen, began = 0, time.monotonic()
        try:
            async for text in _received(client, job):
                if new := text[max(0, written - seen) :]:
                    write(new)
                    failures = 0
                seen += len(text)
                written = max(written, seen)
            found = await asyncio.to_thread(info, client, job)
            if found.status.is_terminal():
                return found
        except (OSError, RuntimeError, aiohttp.ClientError) as e:
            failures = 1 if time.monotonic() - began > _QUIET_SECONDS else failures + 1
            if failures >= _ATTEMPTS:
                raise Failure(f"{client.get_address()}: lost the log of job {job}, which may still run ({e})") from e
        await asyncio.sleep(min(15.0, 0.1 * 2**failures))


async def _received(client: Any, job: str) -> AsyncIterator[str]:
    stream = client.tail_job_logs(job)
    quiet = 0
    coming = asyncio.ensure_future(anext(stream, None))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=_QUIET_SECONDS)
            if done:
                quiet = 0
                text = coming.result()
                if text is None:
                    return
                yield text
                coming = asyncio.ensure_future(anext(stream, None))
                continue
            # a dead connection is as quiet as a long step
            quiet += 1
            ended = (await asyncio.to_thread(info, client, job)).status.is_terminal()
            if quiet >= (2 if ended else _QUIET_TIMES):
                return
    finally:
        coming.cancel()
        await asyncio.wait({coming})
        await stream.aclose()
