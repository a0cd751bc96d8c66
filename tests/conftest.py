"""Shared by all tests: real footage from outside, generated footage, a small dataset, one Ray for the session."""

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from shards import make_dataset

from longtake.datasets import index, schema

ROOT = Path(__file__).resolve().parents[1]

# of the Ray that tests share
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# a busy machine is no mistake in the code
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


# the files that take longest, minutes each
LONGEST = [
    "infra/test_quickstart.py",
    "training/launch/test_launch.py",
    "training/engines/test_ranks.py",
    "infra/cluster/test_cluster_jobs.py",
    "pipeline/test_chaos_s3.py",
    "pipeline/test_chaos.py",
    "pipeline/test_cache_latents.py",
    "training/models/memory/test_finetune.py",
    "pipeline/test_shard_stage.py",
    "training/test_loop.py",
    "training/test_guards.py",
]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin, then those with slow tests: at the end no process works alone on a long one."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONGEST)}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    # files stay whole and in order
    items.sort(key=lambda item: places.get(item.path, len(LONGEST) + (item.path not in slow)))


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests pull from registries stays out of the user's own cache."""
    os.environ["LONGTAKE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def videos() -> Path:
    """The folder with real/ and odd/ footage that LONGTAKE_VIDEOS names."""
    named = os.environ.get("LONGTAKE_VIDEOS")
    if not named:
        pytest.skip("LONGTAKE_VIDEOS is not set: no real footage at hand")
    return (ROOT / named).resolve()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads of tiny kernels wait for each other when the cores are busy: 46 s instead of 5."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def s3_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment variables of an S3 server with nothing in it, set for this process and its children."""
    from moto.backends import get_backend
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    # s3fs keeps a client, and moto what it was given, for all of a process
    S3FileSystem.clear_instance_cache()
    get_backend("s3").reset()
    try:
        yield variables
    finally:
        S3FileSystem.clear_instance_cache()
        server.stop()
        get_backend("s3").reset()


@pytest.fixture(scope="session")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six generated videos and their ground truth."""
    from longtake.infra.footage import generate

    folder = tmp_path_factory.mktemp("footage")
    generate(folder, count=6, seconds=6.0)
    return folder


@pytest.fixture(scope="session")
def dataset(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small dataset of 32-pixel clips: read it, do not change it."""
    url = make_dataset(tmp_path_factory.mktemp("dataset"), sorted(footage.glob("*.mp4")))
    assert all(len(index.read_all(url, split)) for split in schema.SPLITS)
    return url


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests; stages that run in this process use it."""
    from longtake.pipeline.cluster import connected

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            # so that its workers can load the models of tests
            patch.setenv("PYTHONPATH", str(Path(__file__).parent / "support"))
            stack.enter_context(connected("tests"))
        yield
