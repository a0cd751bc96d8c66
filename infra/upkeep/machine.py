"""Checks of this machine: versions, accelerators, memory, limits, disks. Each gives a line."""

import os
import resource
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

# minor versions that the tests of this longtake ran with
TESTED = {"python": "3.11", "ray": "2.60", "torch": "2.13", "deepspeed": "0.19", "mlflow": "3.17"}

# [assumption] what a run needs; FULL alone is a fact: a fuller disk gets no objects from Ray
LEAST_DISK = 5 << 30  # bytes
LEAST_INODES = 100_000
FULL = 0.95  # share of a disk that may be in use
LEAST_MEMORY = 4 << 30  # bytes
LEAST_FILES = 8192  # open files of a process
SHARED_SHARE = 0.3  # of the memory, in /dev/shm: where Ray keeps its objects by default

Level = Literal["ok", "warn", "fail"]


class Line(NamedTuple):
    """The result of a check; `fix` is empty where all is well."""

    level: Level
    check: str
    says: str
    fix: str = ""


def versions(tested: dict[str, str] = TESTED) -> Iterator[Line]:
    """Installed versions against those that the package requires, and those that it was tested with."""
    from packaging.requirements import Requirement

    # what the package requires
    broken = set[str]()
    for text in requires("longtake") or []:
        required = Requirement(text)
        name, marker = required.name, str(required.marker or "")
        if name in {"longtake", *broken} or ("extra" in marker and "dev" in marker):
            continue
        try:
            installed = version(name)
        except PackageNotFoundError:
            broken.add(name)
            yield Line("warn", f"version of {name}", "is not installed", 'pip install "longtake[all]"')
            continue
        if not required.specifier.contains(installed, prereleases=True):
            broken.add(name)
            wants = f"{name}{required.specifier}"
            yield Line("fail", f"version of {name}", f"{installed}; longtake needs {wants}", f'pip install "{wants}"')

    # what it was tested with
    same = []
    for name, minor in tested.items():
        if name in broken:
            continue
        installed = ".".join(map(str, sys.version_info[:3])) if name == "python" else version(name)
        if installed.split("+")[0].split(".")[:2] == minor.split("."):
            same.append(f"{name} {installed}")
        else:
            fix = f"use Python {minor}" if name == "python" else f'if anything is odd, pip install "{name}=={minor}.*"'
            yield Line("warn", f"version of {name}", f"{installed}; tested with {minor}", fix)
    if same:
        yield Line("ok", "versions", ", ".join(same))


def accelerators() -> Iterator[Line]:
    """Each CUDA device with its memory and the result of a product; the version of NCCL."""
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver and torch.version.cuda is None:
            says = "a GPU's driver is here, but torch is built for CPUs"
            yield Line("fail", "accelerators", says, "install torch for CUDA")
        elif driver:
            fix = "look at nvidia-smi: the driver must be at least as new as that CUDA"
            yield Line("fail", "accelerators", f"torch for CUDA {torch.version.cuda} finds no GPU", fix)
        else:
            yield Line("ok", "accelerators", "none; stages run on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(number)
            ones = torch.ones(64, 64, device=f"cuda:{number}")
            correct = (ones @ ones).sum().item() == 64**3
        except RuntimeError as e:
            fix = "reset or reboot, or hide it by CUDA_VISIBLE_DEVICES"
            yield Line("fail", f"GPU {number}", str(e).splitlines()[0], fix)
            continue
        says = f"{torch.cuda.get_device_name(number)}, {gb(free)} of {gb(total)} free"
        if not correct:
            yield Line("fail", f"GPU {number}", f"{says}: computes wrongly", "take it out of service")
        elif free < total / 2:
            yield Line("warn", f"GPU {number}", says, "another process uses it: see nvidia-smi")
        else:
            yield Line("ok", f"GPU {number}", says)
    if torch.distributed.is_nccl_available():
        yield Line("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Line("warn", "NCCL", "this torch has none", "install torch for CUDA to train on several GPUs")


def shared_memory(folder: str = "/dev/shm") -> Iterator[Line]:  # noqa: S108
    if not Path(folder).is_dir():
        yield Line("warn", folder, "is not there", "Ray keeps its objects on the disk then, slowly")
        return
    total, needed = shutil.disk_usage(folder).total, SHARED_SHARE * bytes_of_memory()[0]
    if total < needed:
        fix = f"docker run --shm-size={needed / 1e9:.0f}g, or on Kubernetes an emptyDir with medium: Memory"
        yield Line("warn", folder, f"{gb(total)}, less than {SHARED_SHARE:.0%} of the memory", fix)
    else:
        yield Line("ok", folder, gb(total))


def memory() -> Iterator[Line]:
    total, free = bytes_of_memory()
    says = f"{gb(free)} of {gb(total)} free"
    if free < LEAST_MEMORY:
        yield Line("warn", "memory", says, f"end other processes: {gb(LEAST_MEMORY)} are little")
    else:
        yield Line("ok", "memory", says)


def bytes_of_memory() -> tuple[float, float]:
    """Total and free bytes of this machine, or of this container, whose limit psutil does not read."""
    memory = psutil.virtual_memory()
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and (text := limit.read_text().strip()).isdigit() and int(text) < memory.total:
        # cached pages of files count as used, though the kernel gives them back
        return float(text), max(0.0, min(memory.available, int(text) - int(used.read_text())))
    return float(memory.total), float(memory.available)


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
        path = existing_parent(Path(folder))
        space, inodes = shutil.disk_usage(path), os.statvfs(path)
        says = f"{gb(space.free)} of {gb(space.total)} free"
        # some file systems, such as btrfs, count no inodes
        few = inodes.f_files > 0 and inodes.f_favail < LEAST_INODES
        if not os.access(path, os.W_OK):
            fix = "give write permission, or choose another folder"
            yield Line("fail", f"disk of {folder}", "cannot be written", fix)
        elif space.free < space.total * (1 - FULL):
            yield Line("fail", f"disk of {folder}", says, f"free some space: over {FULL:.0%} Ray stops to spill there")
        elif space.free < LEAST_DISK:
            yield Line("warn", f"disk of {folder}", says, "free some space, see `longtake clean` and `longtake plan`")
        elif few:
            yield Line("warn", f"disk of {folder}", f"{inodes.f_favail} inodes free", "delete small files")
        else:
            yield Line("ok", f"disk of {folder}", says)


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
