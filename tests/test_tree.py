"Everything that a clone must hold is there, and the commands are wired to what exists."
import os
import re
import subprocess

import pytest
import yaml
from tree import NAME, ROOT, files, modules, notebooks

LESSONS = ["index", "00_core", "01_tasks", "02_features", "02a_gates", "03_metrics", "03a_certificate", "03b_trap",
           "04_schedule", "05_unet", "06_store", "07_train", "08_sample", "09_coarse_fine", "10_theory", "11_when",
           "12_classifier", "13_guide", "14_filter", "20_bumps", "23_card", "90_cli", "91_sixth_world"]
TOP = ["settings.ini", "pyproject.toml", "_quarto.yml", "README.md", "Makefile", "constraints.txt", "LICENSE", "CITATION.cff",
       "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run", f"{NAME}/py.typed", f"{NAME}/all.py", "nbs/_quarto.yml"]


@pytest.mark.parametrize("name", TOP + [f"nbs/{n}.ipynb" for n in LESSONS])
def test_is_there(name): assert (ROOT/name).exists()


def test_each_module_comes_from_one_notebook():
    assert set(modules()) <= {re.sub(r"^\d+[a-z]?_", "", p.stem) for p in notebooks()}


def test_licence_is_apache(): assert "Apache License\n                           Version 2.0" in (ROOT/"LICENSE").read_text()


def test_ci_runs_make_test():
    run = ROOT/".ci/run"
    assert os.access(run, os.X_OK) and run.read_text().rstrip().endswith("\nmake test")
    subprocess.run(["bash", "-n", run], check=True)


def targets(): return set(re.findall(r"(?m)^([\w./-]+):(?!=)", (ROOT/"Makefile").read_text()))


def called(text): return set(re.findall(r"(?m)(?:^|[`\s&;])make ([a-z][\w-]*|\.venv/[\w-]+)(?=[\s`;)|,]|$)", text))


def test_workflows_call_what_exists():
    for p in sorted((ROOT/".github/workflows").glob("*.yml")):
        flow = yaml.safe_load(p.read_text())
        steps = [s for j in flow["jobs"].values() for s in j["steps"]]
        assert all(("uses" in s) != ("run" in s) for s in steps), p.name
        assert called("\n".join(s.get("run", "") for s in steps)) <= targets(), p.name
        assert all((ROOT/f).exists() for s in steps for f in re.findall(r"tests/\w+\.py", s.get("run", "")))


def test_python_versions_are_two():
    flow = yaml.safe_load((ROOT/".github/workflows/tests.yml").read_text())
    assert flow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]


def test_a_call_to_a_missing_target_is_seen():
    assert called("- run: make test X=\n`make nothing`\nmake .venv/gone") - targets() == {"nothing", ".venv/gone"}


def test_nothing_built_is_kept():
    built = re.compile(r"(^|/)(__pycache__|_proc|_docs|build|dist|\.venv|\.ipynb_checkpoints)/|\.egg-info/|\.pyc$|\.pt$|\.ckpt$")
    assert not [n for p in files() if built.search(n := p.relative_to(ROOT).as_posix())]
