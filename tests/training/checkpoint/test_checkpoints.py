"""Checkpoints survive kills, failing stores and hostile ones, and say what they belong to."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import small

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.training import checkpoint
from longtake.training.checkpoint import upload as copies


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing store is asked again at once."""
    retrying = storage.retrying
    monkeypatch.setattr(storage, "retrying", lambda what, action: retrying(what, action, 2, 0.0))


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))


def test_the_latest_stay_and_those_at_the_interval(tmp_path: Path, group: None) -> None:
    small.fit(tmp_path, steps=9, checkpoint_every=1, keep_checkpoints=2, keep_every=4)
    assert steps(tmp_path) == [4, 8, 9] and not list(tmp_path.glob(".*"))


def test_what_a_kill_has_left_goes(tmp_path: Path, group: None) -> None:
    small.fit(tmp_path)
    (tmp_path / ".step-00000004.tmp").mkdir()
    (tmp_path / "step-00000001").mkdir()
    small.fit(tmp_path, steps=9)
    assert steps(tmp_path) == [6, 9] and not list(tmp_path.glob(".*"))


def test_an_older_step_can_be_chosen_by_hand(tmp_path: Path, group: None) -> None:
    straight = small.fit(tmp_path)
    (tmp_path / "step-00000006" / "meta.json").write_text("{")
    with pytest.raises(Failure, match="write an older step's name into") as caught:
        small.fit(tmp_path)
    assert str(tmp_path / "latest") in str(caught.value)
    (tmp_path / "latest").write_text("step-00000003\n")
    assert small.same(straight, small.fit(tmp_path))


@pytest.mark.parametrize("name", ["meta.json", "weights-00000.safetensors", "generator/mp_rank_00_model_states.pt"])
def test_a_damaged_file_is_named(tmp_path: Path, group: None, name: str) -> None:
    small.fit(tmp_path, ema_half_lives=[2])
    path = tmp_path / "step-00000006" / name
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"\x00" * len(whole), b""):
        path.write_bytes(broken)
        with pytest.raises(Failure, match="step-00000006: damaged checkpoint"):
            small.fit(tmp_path, steps=7, ema_half_lives=[2])
    path.unlink()
    with pytest.raises(Failure, match="step-00000006: damaged checkpoint"):
        small.fit(tmp_path, steps=7, ema_half_lives=[2])


def test_a_checkpoint_of_other_settings_is_refused_and_the_keys_are_named(tmp_path: Path, group: None) -> None:
    small.fit(tmp_path)
    with pytest.raises(UserError) as caught:
        small.fit(tmp_path, lr=2e-2, weight_decay=0.1)
    assert "belongs to other settings (lr: 0.01 there, 0.02 here, weight_decay: 0.01 there, 0.1 here)" in str(
        caught.value
    )
    with pytest.raises(UserError, match="ema_half_lives"):
        small.fit(tmp_path, ema_half_lives=[3])
    small.fit(tmp_path, steps=7, log_every=5)


def test_fewer_steps_than_a_checkpoint_has_are_refused(tmp_path: Path, group: None) -> None:
    small.fit(tmp_path)
    with pytest.raises(UserError, match=r"step-00000006: has more steps than steps: 5; raise that, or begin anew"):
        small.fit(tmp_path, steps=5)


def test_a_checkpoint_of_another_dataset_is_refused(tmp_path: Path, group: None) -> None:
    small.fit(tmp_path)
    with pytest.raises(UserError, match=r"step-00000006: .*belongs to another dataset"):
        small.fit(tmp_path, stream=small.Rows(data="others"), steps=7)


@pytest.fixture
def store(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A URL that nothing is at."""
    return f"memory://{uuid.uuid4()}/copies" if request.param == "memory" else str(tmp_path / "far" / "copies")


@pytest.mark.parametrize("store", ["memory", "folder"], indirect=True)
def test_an_empty_machine_goes_on_from_the_copy(tmp_path: Path, group: None, store: str) -> None:
    settings = {"ema_half_lives": [2], "zero_stage": 1}
    small.fit(
        tmp_path / "a", upload=store, steps=4, checkpoint_every=1, keep_checkpoints=2, keep_every=1000, **settings
    )
    # a copy is left out where the one before is still under way, but not the last
    assert {"latest", "step-00000004"} <= {*storage.names(store)} <= {"latest", "step-00000003", "step-00000004"}
    resumed = small.fit(tmp_path / "b", upload=store, **settings)
    assert small.same(resumed, small.fit(tmp_path / "straight", **settings))
    assert storage.read(storage.join(store, "latest")) == b"step-00000006"


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_an_empty_machine_leaves_what_is_kept_for_good_in_the_store(tmp_path: Path, group: None, store: str) -> None:
    for folder, steps in (("a", 4), ("b", 7)):
        small.fit(tmp_path / folder, upload=store, steps=steps, checkpoint_every=1, keep_checkpoints=1, keep_every=2)
    # likewise
    assert {"step-00000004", "step-00000007"} <= {*storage.names(store)}
    names = [name for name in storage.names(store) if name != "latest"]
    assert all(name == "step-00000007" or int(name[-1]) % 2 == 0 for name in names)


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_a_copy_that_is_not_whole_is_not_taken(tmp_path: Path, group: None, store: str) -> None:
    small.fit(tmp_path / "a", upload=store, steps=2, checkpoint_every=2)
    (Path(store) / "step-00000002" / "meta.json").unlink()
    (tmp_path / "b").mkdir()
    with pytest.raises(Failure, match=r"step-00000002: is no whole checkpoint; write an older one's name"):
        copies.fetch(tmp_path / "b", store)
    assert not (tmp_path / "b" / "latest").exists()


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_a_store_that_fails_in_a_way_of_its_own_is_one_line(
    tmp_path: Path, group: None, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.fit(tmp_path / "a", upload=store)

    def lost(*_: Any, **__: Any) -> None:
        raise LookupError("none of botocore's errors is an OSError")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "find", lost)
    (tmp_path / "b").mkdir()
    with pytest.raises(Failure, match=r"could not be fetched .none of botocore's errors"):
        copies.fetch(tmp_path / "b", store)


class Faulty:
    """A store that refuses every file for as long as `down`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.down = True
        put = fsspec.implementations.memory.MemoryFileSystem.put_file

        def put_file(fs: Any, *arguments: Any, **options: Any) -> None:
            if self.down:
                raise ConnectionError("the store is down")
            put(fs, *arguments, **options)

        monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "put_file", put_file)


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_a_store_that_fails_for_a_while_costs_a_warning(
    tmp_path: Path,
    group: None,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faulty, log = Faulty(monkeypatch), small.Log()
    log.log = lambda step, _: setattr(faulty, "down", step < 5)
    small.fit(tmp_path, upload=store, checkpoint_every=2, log=log)
    assert "step-00000002 could not be copied there" in capsys.readouterr().err
    assert storage.read(storage.join(store, "latest")) == b"step-00000006"


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_a_store_that_fails_to_the_end_fails_there_and_a_second_run_mends_it(
    tmp_path: Path, group: None, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = Faulty(monkeypatch)
    with pytest.raises(
        Failure, match=r"the last checkpoint could not be copied there .* is whole: run the same command"
    ):
        small.fit(tmp_path, upload=store)
    assert (tmp_path / "latest").read_text() == "step-00000006"
    faulty.down = False
    small.fit(tmp_path, upload=store)
    assert small.same(small.fit(tmp_path / "empty", upload=store), small.weights(tmp_path))


@pytest.mark.parametrize("store", ["memory"], indirect=True)
@pytest.mark.parametrize("name", ["../../evil", "/etc", "step-1/../../evil", ""])
def test_a_hostile_name_of_the_latest_is_refused(tmp_path: Path, group: None, store: str, name: str) -> None:
    storage.write(storage.join(store, "latest"), name.encode())
    with pytest.raises(Failure, match=r"could not be fetched .* is no checkpoint's name"):
        copies.fetch(tmp_path / "here", store)


def test_hostile_names_in_a_listing_do_not_leave_the_folder(
    tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid.uuid4()}"
    storage.write(storage.join(url, "latest"), b"step-00000001")
    storage.write(storage.join(url, "step-00000001", "meta.json"), b"{}")
    root = storage.filesystem(url)[1]
    memory = fsspec.implementations.memory.MemoryFileSystem
    monkeypatch.setattr(memory, "get_file", lambda fs, remote, local: Path(local).write_bytes(b"evil"))
    for listed in (
        f"{root}/step-00000001/../../../evil",
        f"{root}/step-00000001//evil",
        "../evil",
        f"{root}/step-00000001/",
    ):
        monkeypatch.setattr(memory, "find", lambda fs, path, listed=listed: [listed])
        folder = tmp_path / "deep" / "here"
        folder.mkdir(parents=True, exist_ok=True)
        with pytest.raises(Failure, match="leads out of the checkpoint"):
            copies.fetch(folder, url)
        assert not [p for p in tmp_path.rglob("*") if p.is_file()] and not Path("/evil").exists()


def test_a_folder_behind_a_link_can_be_fetched_into(tmp_path: Path, group: None) -> None:
    small.fit(tmp_path / "a", upload=str(tmp_path / "far"))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    copies.fetch(tmp_path / "link", str(tmp_path / "far"))
    assert small.same(small.weights(tmp_path / "link"), small.weights(tmp_path / "a"))


ENDLESS = """
import sys
sys.path.insert(0, sys.argv[1])
import small
from pathlib import Path
from longtake.training import engines
print("ready", flush=True)
with engines.process_group():
    small.fit(Path(sys.argv[2]), steps=300, checkpoint_every=1, ema_half_lives=[5], upload=sys.argv[3])
"""


def test_what_a_killed_process_was_writing_goes_with_the_next_training(tmp_path: Path, group: None) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".latest~{socket.gethostname()}@{dead.pid}~00000000.tmp").touch()
    (tmp_path / ".step-00000001.tmp").mkdir()
    small.fit(tmp_path)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.soak)])
def test_a_kill_at_any_moment_leaves_a_checkpoint_that_goes_on_exactly(tmp_path: Path, group: None, kills: int) -> None:
    settings = {"steps": 300, "checkpoint_every": 1, "ema_half_lives": [5]}
    folder, far, chance = tmp_path / "a", tmp_path / "far", random.Random(0)
    reached = [0]
    for _ in range(kills):
        command = [
            sys.executable,
            "-P",
            "-W",
            "ignore",
            "-c",
            ENDLESS,
            str(Path(small.__file__).parent),
            str(folder),
            str(far),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            before = (folder / "latest").read_text() if reached[-1] else ""
            while process.poll() is None and (
                not (folder / "latest").exists() or (folder / "latest").read_text() == before
            ):
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.3))
        finally:
            process.kill()
            process.wait()
        assert small.weights(folder, "5")
        reached.append(int((folder / "latest").read_text().removeprefix("step-")))
        if reached[-1] == 300:
            break
    assert reached == sorted(reached) and len(reached) > kills / 2
    last = reached[-1] + 3
    ended = small.fit(folder, **settings | {"steps": last})
    assert small.same(ended, small.fit(tmp_path / "straight", **settings | {"steps": last, "checkpoint_every": 1000}))
    assert not list(folder.glob(".*"))
    shutil.rmtree(folder)
    copies.fetch(folder, str(far))
    assert (
        json.loads((folder / storage.read(str(folder / "latest")).decode() / "meta.json").read_bytes())["step"] <= last
    )


@pytest.mark.parametrize("text", ["", "step-0000", "step-00000099", "../elsewhere"])
def test_a_latest_that_names_nothing_tells_which_step_is_whole(tmp_path: Path, text: str) -> None:
    for step in ("step-00000003", "step-00000006"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "meta.json").write_text("{}")
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "latest").write_text(text)
    with pytest.raises(Failure, match=r"names no checkpoint that is here .* write step-00000006 into it"):
        checkpoint.latest(tmp_path)


SLOW_STORE = """
import json, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from longtake.training import checkpoint
from longtake.training.checkpoint import resume, upload
folder = Path(json.loads(sys.stdin.readline())["folder"])
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=2))
began = []
for module, name in ((upload, "_download"), (upload, "_upload"), (resume, "_convert")):
    setattr(module, name, lambda *_, name=name: [began.append(name), time.sleep(3), ""][-1])
upload.fetch(folder / "empty", str(folder / "far"))
checkpoint.for_world(folder, ["generator"], 1)
with checkpoint.Checkpoints(folder, 1, upload=str(folder / "far")):
    pass
torch.distributed.barrier()
print(json.dumps({"began": began}), flush=True)
"""


def test_ranks_wait_for_copies_and_conversions_longer_than_for_each_other(tmp_path: Path, ranks: Any) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "meta.json").write_text('{"world": 3}')
    (tmp_path / "latest").write_text("step-00000001")
    assert ranks(2, SLOW_STORE).work(tmp_path) == [{"began": ["_download", "_convert", "_upload"]}, {"began": []}]
