"""What this machine is fit for: versions, accelerators, memory, limits, disks; one line a check."""

import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

# minor versions that the tests of this longtake ran with
TESTED = {"python": "3.11", "ray": "2.60", "torch": "2.13", "deepspeed": "0.19", "mlflow": "3.17"}

# [A] all of these are assumptions of what a run needs; only the 95 % are a fact: from there on Ray refuses to spill to a disk
LEAST_DISK = 5 << 30  # bytes
LEAST_INODES = 100_000
FULL = 0.95  # share of a disk that may be in use
LEAST_MEMORY = 4 << 30  # bytes
LEAST_FILES = 8192  # that a process may open
SHARED_SHARE = 0.3  # of the memory: /dev/shm, where Ray keeps its objects by default


Level = Literal["ok", "warn", "fail"]


class Line(NamedTuple):
    """What a check has found; `fix` is empty where all is well."""

    level: Level
    check: str
    says: str
    fix: str = ""


def versions(tested: dict[str, str] = TESTED) -> Iterator[Line]:
    """Against what the package requires, and against what it was tested with."""
    from packaging.requirements import Requirement

    broken = set()
    for text in requires("longtake") or []:
        asked = Requirement(text)
        extra = asked.marker is not None and "extra" in str(asked.marker)
        if asked.name == "longtake" or (extra and "dev" in str(asked.marker)):
            continue
        try:
            found = version(asked.name)
        except PackageNotFoundError:
            if asked.name not in broken:
                yield Line("warn", f"version of {asked.name}", "is not installed", 'pip install "longtake[all]"')
            broken.add(asked.name)
            continue
        if not asked.specifier.contains(found, prereleases=True) and asked.name not in broken:
            broken.add(asked.name)
            wants = f"{asked.name}{asked.specifier}"
            yield Line("fail", f"version of {asked.name}", f"{found}; longtake needs {wants}", f'pip install "{wants}"')
    same = []
    for name, minor in tested.items():
        if name in broken:
            continue
        found = ".".join(map(str, sys.version_info[:3])) if name == "python" else version(name)
        if found.split("+")[0].split(".")[:2] == minor.split("."):
            same.append(f"{name} {found}")
        else:
            fix = f"use Python {minor}" if name == "python" else f'if anything is odd, pip install "{name}=={minor}.*"'
            yield Line("warn", f"version of {name}", f"{found}; tested with {minor}", fix)
    if same:
        yield Line("ok", "versions", ", ".join(same))


def accelerators() -> Iterator[Line]:
    """Each CUDA device with its memory, and whether it computes; NCCL."""
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver and torch.version.cuda is None:
            yield Line(
                "fail", "accelerators", "a GPU's driver is here, but torch is built for CPUs", "install torch for CUDA"
            )
        elif driver:
            fix = "look at nvidia-smi: the driver must be at least as new as that CUDA"
            yield Line("fail", "accelerators", f"torch for CUDA {torch.version.cuda} finds no GPU", fix)
        else:
            yield Line("ok", "accelerators", "none; stages run on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(number)
            one = torch.ones(64, 64, device=f"cuda:{number}")
            right = (one @ one).sum().item() == 64**3
        except RuntimeError as e:
            yield Line(
                "fail", f"GPU {number}", str(e).splitlines()[0], "reset or reboot, or hide it by CUDA_VISIBLE_DEVICES"
            )
            continue
        name = f"{torch.cuda.get_device_name(number)}, {gb(free)} of {gb(total)} free"
        if not right:
            yield Line("fail", f"GPU {number}", f"{name}: computes wrongly", "take it out of service")
        elif free < total / 2:
            yield Line("warn", f"GPU {number}", name, "another process uses it: see nvidia-smi")
        else:
            yield Line("ok", f"GPU {number}", name)
    if torch.distributed.is_nccl_available():
        yield Line("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Line("warn", "NCCL", "this torch has none", "install torch for CUDA to train on several GPUs")


def shared_memory(folder: str = "/dev/shm") -> Iterator[Line]:  # noqa: S108
    if not Path(folder).is_dir():
        yield Line("warn", folder, "is not there", "Ray keeps its objects on the disk then, slowly")
        return
    total, wanted = shutil.disk_usage(folder).total, SHARED_SHARE * bytes_of_memory()[0]
    if total < wanted:
        fix = f"docker run --shm-size={wanted / 1e9:.0f}g, or on Kubernetes an emptyDir with medium: Memory"
        yield Line("warn", folder, f"{gb(total)}, less than {SHARED_SHARE:.0%} of the memory", fix)
    else:
        yield Line("ok", folder, gb(total))


def memory() -> Iterator[Line]:
    total, free = bytes_of_memory()
    if free < LEAST_MEMORY:
        yield Line(
            "warn",
            "memory",
            f"{gb(free)} of {gb(total)} free",
            f"end other processes: {gb(LEAST_MEMORY)} are little",
        )
    else:
        yield Line("ok", "memory", f"{gb(free)} of {gb(total)} free")


def bytes_of_memory() -> tuple[float, float]:
    """Bytes in all and free, of the machine or of the container that this is."""
    told = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, free = int(told["MemTotal"]) * 1024.0, int(told["MemAvailable"]) * 1024.0
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and (most := limit.read_text().strip()).isdigit() and int(most) < total:
        # pages of files count as used, but are given back when they are wanted
        return float(most), max(0.0, min(free, int(most) - int(used.read_text())))
    return total, free


def open_files() -> Iterator[Line]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < LEAST_FILES:
        more = "" if hard >= LEAST_FILES else ", after raising the hard limit in /etc/security/limits.conf"
        yield Line("warn", "open files", f"at most {soft}", f"ulimit -n 65536{more}")
    else:
        yield Line("ok", "open files", f"at most {soft}")


def disks(folders: list[str]) -> Iterator[Line]:
    """Free bytes and inodes where the folders are, or will be."""
    for folder in folders:
        there = Path(folder)
        while not there.exists():
            there = there.parent
        space, inodes = shutil.disk_usage(there), os.statvfs(there)
        says = f"{gb(space.free)} of {gb(space.total)} free"
        # btrfs and the like have no count of inodes
        few = inodes.f_files > 0 and inodes.f_favail < LEAST_INODES
        if not os.access(there, os.W_OK):
            yield Line(
                "fail", f"disk of {folder}", "cannot be written", "give write permission, or choose another folder"
            )
        elif space.free < space.total * (1 - FULL):
            yield Line("fail", f"disk of {folder}", says, f"free some space: over {FULL:.0%} Ray stops to spill there")
        elif space.free < LEAST_DISK:
            yield Line("warn", f"disk of {folder}", says, "free some space, see `longtake clean` and `longtake plan`")
        elif few:
            yield Line("warn", f"disk of {folder}", f"{inodes.f_favail} inodes free", "delete small files")
        else:
            yield Line("ok", f"disk of {folder}", says)


def gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
