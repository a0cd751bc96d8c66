"""The installed longtake as a wheel without dependencies, for machines that have the dependencies but not this code.

It contains the files that this process would import, so that an editable install ships its current state. The same code
gives the same bytes. The version is `0.1.0+` and a digest of the files.
"""

import base64
import hashlib
import importlib
import importlib.metadata
import zipfile
from pathlib import Path

_PACKAGES = ("datasets", "infra", "pipeline", "training")
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest time in a zip archive
_COMPILED = (".pyc", ".pyo", ".so", ".pyd")


def build(folder: Path) -> Path:
    """Write the wheel into a folder; returns its path, whose name changes with the code."""
    files = _files()
    base = importlib.metadata.version("longtake").partition("+")[0]
    version = f"{base}+{_digest(files)[:12]}"
    info = f"longtake-{version}.dist-info"
    files |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: longtake\nVersion: {version}\nRequires-Python: >=3.11\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: longtake\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": b"[console_scripts]\nlongtake = longtake.infra.cli:main\n",
    }
    record = [f"{name},sha256={_sha256(data)},{len(data)}\n" for name, data in sorted(files.items())]
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    path = folder / f"longtake-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            archive.writestr(entry, data)
    return path


def _files() -> dict[str, bytes]:
    """The bytes of each file below `longtake`, code and data, by its name in the wheel."""
    files = {}
    top = importlib.import_module("longtake")
    if top.__file__:
        # the top package alone: its folder may be that of the whole source
        files = {f"longtake/{path.name}": path.read_bytes() for path in Path(top.__file__).parent.glob("*.py")}
    for name in _PACKAGES:
        (root,) = importlib.import_module(f"longtake.{name}").__path__
        for path in sorted(Path(root).rglob("*")):
            inside = path.relative_to(root)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
            if path.is_file() and not hidden and path.suffix not in _COMPILED:
                files[f"longtake/{name}/{inside.as_posix()}"] = path.read_bytes()
    return files


def _digest(files: dict[str, bytes]) -> str:
    lines = [f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
