"""Checks of this machine, the servers and the storage: one line a check, with the fix where it fails.

Nothing is changed for good: whatever a check writes is deleted again. Given up: nodes of a cluster are judged by what they
report of themselves; only this machine's disks, memory and limits are examined.
"""

import itertools
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from longtake.datasets import environment, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown
from longtake.infra.graph import Node
from longtake.infra.recipe import Recipe
from longtake.infra.upkeep import machine
from longtake.infra.upkeep.machine import Level, Line
from longtake.training.registry import store as model_store

SKEW = (5.0, 900.0)  # seconds: a warning from the first, a failure from the second, which S3 refuses

_PROBE_BYTES = 8 << 20
_SECONDS = 10.0  # for an answer


def examine(
    recipe: Recipe | None = None, nodes: list[Node] | None = None, address: str | None = None
) -> Iterator[Line]:
    """All checks that apply: this machine and, with a recipe, its servers, storage, sources and resources.

    Args:
        nodes: the recipe's graph.
        address: the dashboard of the Ray cluster to run on, such as http://head:8265.
    """
    workspace = recipe.workspace if recipe else None
    uri = os.environ.get("MLFLOW_TRACKING_URI") or ("" if recipe is None else "sqlite in the workspace")
    checks: dict[str, Callable[[], Iterator[Line]]] = {
        "versions": machine.versions,
        "environment": variables,
        "accelerators": machine.accelerators,
        "shared memory": machine.shared_memory,
        "memory": machine.memory,
        "open files": machine.open_files,
        "disk": lambda: machine.disks(
            [*([workspace] if workspace and storage.is_local(workspace) else []), tempfile.gettempdir()]
        ),
    }
    if address:
        checks["Ray"] = lambda: ray_cluster(str(address))
    if uri:
        checks["MLflow"] = lambda: tracking(recipe)
    if workspace:
        checks["storage"] = lambda: round_trip(str(workspace))
    if recipe and nodes is not None:
        checks["sources"] = lambda: sources(nodes)
        checks["resources"] = lambda: resources(recipe, nodes, address)
    endpoints = [url for url in (uri, address, os.environ.get("AWS_ENDPOINT_URL")) if url and url.startswith("http")]
    if endpoints:
        checks["clock"] = lambda: clocks(endpoints)
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as e:  # a check that breaks has failed, for whatever reason
            yield Line("fail", name, f"{type(e).__name__}: {_on_one_line(e)[:300]}", "see the message")


def _on_one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split()))


def variables() -> Iterator[Line]:
    """The variables that a scheduler or a shell has set."""
    try:
        rank, world = environment.ranks()
        threads = environment.threads()
    except UserError as e:
        yield Line("fail", "environment", str(e), "see the message")
        return
    if world > 1:
        yield Line("ok", "environment", f"a launcher has started this process as rank {rank} of {world}")
    if error := environment.silent_ray(os.environ.get("RAY_ADDRESS") or "local"):
        yield Line("fail", "environment", error, "see the message")
    elif folder := environment.long_folder():
        says = f"{folder}: is too long a path for Ray's sockets, which will lie in /tmp"
        yield Line("warn", "environment", says, "set RAY_TMPDIR to a short folder of your own")
    else:
        yield Line("ok", "environment", f"OMP_NUM_THREADS {threads or 'not set'}, nothing in Ray's way")


# Servers and storage.


def ray_cluster(address: str) -> Iterator[Line]:
    from longtake.infra.cluster import jobs

    if error := _connection_error(address):
        yield Line("fail", "Ray", error, "start the cluster (`ray start --head`), or give the right --address")
        return
    try:
        nodes = jobs.cluster_nodes(address)
        total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        says = f"{address}: Ray {jobs.cluster_version(address)}, {len(nodes)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs"
        jobs.check_version(address)
    except (UserError, Failure) as e:
        yield Line("fail", "Ray", str(e), "see the message")
        return
    yield Line("ok", "Ray", says)


def tracking(recipe: Recipe | None) -> Iterator[Line]:
    """Write and read a tag and an artifact of a run, which is deleted again."""
    from longtake.infra import runs

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(_SECONDS)))
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http") and (error := _connection_error(uri)):
        fix = "start the server (see infra/README.md), or set MLFLOW_TRACKING_URI to where it is"
        yield Line("fail", "MLflow", error, fix)
        return
    if recipe:
        store = runs.connect(recipe)
        client, experiment, uri = store.client, store.experiment, store.tracking_uri
    else:
        client, experiment = runs.client_of(uri), "0"

    token, start = secrets.token_hex(8), time.monotonic()
    run = client.create_run(experiment, tags={"mlflow.runName": "longtake doctor"})
    run_id = run.info.run_id
    try:
        client.set_tag(run_id, "longtake.doctor", token)
        if client.get_run(run_id).data.tags.get("longtake.doctor") != token:
            yield Line("fail", "MLflow", f"{shown(uri)}: gives back another tag than was written", "check its database")
            return
        yield Line("ok", "MLflow", f"{shown(uri)}: a run made, written, read in {time.monotonic() - start:.2f} s")
        yield _artifacts(client, run, token)
    finally:
        client.delete_run(run_id)


def _artifacts(client: Any, run: Any, text: str) -> Line:
    """Write, read and delete an artifact of a run."""
    from mlflow.exceptions import MlflowException

    uri = run.info.artifact_uri
    try:
        client.log_text(run.info.run_id, text, "doctor.txt")
        with tempfile.TemporaryDirectory() as folder:
            content = Path(client.download_artifacts(run.info.run_id, "doctor.txt", folder)).read_text()
        try:
            deleted = model_store.delete_artifacts(uri)
        except (MlflowException, OSError):
            deleted = False
    except Exception as e:  # whatever the client of a store raises
        fix = "start the server with --artifacts-destination, or give this machine the store's credentials"
        return Line("fail", "MLflow artifacts", f"{shown(uri)}: {_on_one_line(e)[:200]}", fix)
    if content != text:
        return Line("fail", "MLflow artifacts", f"{uri}: gives back other bytes", "check the store")
    remainder = "" if deleted else "; cannot be deleted there, a file of 16 bytes stays"
    return Line("ok", "MLflow artifacts", f"{uri}: written and read{remainder}")


def round_trip(url: str) -> Iterator[Line]:
    """Write, list, read and delete a file, and measure how fast that is."""
    name = f"doctor-{secrets.token_hex(8)}"
    target, byte, data = storage.join(url, name), b"1", secrets.token_bytes(_PROBE_BYTES)
    existed = storage.exists(url)
    try:
        times = [time.monotonic()]
        storage.write(target, byte)
        intact = name in storage.names(url) and storage.read(target) == byte
        times.append(time.monotonic())
        storage.write(target, data)
        times.append(time.monotonic())
        intact = storage.read(target) == data and intact
        times.append(time.monotonic())
    except (Failure, UserError, OSError) as e:
        fix = "give this machine the rights and credentials to write there"
        yield Line("fail", "storage", f"{shown(url)}: {_on_one_line(e)[:300]}", fix)
        return
    finally:
        _delete(target)
        if not existed and storage.is_local(url):
            _remove_empty(Path(url))
    if not intact:
        says = f"{shown(url)}: does not list or give back what was written"
        yield Line("fail", "storage", says, "use a store that does")
    elif name in storage.names(url):
        yield Line("fail", "storage", f"{shown(url)}: {name} could not be deleted", "give the right to delete")
    else:
        small, write, read = (end - start for start, end in itertools.pairwise(times))
        speed = f"{_PROBE_BYTES / write / 1e6:.0f} MB/s written, {_PROBE_BYTES / read / 1e6:.0f} MB/s read"
        yield Line("ok", "storage", f"{shown(url)}: {small / 3 * 1000:.0f} ms an operation, {speed}")


def _delete(url: str) -> None:
    fs, path = storage.filesystem(url)
    try:
        fs.rm_file(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as e:  # the caller lists the folder, and reports a file that is still there
        print(shown(f"{url}: {e}"), file=sys.stderr)


def _remove_empty(folder: Path) -> None:
    """Delete a workspace that did not exist before, if it is still empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def sources(nodes: list[Node]) -> Iterator[Line]:
    """The first listing of each pattern of sources."""
    from longtake.pipeline.discover import find

    for node in nodes:
        for pattern in getattr(node.config, "sources", ()):
            check = f"sources of {node.name}"
            start = time.monotonic()
            try:
                batch = next(find([pattern]), None)
            except (UserError, Failure, OSError) as e:
                yield Line("fail", check, _on_one_line(e)[:300], "see the message")
                continue
            if batch is None or not len(batch):
                fix = "name a folder, glob or manifest with videos"
                yield Line("fail", check, f"{shown(pattern)}: lists nothing", fix)
            else:
                says = f"{shown(pattern)}: {len(batch)} in the first listing, {time.monotonic() - start:.1f} s"
                yield Line("ok", check, says)


def resources(recipe: Recipe, nodes: list[Node], address: str | None) -> Iterator[Line]:
    """Compare the CPUs, GPUs and memory that each stage asks for with those of the cluster, or of this machine."""
    from longtake.infra.cluster import jobs
    from longtake.infra.cluster.submit import lacking
    from longtake.infra.deploy import Resources
    from longtake.infra.runner import check_observers

    ray = os.environ.get("RAY_ADDRESS", "")
    if address:
        cluster, where = jobs.cluster_nodes(address), address
        labels = jobs.cluster_labels(address)
    elif ray and ray != "local" and not ray.startswith("http"):
        from longtake.pipeline.cluster import connected

        with connected("doctor") as connection:
            cluster, where = [n["Resources"] for n in connection.nodes() if n["Alive"]], f"RAY_ADDRESS={ray}"
        labels = None
    else:
        import torch

        ours = {
            "CPU": float(os.cpu_count() or 1),
            "GPU": float(torch.cuda.device_count()),
            "memory": machine.bytes_of_memory()[0],
        }
        cluster, where, labels = [ours], "this machine", None
    # without a job, a stage's process reserves nothing
    held = None if address else Resources()
    shortages = lacking(nodes, recipe.deploy, cluster, labels, held)
    if where == "this machine":
        try:
            check_observers(nodes)
        except UserError as e:
            shortages.append(str(e))
    for line in shortages:
        fix = "lower it in the recipe, or name a larger cluster by --address"
        yield Line("fail", "resources", f"{where}: {line}", fix)
    if not shortages:
        yield Line("ok", "resources", f"{where}: has what the {len(nodes)} stages ask for")


def clocks(urls: list[str]) -> Iterator[Line]:
    """This machine's clock against the clocks of servers; object stores refuse a large difference."""
    import requests

    for url in urls:
        where = shown(url)
        try:
            before = time.time()
            date = requests.head(url, timeout=_SECONDS, allow_redirects=False).headers.get("Date")
            after = time.time()
        except requests.exceptions.RequestException:
            # another check reports that it does not answer
            continue
        if date is None:
            continue
        skew = parsedate_to_datetime(date).timestamp() + 0.5 - (before + after) / 2
        level: Level = "fail" if abs(skew) > SKEW[1] else "warn" if abs(skew) > SKEW[0] else "ok"
        says = f"{where}: {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
        yield Line(level, "clock", says, "" if level == "ok" else "run ntpd or chronyd on both machines")


def _connection_error(url: str) -> str | None:
    """The reason why the server of a URL cannot be reached; None if it can."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=_SECONDS):
            return None
    except OSError as e:
        return f"{shown(url)}: nothing answers at port {port} of {parts.hostname} ({e.strerror or e})"
