"The wheel works in an empty environment: no nbdev, no jupyter, no repository."
import os
import subprocess
import sys
import time
import zipfile

import pytest
from tree import LIB, NAME, ROOT, clean_env, copy_to

pytestmark = pytest.mark.wheel
LIMIT = 49*10**6   # 48.4 MB since the tables travel along; to come down to 48 when the weights are remade
DEMO = ["demo", "--n", "16", "--steps", "2", "--out", "out"]


def call(*args, cwd, env=None):
    r = subprocess.run([str(a) for a in args], cwd=cwd, env=env or clean_env(), capture_output=True, text=True, timeout=540)
    assert r.returncode == 0, f"{args}\n{r.stdout[-2000:]}\n{r.stderr[-2000:]}"
    return r.stdout


def unwanted(names):
    "Files that a wheel of this package must not hold."
    return [n for n in names if not n.startswith((f"{NAME}/", f"{NAME}-")) or "__pycache__" in n or n.endswith((".ipynb", ".pt"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel made from the sdist made from a copy of the tree."
    tmp = tmp_path_factory.mktemp("wheel")
    src = copy_to(tmp/"src")
    if not (src/"README.md").exists(): (src/"README.md").write_text("not written yet")
    call(sys.executable, "-m", "build", "--outdir", tmp/"dist", src, cwd=tmp)
    return next((tmp/"dist").glob("*.whl"))


@pytest.fixture(scope="module")
def empty(wheel, tmp_path_factory, record):
    "The bin folder of a new environment that has the wheel and its run-time dependencies."
    env, start = tmp_path_factory.mktemp("empty"), time.perf_counter()
    call(sys.executable, "-m", "venv", env/"v", cwd=env)
    call(env/"v/bin/python", "-m", "pip", "install", "-q", wheel, "-c", ROOT/"constraints.txt", cwd=env)
    record("wheel and run-time dependencies installed", f"{time.perf_counter() - start:.0f} s")
    return env/"v/bin"


def test_contents(wheel, record):
    names = zipfile.ZipFile(wheel).namelist()
    mine = {f"{NAME}/{p.relative_to(LIB).as_posix()}" for p in LIB.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert mine <= set(names), sorted(mine - set(names))
    assert not unwanted(names) and f"{NAME}/py.typed" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    record("wheel", f"{wheel.stat().st_size/2**20:.1f} MiB")
    assert wheel.stat().st_size <= LIMIT


def test_unwanted_files_are_seen():
    assert unwanted(["tests/x.py", "rulediff_nb/a.ipynb", "rulediff_nb/core.py"]) == ["tests/x.py", "rulediff_nb/a.ipynb"]


def test_nothing_of_the_workshop_is_needed(empty, tmp_path):
    code = f"""
import importlib.util as u, {NAME}
gone = [m for m in ('nbdev', 'jupyterlab', 'nbconvert', 'pytest', 'ray', 'ruff') if u.find_spec(m)]
assert not gone, gone
assert {str(ROOT)!r} not in {NAME}.__file__, {NAME}.__file__
"""
    call(empty/"python", "-c", code, cwd=tmp_path)


@pytest.mark.skipif(not (LIB/"all.py").exists(), reason="rulediff_nb/all.py is not written yet")
def test_the_package_imports(empty, tmp_path):
    call(empty/"python", "-c", f"from {NAME}.all import *; SunShadow().sample(2, seed=0)", cwd=tmp_path)


@pytest.mark.skipif(not (LIB/"weights").exists(), reason="no weights yet")
def test_weights_come_along(empty, tmp_path):
    code = f"from pathlib import Path; import {NAME}; print(*sorted(p.name for p in (Path({NAME}.__file__).parent/'weights').rglob('*.*')))"
    assert call(empty/"python", "-c", code, cwd=tmp_path).split() == sorted(p.name for p in (LIB/"weights").rglob("*.*"))


@pytest.mark.skipif(not (LIB/"cli.py").exists(), reason="rulediff_nb/cli.py is not written yet")
class TestCommand:
    def test_doctor(self, empty, tmp_path): assert "torch" in call(empty/"rulediff", "doctor", cwd=tmp_path)

    def test_demo(self, empty, tmp_path, record):
        start = time.perf_counter()
        said = call(empty/"rulediff", *DEMO, cwd=tmp_path)
        record("rulediff " + " ".join(DEMO), f"{time.perf_counter() - start:.0f} s")
        assert "rule_gap" in said and [f for f in os.listdir(tmp_path/"out") if f.endswith(".png")]
