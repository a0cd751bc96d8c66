"""Is this machine, are the servers and is the storage fit for the work? One line a check, with the fix where it is not.

Nothing is changed for good: what is written to look whether it can be written is deleted again. What it gives up: nodes of
a cluster are judged by what they tell of themselves, and only this machine's disks, memory and limits are looked at.
"""

import json
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from longtake.datasets import environment, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown
from longtake.infra.graph import Node
from longtake.infra.recipe import Recipe
from longtake.infra.upkeep import machine
from longtake.infra.upkeep.machine import Level, Line
from longtake.training.registry import store as model_store

SKEW = (5.0, 900.0)  # seconds: to warn from, and what S3 refuses

_PROBE_BYTES = 8 << 20
_SECONDS = 10.0


def examine(
    recipe: Recipe | None = None, nodes: list[Node] | None = None, address: str | None = None
) -> Iterator[Line]:
    """All checks that apply: of this machine; with a recipe, its servers, storage, sources and resources.

    Args:
        nodes: of the recipe's graph.
        address: of a Ray cluster's dashboard, such as http://head:8265, that the recipe is to run on.
    """
    workspace = recipe.workspace if recipe else None
    uri = os.environ.get("MLFLOW_TRACKING_URI") or ("" if recipe is None else "sqlite in the workspace")
    checks: dict[str, Callable[[], Iterator[Line]]] = {
        "versions": machine.versions,
        "environment": surroundings,
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
        checks["storage"] = lambda: stored(str(workspace))
    if recipe and nodes is not None:
        checks["sources"] = lambda: sources(nodes)
        checks["resources"] = lambda: resources(recipe, nodes, address)
    endpoints = [url for url in (uri, address, os.environ.get("AWS_ENDPOINT_URL")) if url and url.startswith("http")]
    if endpoints:
        checks["clock"] = lambda: clocks(endpoints)
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as e:  # a check that breaks is a finding, whatever broke it
            yield Line("fail", name, f"{type(e).__name__}: {shown(' '.join(str(e).split()))[:300]}", "see the message")


def surroundings() -> Iterator[Line]:
    """What a scheduler or a shell has left in the environment."""
    try:
        rank, world = environment.ranks()
        threads = environment.threads()
    except UserError as e:
        yield Line("fail", "environment", str(e), "see the message")
        return
    if world > 1:
        yield Line("ok", "environment", f"a launcher has started this process as rank {rank} of {world}")
    if wrong := environment.silent_ray(os.environ.get("RAY_ADDRESS") or "local"):
        yield Line("fail", "environment", wrong, "see the message")
    elif folder := environment.long_folder():
        says = f"{folder}: is too long a path for Ray's sockets, which will lie in /tmp"
        yield Line("warn", "environment", says, "set RAY_TMPDIR to a short folder of your own")
    else:
        yield Line("ok", "environment", f"OMP_NUM_THREADS {threads or 'not set'}, nothing in Ray's way")


# Servers and storage.


def ray_cluster(address: str) -> Iterator[Line]:
    from longtake.infra.cluster import jobs

    if wrong := _silent(address):
        yield Line("fail", "Ray", wrong, "start the cluster (`ray start --head`), or give the right --address")
        return
    try:
        found = jobs.cluster_nodes(address)
        total = {name: sum(node.get(name, 0) for node in found) for name in ("CPU", "GPU")}
        says = f"{address}: Ray {jobs.cluster_version(address)}, {len(found)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs"
        jobs.check_version(address)
    except (UserError, Failure) as e:
        yield Line("fail", "Ray", str(e), "see the message")
        return
    yield Line("ok", "Ray", says)


def tracking(recipe: Recipe | None) -> Iterator[Line]:
    """Write and read a tag and an artifact of a run that is deleted again."""
    from longtake.infra import runs

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(_SECONDS)))
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http") and (wrong := _silent(uri)):
        yield Line(
            "fail", "MLflow", wrong, "start the server (see infra/README.md), or set MLFLOW_TRACKING_URI to where it is"
        )
        return
    if recipe:
        store = runs.connect(recipe)
        client, experiment, uri = store.client, store.experiment, store.tracking_uri
    else:
        client, experiment = runs._client(uri), "0"
    from mlflow.exceptions import MlflowException

    mark, began = secrets.token_hex(8), time.monotonic()
    run = client.create_run(experiment, tags={"mlflow.runName": "longtake doctor"})
    run_id = run.info.run_id
    try:
        client.set_tag(run_id, "longtake.doctor", mark)
        if client.get_run(run_id).data.tags.get("longtake.doctor") != mark:
            yield Line("fail", "MLflow", f"{shown(uri)}: gives back another tag than was written", "check its database")
            return
        yield Line("ok", "MLflow", f"{shown(uri)}: a run made, written, read in {time.monotonic() - began:.2f} s")
        try:
            client.log_text(run_id, mark, "doctor.txt")
            with tempfile.TemporaryDirectory() as folder:
                read = Path(client.download_artifacts(run_id, "doctor.txt", folder)).read_text()
            try:
                gone = model_store.delete_artifacts(run.info.artifact_uri)
            except (MlflowException, OSError):
                gone = False
            left = "" if gone else "; cannot be deleted there, a file of 16 bytes stays"
        except Exception as e:  # whatever the client of a store raises
            fix = "start the server with --artifacts-destination, or give this machine the store's credentials"
            yield Line(
                "fail",
                "MLflow artifacts",
                f"{shown(run.info.artifact_uri)}: {shown(' '.join(str(e).split()))[:200]}",
                fix,
            )
            return
        if read == mark:
            yield Line("ok", "MLflow artifacts", f"{run.info.artifact_uri}: written and read{left}")
        else:
            yield Line(
                "fail", "MLflow artifacts", f"{run.info.artifact_uri}: gives back other bytes", "check the store"
            )
    finally:
        client.delete_run(run_id)


def stored(url: str) -> Iterator[Line]:
    """Write, list, read and delete a file, and how fast that was."""
    name = f"doctor-{secrets.token_hex(8)}"
    target, small = storage.join(url, name), b"1"
    began = time.monotonic()
    there = storage.exists(url)
    try:
        storage.write(target, small)
        listed = name in storage.names(url)
        read = storage.read(target)
        latency = (time.monotonic() - began) / 3
        data = secrets.token_bytes(_PROBE_BYTES)
        began = time.monotonic()
        storage.write(target, data)
        wrote = time.monotonic() - began
        began = time.monotonic()
        whole = storage.read(target)
        took = time.monotonic() - began
    except (Failure, UserError, OSError) as e:
        says = shown(" ".join(str(e).split()))[:300]
        yield Line(
            "fail", "storage", f"{shown(url)}: {says}", "give this machine the rights and credentials to write there"
        )
        return
    finally:
        _delete(target)
        if not there and storage.is_local(url):
            _remove_empty(Path(url))
    if not listed or read != small or whole != data:
        yield Line(
            "fail", "storage", f"{shown(url)}: does not list or give back what was written", "use a store that does"
        )
    elif name in storage.names(url):
        yield Line("fail", "storage", f"{shown(url)}: {name} could not be deleted", "give the right to delete")
    else:
        speed = f"{_PROBE_BYTES / wrote / 1e6:.0f} MB/s written, {_PROBE_BYTES / took / 1e6:.0f} MB/s read"
        yield Line("ok", "storage", f"{shown(url)}: {latency * 1000:.0f} ms an operation, {speed}")


def _delete(url: str) -> None:
    fs, path = storage.filesystem(url)
    try:
        fs.rm_file(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as e:  # said by the caller, who looks whether it is gone
        print(shown(f"{url}: {e}"), file=sys.stderr)


def _remove_empty(folder: Path) -> None:
    """A workspace that was not there before, where nothing has come into it."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def sources(nodes: list[Node]) -> Iterator[Line]:
    """The first listing of each."""
    from longtake.pipeline.discover import find

    for node in nodes:
        for pattern in getattr(node.config, "sources", ()):
            check = f"sources of {node.name}"
            began = time.monotonic()
            try:
                batch = next(find([pattern]), None)
            except (UserError, Failure, OSError) as e:
                yield Line("fail", check, shown(" ".join(str(e).split()))[:300], "see the message")
                continue
            if batch is None or not len(batch):
                yield Line(
                    "fail", check, f"{shown(pattern)}: lists nothing", "name a folder, glob or manifest with videos"
                )
            else:
                says = f"{shown(pattern)}: {len(batch)} in the first listing, {time.monotonic() - began:.1f} s"
                yield Line("ok", check, says)


def resources(recipe: Recipe, nodes: list[Node], address: str | None) -> Iterator[Line]:
    """Whether each stage finds the CPUs, GPUs and memory that it asks for."""
    from longtake.infra.cluster import jobs
    from longtake.infra.cluster.submit import lacking

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

        here = {
            "CPU": float(os.cpu_count() or 1),
            "GPU": float(torch.cuda.device_count()),
            "memory": machine.bytes_of_memory()[0],
        }
        cluster, where, labels = [here], "this machine", None
    if wrong := lacking(nodes, recipe.deploy, cluster, labels):
        for line in wrong:
            yield Line(
                "fail", "resources", f"{where}: {line}", "lower it in the recipe, or name a larger cluster by --address"
            )
    else:
        yield Line("ok", "resources", f"{where}: has what the {len(nodes)} stages ask for")


def clocks(urls: list[str]) -> Iterator[Line]:
    """This machine's clock against that of servers, which stores of objects check."""
    import requests

    for url in urls:
        where = shown(url)
        try:
            before = time.time()
            told = requests.head(url, timeout=_SECONDS, allow_redirects=False).headers.get("Date")
            after = time.time()
        except requests.exceptions.RequestException:
            # that it does not answer is another check's finding
            continue
        if told is None:
            continue
        skew = parsedate_to_datetime(told).timestamp() + 0.5 - (before + after) / 2
        level: Level = "fail" if abs(skew) > SKEW[1] else "warn" if abs(skew) > SKEW[0] else "ok"
        says = f"{where}: {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
        yield Line(level, "clock", says, "" if level == "ok" else "run ntpd or chronyd on both machines")


def _silent(url: str) -> str | None:
    """Why no connection to the server of a URL can be made; None where it can."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=_SECONDS):
            return None
    except OSError as e:
        return f"{shown(url)}: nothing answers at port {port} of {parts.hostname} ({e.strerror or e})"


def as_json(lines: list[Line]) -> str:
    return json.dumps([line._asdict() for line in lines], indent=2)
