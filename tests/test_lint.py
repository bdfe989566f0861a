"ruff is silent, over modules, notebooks and tests."
import shutil
import subprocess
import sys

import pytest
from tree import ROOT


def ruff(*args, text=None):
    cmd = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", *args]
    return subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True, input=text)


def test_ruff_is_silent():
    r = ruff(".")
    assert r.returncode == 0, r.stdout + r.stderr


@pytest.mark.parametrize("name,text", [
    ("rulediff_nb/x.py", "import os\n"), ("rulediff_nb/x.py", "def f(): return y\n"), ("rulediff_nb/x.py", "def f(a=[]): return a\n"),
    ("rulediff_nb/x.py", "from torch import *\n"), ("tests/x.py", "x = 1 \n"), ("tests/x.py", f"x = '{'x'*150}'\n")])
def test_a_fault_is_seen(name, text): assert ruff("--stdin-filename", name, "-", text=text).returncode == 1


def test_notebooks_are_looked_at(tmp_path):
    shutil.copy(ROOT/"pyproject.toml", tmp_path)
    bad = '{"cells": [{"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": null, "source": "f = lost"}],'
    (tmp_path/"a.ipynb").write_text(bad + ' "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}')
    assert "F821" in ruff(str(tmp_path)).stdout
