"""nbdev 2.4.14, reading settings.ini, exports the modules that nbdev 3 exports: `python tests/nbdev2_parity.py`.

It makes an environment of its own (nbdev 2 and 3 can't share one), so it is no part of `make test`. It works on a copy of the
notebooks and of settings.ini alone. `_modidx.py`, the index of the docs, may differ; every other module may not, but for the
line "Docs: (the module's page)" that nbdev 3 adds to the docstring at the top.
"""
import difflib
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tree import LIB, NAME, NBS, ROOT, toml

PINS = ["nbdev==2.4.14", "execnb<0.2", "fastcore<2", "ghapi<2", "setuptools<81"]


def export(tmp):
    "Export under `tmp` by nbdev 2; returns the folder of modules."
    venv.create(tmp/"venv", with_pip=True)
    py, repo = tmp/"venv/bin/python", tmp/"repo"
    subprocess.run([py, "-m", "pip", "install", "-qq", *PINS], check=True)
    (repo/"nbs").mkdir(parents=True)
    (repo/NAME).mkdir()
    (repo/"settings.ini").write_bytes((ROOT/"settings.ini").read_bytes())
    for nb in NBS.glob("*.ipynb"): (repo/"nbs"/nb.name).write_bytes(nb.read_bytes())
    for f in ("__init__.py", "all.py"):
        if (LIB/f).exists(): (repo/NAME/f).write_bytes((LIB/f).read_bytes())
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH")}
    subprocess.run([tmp/"venv/bin/nbdev_export"], cwd=repo, env=env, check=True)
    return repo/NAME


def text(path):
    "A module's text, less the one line that only nbdev 3 writes."
    page = re.escape(toml()["project"]["urls"]["Documentation"] + path.stem + ".html.md")
    return re.sub(rf'\A(""".*)\n\nDocs: {page}"""', r'\1"""', path.read_text()) if path.exists() else ""


def difference(name, a, b):
    "A unified diff of one module in the two folders, empty if there is none."
    old, new = (text(d/name).splitlines() for d in (a, b))
    return "\n".join(difflib.unified_diff(old, new, f"nbdev 3: {name}", f"nbdev 2: {name}", lineterm="", n=1))


def main():
    with tempfile.TemporaryDirectory() as tmp:
        made = export(Path(tmp))
        names = sorted({p.name for d in (LIB, made) for p in d.glob("*.py")} - {"_modidx.py"})
        diffs = {n: d for n in names if (d := difference(n, LIB, made))}
    for d in diffs.values(): sys.stdout.write("\n".join(d.splitlines()[:40]) + "\n")
    sys.stdout.write(f"{len(names)} modules, {len(diffs)} differ: {', '.join(diffs) or 'none'}\n")
    return bool(diffs)


if __name__ == "__main__": sys.exit(main())
