"""An object store that fails and stalls, workers with their decoders and drivers that die: the dataset is the same to the byte."""

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from longtake.datasets import index, storage
from longtake.datasets.verify import verify
from longtake.pipeline import retry
from longtake.pipeline.commit import make_group
from longtake.pipeline.stages import shard

pytestmark = pytest.mark.slow

Tiny = Callable[[object], shard.Config]
Hashes = Callable[[object], dict[str, str]]

DYING = """
import asyncio, json, os, signal, sys, urllib.request
from s3fs import S3FileSystem
from longtake.pipeline.commit import make_group
from longtake.pipeline.config import CutConfig

nth, moment = int(sys.argv[1]), sys.argv[2]
plain, puts = S3FileSystem._call_s3, 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

async def half(fs, bucket, key, body):
    import http.client, urllib.parse
    client = await fs.get_s3(bucket)
    url = await client.generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": key})
    where = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(where.netloc)
    connection.putrequest("PUT", f"{where.path}?{where.query}")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    connection.send(body[: len(body) // 2])

async def dying(self, method, *more, **call):
    global puts
    puts += method == "put_object"
    here = method == "put_object" and puts == nth
    if here and moment == "before":
        die()
    if here and moment == "during":
        await half(self, call["Bucket"], call["Key"], call["Body"])
        die()
    answer = await plain(self, method, *more, **call)
    if here and moment == "after":
        die()
    return answer

S3FileSystem._call_s3 = dying
*job, cut = json.loads(sys.argv[3])
print(json.dumps(make_group(*job, CutConfig(**cut))))
"""


@pytest.fixture(scope="module")
def undisturbed(s3: Any, tiny: Tiny, made_alone: Callable[[shard.Config, object], dict[str, str]]) -> dict[str, str]:
    found = made_alone(tiny("s3://raw"), "s3://lake/undisturbed")
    assert len([name for name in found if name.endswith(".tar")]) == 3 * 16
    return found


@pytest.fixture
def output(s3: Any, undisturbed: dict[str, str]) -> Iterator[str]:
    """Where a test makes the dataset once more; afterwards the store must hold the same there, and nothing else."""
    url = "s3://lake/output"
    fs, path = storage.filesystem(url)
    try:
        yield url
        s3.faults = False
        fs.invalidate_cache()
        # the store itself says what there is, not a tool that may pass something over
        keys = {entry["Key"] for entry in fs.call_s3("list_objects_v2", Bucket="lake")["Contents"]}
        assert keys == {f"{part}/{name}" for part in ("undisturbed", "output") for name in undisturbed}
        assert not any(fs.call_s3("list_multipart_uploads", Bucket=b).get("Uploads") for b in ("lake", "raw"))
    finally:
        s3.faults = False
        fs.invalidate_cache()
        fs.rm(path, recursive=True)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_kills_on_a_failing_store_lose_double_and_tear_nothing(
    s3: Any,
    output: str,
    drivers: Any,
    tiny: Tiny,
    victims: Callable[[int], list[psutil.Process]],
    hashes: Hashes,
    undisturbed: dict[str, str],
) -> None:
    kills = 30
    chance = random.Random(3)
    workers = killed = 0
    fs, path = storage.filesystem(output)
    deadline = time.time() + 800
    while workers + killed < kills and time.time() < deadline:
        s3.faults = True
        driver = drivers.start(tiny("s3://raw"), output)
        while driver.poll() is None and not victims(driver.pid):
            time.sleep(0.1)
        last, share = time.time() + chance.uniform(8, 25), min(workers + killed + kills // 3, kills - 1)
        while driver.poll() is None and time.time() < last and workers + killed < share:
            # a new worker needs a second or two to come to anything: give some of them that
            time.sleep(chance.choice((0.1, 0.3, chance.uniform(0.5, 2))))
            if found := victims(driver.pid):
                chance.choice(found).kill()
                workers += 1
        killed += driver.poll() is None
        drivers.kill(driver)
        s3.faults = False
        fs.invalidate_cache()
        for name in fs.glob(f"{path}/train/?????.parquet")[::2]:
            # work for the next driver, such as a crash between tar and index leaves
            fs.rm(name)
    s3.faults = True
    drivers.run(tiny("s3://raw"), output)
    s3.faults = False
    counts = {"workers": workers, "drivers": killed} | s3.counts
    print(counts)
    assert workers + killed >= kills and workers and killed and counts["failed"] >= kills, counts
    assert counts["lost"] and counts["late"], counts
    assert hashes(output) == undisturbed
    assert not list(verify(output))


def test_a_kill_at_any_step_of_a_commit_to_a_store_loses_and_doubles_nothing(
    s3: Any,
    output: str,
    drivers: Any,
    tiny: Tiny,
    planned: Callable[[shard.Config, str], list[tuple[Any, ...]]],
    hashes: Hashes,
    undisturbed: dict[str, str],
) -> None:
    # data tar 1, frame-diff tar 2 and its index 3, sound 4 and 5, source rows 6, index 7: from then on the group is there
    points = [(1, "before"), (1, "during"), (1, "after"), (6, "after"), (7, "before"), (7, "during"), (7, "after")]
    groups = planned(tiny("s3://raw"), output)
    for (nth, moment), arguments in zip(points, groups, strict=False):
        *job, cut = arguments
        process = drivers.script(DYING, str(nth), moment, json.dumps([*job, cut.model_dump(mode="json")]))
        assert process.wait(timeout=120) == -signal.SIGKILL
        split, name = arguments[0]["split"], f"{arguments[0]['group']:05d}"
        assert (name in index.shard_names(output, split)) == ((nth, moment) == (7, "after")), (nth, moment)
        if (nth, moment) == (7, "after"):
            there = hashes(f"{output}/{split}")
            assert there.items() <= {n.removeprefix(f"{split}/"): digest for n, digest in undisturbed.items()}.items()
    assert s3.counts["torn"] == sum(moment == "during" for _, moment in points)
    for arguments in groups:
        assert not make_group(*arguments)["error"]
    retry.record(output)
    assert hashes(output) == undisturbed
    assert not list(verify(output))


def test_two_drivers_at_once_on_a_store_make_one_dataset(
    output: str, drivers: Any, tiny: Tiny, hashes: Hashes, undisturbed: dict[str, str]
) -> None:
    drivers.finish(*[drivers.start(tiny("s3://raw"), output) for _ in range(2)])
    assert hashes(output) == undisturbed
    assert not list(verify(output))
