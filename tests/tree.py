"What is in the repository: files, notebooks, modules, the one owner setting. No import of the package."
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "rulediff_nb"
LIB, NBS = ROOT/NAME, ROOT/"nbs"
BINARY = {".safetensors", ".png", ".jpg", ".npz", ".pt"}


def files():
    "All files of the working tree that git does not ignore, links left out (outside git: all files not hidden)."
    if (ROOT/".git").exists():
        cmd = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        found = subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = [ROOT/f for f in dict.fromkeys(found) if f]
    else:
        skip = {"__pycache__", "_proc", "_docs", "build", "dist"}
        paths = [p for p in ROOT.rglob("*") if not skip & set(p.relative_to(ROOT).parts)
                 and not any(s.startswith(".venv") or s.endswith(".egg-info") for s in p.relative_to(ROOT).parts)]
    return [p for p in paths if p.is_file() and not p.is_symlink()]


def text_files():
    "The files that a person reads."
    return [p for p in files() if p.suffix not in BINARY]


def notebooks(): return sorted(p for p in NBS.glob("*.ipynb"))


def read_nb(path): return json.loads(Path(path).read_text(encoding="utf-8"))


def source(cell): return "".join(cell["source"])


def directives(cell):
    "The `#|` flags of a code cell, such as {'export'}."
    if cell["cell_type"] != "code": return set()
    return {m[1].rstrip(":") for line in source(cell).splitlines() if (m := re.match(r"#\s*\|\s*(\S+)", line))}


def modules():
    "Module name -> path, for the modules that notebooks export."
    return {p.stem: p for p in sorted(LIB.glob("*.py")) if p.stem not in ("__init__", "__main__", "_modidx", "all")}


def toml(): return tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))


def owner():
    "The GitHub owner, from pyproject.toml's Repository."
    return re.fullmatch(rf"https://github\.com/([\w-]+)/{NAME}", toml()["project"]["urls"]["Repository"])[1]


def clean_env(**more):
    "An environment for child processes: no test flag, no network for models, nothing of this process's path."
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH", "VIRTUAL_ENV")}
    return {**env, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", **more}


def copy_to(dest):
    "Copy the working tree (as `files` sees it) to `dest`, with nbs/_quarto.yml a link again."
    for p in files():
        to = Path(dest)/p.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(p.read_bytes())
    if (NBS/"_quarto.yml").is_symlink(): (Path(dest)/"nbs/_quarto.yml").symlink_to("../_quarto.yml")
    return Path(dest)
