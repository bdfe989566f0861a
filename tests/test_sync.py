"The modules in the repository are what the notebooks export now."
import shutil
import subprocess
import sys

import pytest
from tree import LIB, NAME, NBS, ROOT, clean_env


def export(dest, nbs=NBS):
    "Export a copy of the notebooks under `dest`; the hand-written files go along, generated ones do not."
    shutil.copy(ROOT/"pyproject.toml", dest)
    shutil.copytree(nbs, dest/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_quarto.yml"))
    (dest/NAME).mkdir()
    for f in ("__init__.py", "__main__.py", "all.py"):
        if (LIB/f).exists(): shutil.copy(LIB/f, dest/NAME)
    run = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", run], cwd=dest, env=clean_env(), check=True, timeout=120)
    return dest/NAME


def differing(a, b):
    "Names of the modules that are not byte for byte the same in both folders."
    names = {p.name for d in (a, b) for p in d.glob("*.py")}
    return sorted(n for n in names if not ((a/n).exists() and (b/n).exists() and (a/n).read_bytes() == (b/n).read_bytes()))


@pytest.fixture(scope="module")
def exported(tmp_path_factory): return export(tmp_path_factory.mktemp("sync"))


def test_exports_are_in_sync(exported): assert not differing(exported, LIB), "run `make export` and commit"


@pytest.mark.parametrize("fault", ["edited", "left over", "missing"])
def test_a_difference_is_seen(exported, tmp_path, fault):
    shutil.copytree(exported, tmp_path/"lib")
    core = tmp_path/"lib/core.py"
    if fault == "edited": core.write_text(core.read_text() + "\n")
    if fault == "left over": core.with_name("gone.py").write_text("")
    if fault == "missing": core.unlink()
    assert differing(exported, tmp_path/"lib") == ["gone.py" if fault == "left over" else "core.py"]
