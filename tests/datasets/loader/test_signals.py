"""Signals: the loader's workers outlive those to their whole group, from their first moment, and end with a killed process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

SCRIPT = """
import signal, sys
from longtake.datasets.loader import Loader

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    print("begin", flush=True)
    for batch in Loader(sys.argv[1], frames=9, size=(32, 32), batch=4, epochs=2, workers=2):
        print(*batch["key"], flush=True)
    open(sys.argv[2], "w").close()
    sys.stdin.read()
"""


def test_workers_outlive_signals_to_their_group_from_their_first_moment(dataset: str, tmp_path: Path) -> None:
    done = tmp_path / "done"
    command = [sys.executable, "-P", "-c", SCRIPT, dataset, str(done)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert process.stdout and process.stdout.readline() == "begin\n"
    deadline, children = time.monotonic() + 120, set[int]()
    while not done.exists() and process.poll() is None and time.monotonic() < deadline:
        children |= {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(process.pid, number)
        time.sleep(0.01)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 0 and len(out.split()) >= 8, err
    # the two workers, what they are forked from, and the tracker of shared resources
    assert len(children) >= 4


ENDLESS = """
import sys
from longtake.datasets.loader import Loader

if __name__ == "__main__":
    for batch in Loader(sys.argv[1], frames=9, size=(32, 32), batch=4, workers=2):
        print(*batch["key"], flush=True)
        sys.stdin.readline()
"""


def test_workers_and_their_server_end_with_a_process_that_is_killed(dataset: str) -> None:
    command = [sys.executable, "-P", "-c", ENDLESS, dataset]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 4
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    for child in alive:
        child.kill()
    assert not alive
