"""Every notebook as a reader meets it: the wheel alone, a folder with nothing but nbs/, a real kernel (make wheelnbs).

An error fails, so does a cell that takes more than ten minutes (with the stacks of the kernel, where py-spy is installed), and an output
that says a table or picture is missing.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from test_wheel import call, wheel  # noqa: F401  (a fixture)
from tree import NBS, ROOT, clean_env, notebooks

pytestmark = [pytest.mark.slow, pytest.mark.wheel]
LIMIT = 600   # seconds per cell
MISSING = re.compile(r"no stored table|no table (?!ships, \d+ rows)|not at hand|makes it|FileNotFoundError|StoreError: no|NaN images")


@pytest.fixture(scope="module")
def reader(wheel, tmp_path_factory):  # noqa: F811
    "A reader's machine: an environment with the wheel, its course extra and a kernel; and a folder with the notebooks alone."
    home = tmp_path_factory.mktemp("reader")
    call(sys.executable, "-m", "venv", home/"v", cwd=home)
    python = home/"v/bin/python"
    call(python, "-m", "pip", "install", "-q", f"{wheel}[course]", "ipykernel", "-c", ROOT/"constraints.txt", cwd=home)
    call(python, "-m", "ipykernel", "install", "--prefix", home/"v", "--name", "reader", cwd=home)
    shutil.copytree(NBS, home/"nbs", ignore=shutil.ignore_patterns("_*", "*.yml", ".*"), symlinks=False)
    return home


def texts(nb):
    "All text that a notebook shows."
    for i, c in enumerate(nb["cells"]):
        for o in c.get("outputs", []):
            yield i, "".join(o.get("text", "")) + "".join("".join(v) for k, v in o.get("data", {}).items() if k.startswith("text"))


def missing(nb): return [f"cell {i}: {t[:200]}" for i, t in texts(nb) if MISSING.search(t)]


RUN = """
import sys, nbformat, os, subprocess
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError
path, limit = sys.argv[1], int(sys.argv[2])
nb = nbformat.read(path, 4)
c = NotebookClient(nb, timeout=limit, kernel_name='reader', resources=dict(metadata=dict(path=os.path.dirname(path))))
try: c.execute()
except CellTimeoutError:
    pid = str(c.km.provisioner.pid) if c.km else ''
    try: sys.stderr.write(subprocess.run(['py-spy', 'dump', '--pid', pid], capture_output=True, text=True).stdout)
    except OSError: pass
    raise
finally: nbformat.write(nb, path)
"""


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [p.name for p in notebooks()])
def test_a_reader_runs_it(name, reader, record):
    start, path = time.perf_counter(), reader/"nbs"/name
    env = clean_env(JUPYTER_PATH=str(reader/"v/share/jupyter"), OMP_NUM_THREADS="1")
    env.pop("MPLBACKEND", None)
    r = subprocess.run([sys.executable, "-c", RUN, str(path), str(LIMIT)], env=env, cwd=reader/"nbs", capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-4000:]
    assert not missing(json.loads(path.read_text()))
    record(f"{name} in a real kernel", f"{time.perf_counter() - start:.0f} s")


def test_a_missing_table_is_seen():
    said = dict(cells=[dict(outputs=[dict(text="no stored table: `make x` makes it")]), dict(outputs=[dict(data={"text/plain": "fine"})])])
    assert missing(said) == ["cell 0: no stored table: `make x` makes it"]


def test_the_reader_has_no_clone(reader):
    code = "import rulediff_nb, sys; sys.stdout.write(rulediff_nb.__file__)"
    said = call(reader/"v/bin/python", "-c", code, cwd=reader/"nbs")
    assert str(ROOT) not in said and str(reader) in said and not os.path.exists(reader/"results")
