import contextlib
import errno
import hashlib
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

import fsspec
import pytest

from longtake.datasets import cache as module
from longtake.datasets.cache import Cache
from longtake.datasets.errors import Failure

SIZE = 10_000
BLOCK = 4_000
BLOCKS = 3


class Store(fsspec.AbstractFileSystem):
    """Local files under another protocol; every read is counted, across processes, and may be spoiled."""

    protocol = "counted"
    faults: ClassVar[list[Callable[[bytes], bytes]]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        with Path(f"{path}.reads").open("a") as log:
            log.write(".")
        data = Path(path).read_bytes()[start:end]
        return self.faults.pop(0)(data) if self.faults else data


fsspec.register_implementation("counted", Store, clobber=True)

# what a child process needs to be another user of the same store and cache
CHILD = """
import runpy, sys
from longtake.datasets import cache
cache._BLOCK = 4_000
runpy.run_path({file!r})[{function!r}](*sys.argv[1:])
"""


def child(function: Callable[..., None], *arguments: str) -> subprocess.Popen[str]:
    script = CHILD.format(file=__file__, function=function.__name__)
    return subprocess.Popen([sys.executable, "-P", "-c", script, *arguments], stdout=subprocess.PIPE, text=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_BLOCK", BLOCK)
    yield
    Store.faults.clear()


def remote(folder: Path, seed: int = 0, name: str | None = None) -> tuple[str, int, str]:
    """A file of the store: its url, size and sha256."""
    folder.mkdir(exist_ok=True)
    data = random.Random(seed).randbytes(SIZE)
    path = folder / (name or f"{seed}.tar")
    path.write_bytes(data)
    return f"counted://{path}", SIZE, hashlib.sha256(data).hexdigest()


def reads(url: str) -> int:
    log = Path(url.removeprefix("counted://") + ".reads")
    return len(log.read_text()) if log.exists() else 0


def right(file: BinaryIO | None, sha256: str) -> bool:
    assert file is not None
    with file:
        return hashlib.sha256(os.pread(file.fileno(), SIZE + 1, 0)).hexdigest() == sha256


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def refused(data: bytes) -> NoReturn:
    raise OSError("503 slow down")


def test_a_file_is_fetched_once_and_then_read_from_the_disk(tmp_path: Path) -> None:
    url, size, sha256 = remote(tmp_path / "store")
    local = pickle.loads(pickle.dumps(Cache(str(tmp_path / "deep" / "cache"), 10 * SIZE)))
    assert not (tmp_path / "deep").exists()
    first, second = local.open(url, size, sha256), local.open(url, size, sha256)
    assert first.read(5) == second.read(5)
    assert right(first, sha256) and right(second, sha256)
    assert reads(url) == BLOCKS
    assert names(tmp_path / "deep" / "cache") == {sha256}


def test_the_same_content_under_two_urls_is_one_entry(tmp_path: Path) -> None:
    one, other = remote(tmp_path / "store", name="a.tar"), remote(tmp_path / "store", name="b.tar")
    local = Cache(str(tmp_path / "cache"), 10 * SIZE)
    assert right(local.open(*one), one[2]) and right(local.open(*other), one[2])
    assert (reads(one[0]), reads(other[0])) == (BLOCKS, 0)


def test_an_empty_file_is_an_entry_too(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    sha256 = hashlib.sha256().hexdigest()
    with Cache(str(tmp_path / "cache"), 1).open(f"counted://{tmp_path}/empty", 0, sha256) as file:
        assert file.read() == b""


def open_all(folder: str, store: str) -> None:
    files = [remote_of(Path(path)) for path in sorted(Path(store).glob("*.tar"))]
    local = Cache(folder, 10 * SIZE)
    with ThreadPoolExecutor(6) as pool:
        print(all(pool.map(lambda f: right(local.open(*f), f[2]), files * 3)))


def remote_of(path: Path) -> tuple[str, int, str]:
    data = path.read_bytes()
    return f"counted://{path}", len(data), hashlib.sha256(data).hexdigest()


def test_of_many_processes_and_threads_one_fetches_and_all_read(tmp_path: Path) -> None:
    urls = [remote(tmp_path / "store", seed)[0] for seed in range(2)]
    children = [child(open_all, str(tmp_path / "cache"), str(tmp_path / "store")) for _ in range(4)]
    assert [c.communicate(timeout=60)[0] for c in children] == ["True\n"] * 4
    assert [reads(url) for url in urls] == [BLOCKS, BLOCKS]
    assert len(names(tmp_path / "cache")) == 2


def test_a_lock_has_one_holder_however_many_come_and_go(tmp_path: Path) -> None:
    local, inside, seen = Cache(str(tmp_path), SIZE), [], []

    def enter(number: int) -> None:
        with local._locked("name"):
            inside.append(number)
            time.sleep(0.0005)
            seen.append(len(inside))
            inside.remove(number)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(enter, range(150)))
    assert seen == [1] * 150 and names(tmp_path) == set()


def open_any(folder: str, store: str, seed: str) -> None:
    files = [remote_of(path) for path in sorted(Path(store).glob("*.tar"))]
    local = Cache(folder, 4 * SIZE)

    def one(number: int) -> int:
        chosen = random.Random(f"{seed} {number}").choice(files)
        file = local.open(*chosen)
        return 0 if file is None else 1 if right(file, chosen[2]) else -1000

    with ThreadPoolExecutor(3) as pool:
        print(sum(pool.map(one, range(40))) > 0)


def test_users_that_evict_each_other_read_right_bytes_within_the_cap(tmp_path: Path) -> None:
    for seed in range(8):
        remote(tmp_path / "store", seed)
    folder = tmp_path / "cache"
    children = [child(open_any, str(folder), str(tmp_path / "store"), str(n)) for n in range(2)]
    most = 0
    while any(c.poll() is None for c in children):
        taken = 0
        for path in folder.iterdir() if folder.exists() else ():
            with contextlib.suppress(FileNotFoundError):
                taken += path.stat().st_size
        most = max(most, taken)
        time.sleep(0.01)
    assert [c.communicate()[0] for c in children] == ["True\n"] * 2
    assert 0 < most <= 4 * SIZE
    left = list(folder.iterdir())
    assert sum(p.stat().st_size for p in left) <= 4 * SIZE and all(len(p.name) == 64 for p in left)


def test_the_least_recently_used_goes_first_and_nothing_foreign_ever(tmp_path: Path) -> None:
    files = [remote(tmp_path / "store", seed) for seed in range(4)]
    local = Cache(str(tmp_path / "cache"), 3 * SIZE)
    (tmp_path / "cache").mkdir()
    foreign = {"poetry.lock", "notes.txt", ".x~host@1~ab.tmp"}
    for name in foreign:
        (tmp_path / "cache" / name).write_bytes(bytes(SIZE))
    for number in (0, 1, 2, 0, 3):
        assert right(local.open(*files[number]), files[number][2])
        time.sleep(0.02)
    assert names(tmp_path / "cache") - foreign == {files[n][2] for n in (0, 2, 3)}
    assert foreign <= names(tmp_path / "cache")
    assert right(local.open(*files[1]), files[1][2])
    assert [reads(url) // BLOCKS for url, *_ in files] == [1, 2, 1, 1]


def test_an_entry_that_is_being_read_survives_its_eviction(tmp_path: Path) -> None:
    one, other = remote(tmp_path / "store", 0), remote(tmp_path / "store", 1)
    local = Cache(str(tmp_path / "cache"), SIZE)
    held = local.open(*one)
    assert right(local.open(*other), other[2])
    assert names(tmp_path / "cache") == {other[2]}
    assert right(held, one[2])


def hang(folder: str, url: str, size: str, sha256: str) -> None:
    def stop(data: bytes) -> NoReturn:
        print("halfway", flush=True)
        time.sleep(600)
        raise AssertionError

    # the class this process has registered is that of its own copy of this module
    fsspec.get_filesystem_class("counted").faults += [bytes, stop]
    Cache(folder, 10 * SIZE).open(url, int(size), sha256)


def test_a_fetcher_that_is_killed_leaves_no_entry_and_its_waiters_go_on(tmp_path: Path) -> None:
    url, size, sha256 = remote(tmp_path / "store")
    folder = tmp_path / "cache"
    victim = child(hang, str(folder), url, str(size), sha256)
    assert victim.stdout and victim.stdout.readline() == "halfway\n"
    local = Cache(str(folder), 10 * SIZE)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(local.open, url, size, sha256)
        time.sleep(0.2)
        assert not waiting.done() and reads(url) == 2
        victim.kill()
        victim.communicate()
        assert right(waiting.result(timeout=30), sha256)
    assert names(folder) == {sha256}


def test_what_the_dead_left_is_swept_with_the_next_fetch_of_any_file(tmp_path: Path) -> None:
    url, size, sha256 = remote(tmp_path / "store")
    folder = tmp_path / "cache"
    victim = child(hang, str(folder), url, str(size), sha256)
    assert victim.stdout and victim.stdout.readline() == "halfway\n"
    local = Cache(str(folder), 2 * SIZE)
    other = [remote(tmp_path / "store", seed) for seed in (1, 2)]
    # the fetch under way counts with its whole size, and stays
    for file in other:
        assert right(local.open(*file), file[2])
    assert len(names(folder)) == 3 and other[0][2] not in names(folder)
    victim.kill()
    victim.communicate()
    assert len(names(folder)) == 3 and sha256 not in names(folder)
    assert right(local.open(*other[0]), other[0][2])
    assert names(folder) == {file[2] for file in other}


def test_a_torn_read_passes_and_a_lasting_one_names_the_file(tmp_path: Path) -> None:
    url, size, sha256 = remote(tmp_path / "store")
    local = Cache(str(tmp_path / "cache"), 10 * SIZE)
    Store.faults += [flipped]
    assert right(local.open(url, size, sha256), sha256)
    assert reads(url) == 2 * BLOCKS
    damaged, _, other = remote(tmp_path / "store", 1)
    path = tmp_path / "store" / "1.tar"
    for data, says in ((flipped(path.read_bytes()), "has 10000 bytes"), (path.read_bytes()[:-1], "has 9999 bytes")):
        path.write_bytes(data)
        with pytest.raises(Failure, match=rf"{damaged}: {says}.*index says 10000.*{other}.*dataset verify"):
            local.open(damaged, size, other)
    with pytest.raises(Failure, match=r"has 9999 bytes.*index says 10000"):
        local.open(damaged, size, hashlib.sha256(path.read_bytes()).hexdigest())
    path.unlink()
    with pytest.raises(Failure, match=rf"{damaged}: is missing.*dataset verify"):
        local.open(damaged, size, other)
    with pytest.raises(Failure, match=rf"{damaged}: its index says '../x' where"):
        local.open(damaged, size, "../x")
    assert names(tmp_path / "cache") == {sha256}


def test_an_entry_of_another_size_is_fetched_anew(tmp_path: Path) -> None:
    url, size, sha256 = remote(tmp_path / "store")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / sha256).write_bytes(b"debris")
    assert right(Cache(str(tmp_path / "cache"), 10 * SIZE).open(url, size, sha256), sha256)


def test_faults_of_the_store_pass_or_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    url, size, sha256 = remote(tmp_path / "store")
    local = Cache(str(tmp_path / "cache"), 10 * SIZE)
    Store.faults += [refused] * 3
    assert right(local.open(url, size, sha256), sha256)
    other = remote(tmp_path / "store", 1)
    Store.faults += [refused] * 5
    with pytest.raises(Failure, match=rf"{other[0]}: cannot be read: 503 .*gave up after 5.*dataset verify"):
        local.open(*other)

    def forbidden(data: bytes) -> NoReturn:
        raise PermissionError("AccessDenied")

    Store.faults += [forbidden]
    with pytest.raises(Failure, match=rf"{other[0]}: AccessDenied"):
        local.open(*other)
    assert names(tmp_path / "cache") == {sha256}


def test_a_file_larger_than_the_cap_is_left_to_the_store_and_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = remote(tmp_path / "store")
    local = Cache(str(tmp_path / "cache"), SIZE - 1)
    assert local.open(*one) is None and Cache(str(tmp_path / "cache"), SIZE - 1).open(*one) is None
    assert reads(one[0]) == 0
    said = capfd.readouterr().err
    assert said.startswith(f"warning: cache {tmp_path / 'cache'}: no room for a file of {SIZE} bytes (its cap is")
    assert said.endswith("; reading from the store instead\n") and said.count("\n") == 1


def test_where_the_fetches_under_way_fill_the_cap_nothing_is_evicted(tmp_path: Path) -> None:
    entry, slow, third = (remote(tmp_path / "store", seed) for seed in range(3))
    local = Cache(str(tmp_path / "cache"), 2 * SIZE)
    assert right(local.open(*entry), entry[2])
    begun, go_on = threading.Event(), threading.Event()

    def wait(data: bytes) -> bytes:
        begun.set()
        assert go_on.wait(30)
        return data

    Store.faults += [wait]
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(local.open, *slow)
        assert begun.wait(30)
        assert Cache(str(local.folder), 2 * SIZE - 1).open(*third) is None
        assert entry[2] in names(tmp_path / "cache")
        go_on.set()
        assert right(fetching.result(), slow[2])


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_on_a_full_disk_older_entries_make_room_and_then_the_store_is_read(
    tmp_path: Path, tiny_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [remote(tmp_path / "store", seed) for seed in range(4)]
    local = Cache(str(tiny_disk / "cache"), 100 * SIZE)
    for file in files:
        assert right(local.open(*file), file[2])
        time.sleep(0.02)
    kept = names(tiny_disk / "cache")
    assert files[3][2] in kept and files[0][2] not in kept
    assert not capfd.readouterr().err
    shutil.rmtree(tiny_disk / "cache")
    with contextlib.suppress(OSError), (tiny_disk / "foreign").open("wb", buffering=0) as foreign:
        while True:
            foreign.write(bytes(4096))
    for file in files:
        assert local.open(*file) is None
    said = capfd.readouterr().err
    assert "no room for a file of 10000 bytes (No space left on device)" in said and said.count("\n") == 1
    assert names(tiny_disk / "cache") == set()


def test_a_disk_that_fills_while_writing_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [remote(tmp_path / "store", seed) for seed in range(3)]
    local = Cache(str(tmp_path / "cache"), 100 * SIZE)
    for file in files[:2]:
        assert right(local.open(*file), file[2])
        time.sleep(0.02)
    errors = [errno.EDQUOT]
    fsync = os.fsync

    def full(handle: int) -> None:
        if errors:
            raise OSError(errors.pop(), "Quota exceeded")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert right(local.open(*files[2]), files[2][2])
    assert names(tmp_path / "cache") == {files[1][2], files[2][2]}


def test_a_folder_deleted_while_a_file_is_fetched_is_made_anew(tmp_path: Path) -> None:
    url, size, sha256 = remote(tmp_path / "store")

    def clear(data: bytes) -> bytes:
        shutil.rmtree(tmp_path / "cache")
        return data

    Store.faults += [clear]
    local = Cache(str(tmp_path / "cache"), 10 * SIZE)
    assert right(local.open(url, size, sha256), sha256)
    assert names(tmp_path / "cache") == {sha256}


def test_a_folder_that_cannot_be_written_is_one_line_with_the_way_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, says in (("file", "Not a directory"), ("file/cache", "Not a directory"), ("/proc/cache", "No such")):
        with pytest.raises(Failure, match=rf"{folder}: {says}.*choose a `cache` folder"):
            Cache(str(tmp_path / folder), SIZE).open(*remote(tmp_path / "store"))
