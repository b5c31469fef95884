import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "out", "__pycache__", "*.egg-info")
IMPORT_ALL = """
import importlib, pkgutil, sys
from importlib import resources
from pathlib import Path
import fxcompress
here = Path(sys.argv[1])
names = [m.name for m in pkgutil.walk_packages(fxcompress.__path__, "fxcompress.")]
assert {"fxcompress.passes.quant", "fxcompress.backends.onnx"} <= set(names), names
for name in names:
    file = Path(importlib.import_module(name).__file__)
    assert file.is_relative_to(here), f"{name} comes from {file}"
assert (resources.files("fxcompress.recipes") / "int4-weight-only.yaml").is_file()
assert {"app.js", "dagre.min.js", "dagre.LICENSE.txt"} <= {f.name for f in (resources.files("fxcompress.diff") / "viewer").iterdir()}
"""


def run(*command: object, cwd: Path, **env: str) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources(folder: str) -> set[str]:
    return {f"fxcompress/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building leaves files beside the sources."""
    place = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, place / "source", symlinks=True, ignore=LEFT_OUT)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place / "built", "./source", cwd=place)
    return next((place / "built").glob("fxcompress-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_real_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    recipes = {str(p.relative_to(ROOT)) for p in (ROOT / "fxcompress/recipes").glob("*.yaml")}
    assert recipes
    assert recipes | sources("passes") | sources("backends") | {"fxcompress/py.typed"} <= set(entries)
    assert {name.partition("/")[0] for name in entries} == {"fxcompress", f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"}
    assert all(info.external_attr >> 28 != 0xA for info in entries.values()), "a symbolic link in the wheel"


@pytest.mark.slow
def test_the_installed_wheel_imports_from_any_folder(wheel, tmp_path):
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    run(sys.executable, "-c", IMPORT_ALL, target, cwd=tmp_path, PYTHONPATH=str(target))
