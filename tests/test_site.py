"""What can be checked of the site without quarto: nbdev's own processing of every notebook, for which it runs the exported cells
and the cells with imports. Rendering, links and search are left to the docs workflow."""
import json
import shutil
import subprocess
import sys
import time

import pytest
from tree import NAME, NBS, ROOT, clean_env, notebooks, owner, source


def process(dest, paths):
    "Process copies of the notebooks under `dest`; returns nbdev's exit code, what it said, and the processed notebooks."
    (dest/"nbs").mkdir()
    shutil.copy(ROOT/"pyproject.toml", dest)
    shutil.copytree(ROOT/NAME, dest/NAME, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    for p in [*paths, ROOT/"_quarto.yml"]: shutil.copy(p, dest/"nbs")
    run = "from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)"
    r = subprocess.run([sys.executable, "-c", run], cwd=dest, env=clean_env(), capture_output=True, text=True)
    return r.returncode, r.stdout + r.stderr, {p.name: json.loads(p.read_text()) for p in (dest/"_proc").glob("*.ipynb")}


def test_every_notebook_can_be_processed(tmp_path, record):
    start = time.perf_counter()
    code, said, made = process(tmp_path, notebooks())
    assert code == 0, said[-3000:]
    assert set(made) == {p.name for p in notebooks()}
    record("notebooks processed for the site", f"{time.perf_counter() - start:.0f} s")
    for name, nb in made.items():
        text = "\n".join(map(source, nb["cells"]))
        assert "#| export" not in text, name
        if name != "index.ipynb": assert "colab-badge.svg" in text, f"{name}: the badge is lost"


@pytest.mark.parametrize("cell", ["import math\nlost + math.pi", "#| export\n1/0"])
def test_a_cell_that_fails_there_is_seen(tmp_path, cell):
    nb = json.loads((NBS/"00_core.ipynb").read_text())
    nb["cells"][5:] = [dict(cell_type="code", id="a1", metadata={}, outputs=[], execution_count=None, source=cell),
                       dict(cell_type="code", id="a2", metadata={}, outputs=[], execution_count=None, source="#| export\ndef f(): 'd'")]
    (tmp_path/"00_core.ipynb").write_text(json.dumps(nb))
    code, said, _ = process(tmp_path, [tmp_path/"00_core.ipynb"])
    assert code and "Error" in said


def test_nbdev_yml_agrees():
    text = (NBS/"nbdev.yml").read_text()
    assert f'repo-url: "https://github.com/{owner()}/{NAME}"' in text and f'site-url: "https://{owner()}.github.io/{NAME}"' in text
