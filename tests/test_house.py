"""The layout that everything else relies on."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_packaged() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    top = ("datasets", "pipeline", "training", "infra")
    folders = {p.parent for name in top for p in (ROOT / name).rglob("*.py") if "__pycache__" not in p.parts}
    packages = {"longtake." + ".".join(f.relative_to(ROOT).parts) for f in folders}
    # the package `longtake` itself; and what runs inside Airflow
    assert listed == packages - {"longtake.infra.public", "longtake.infra.dags"} | {"longtake"}


# another package may have such a name, as Hugging Face's `datasets` has
OURS = f"""
from importlib.util import find_spec
from pathlib import Path
names = [n for n in ('datasets', 'pipeline', 'training', 'infra') if find_spec(n)]
print([n for n in names if Path({str(ROOT)!r}) / n in Path(find_spec(n).origin or '/').parents])
"""


def test_the_folders_at_the_top_are_no_top_level_packages(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", OURS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ray_workers_do_not_find_them_either(ray_session: None) -> None:
    import ray

    @ray.remote(num_cpus=1)
    def found() -> str:
        import contextlib
        import io

        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(OURS, {})
        return out.getvalue().strip()

    assert ray.get(found.remote()) == "[]"


def test_no_module_imports_what_imports_it() -> None:
    script = (
        "import graphlib, grimp\n"
        "graph = grimp.build_graph('longtake.datasets', 'longtake.infra', 'longtake.pipeline', 'longtake.training')\n"
        "graphlib.TopologicalSorter({m: graph.find_modules_directly_imported_by(m) for m in graph.modules}).prepare()"
    )
    environment = os.environ | {"PYTHONPATH": ".typing"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_installs_longtake_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} - {n.split("/")[0] for n in names if ".dist-info" in n} == {"longtake"}
    files = {"longtake/__init__.py", "longtake/infra/recipes/quickstart.yaml", "longtake/infra/report/page.html"}
    assert files <= set(names)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    script = (
        "import importlib.util as u, longtake.datasets, longtake.training, longtake.pipeline, longtake.infra\n"
        "assert longtake.load and longtake.__version__\n"
        "assert not [n for n in ('datasets','pipeline','training','infra','tests') if u.find_spec(n)]"
    )
    subprocess.run([python, "-c", script], cwd=tmp_path, check=True)
