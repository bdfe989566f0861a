"Imports go one way, star imports stand in all.py alone, and importing the package does nothing one could notice."
import ast
import json
import subprocess
import sys

import pytest
from tree import LIB, NAME, clean_env, modules

MODEL = {"core", "tasks", "schedule", "unet", "store"}
LAYERS = {  # module -> modules of the package that it may import
    "core": set(), "table": {"core"}, "tasks": {"core"}, "features": {"core", "tasks"},
    "gates": {"core", "tasks", "features"}, "metrics": {"core", "tasks", "features", "gates"},
    "certificate": {"core", "table", "tasks", "features", "gates", "metrics"}, "trap": {"core", "tasks", "metrics"},
    "schedule": {"core"}, "unet": {"core", "tasks", "schedule"}, "store": {"core"}, "train": MODEL | {"table"},
    "sample": MODEL | {"table", "metrics"}, "study": MODEL | {"table", "metrics", "train", "sample"},
    "gpu": MODEL | {"table", "metrics", "train", "sample", "study"},
    "theory": {"core", "tasks", "schedule"},
    "coarse_fine": (MODEL - {"store"}) | {"table", "gates", "metrics", "sample", "study"},
    "when": {"core", "tasks", "schedule", "table", "gates", "metrics", "sample", "study", "theory", "coarse_fine"},
    "bumps": {"core", "tasks", "schedule", "unet", "table", "metrics", "train", "sample", "coarse_fine", "when"},
    "classifier": MODEL | {"table", "metrics", "train", "study"},
    "guide": MODEL | {"metrics", "train", "sample", "classifier", "table", "study"},
    "filter": {"core", "tasks", "metrics", "sample", "classifier", "guide", "table", "study"},
    "images": {"core", "tasks", "features", "metrics", "store"},
    "card": {"_modidx", "tasks", "metrics", "unet", "store", "sample", "table", "study", "classifier"}}
LIBS = {  # library -> the only modules that may import it
    "matplotlib": {"core"}, "ipywidgets": {"core"}, "IPython": {"core"},
    "diffusers": {"schedule", "unet", "train", "sample", "guide", "filter", "classifier", "gpu", "cli"},
    "accelerate": {"train", "sample", "classifier", "cli"}, "pytorch_optimizer": {"train"},
    "joblib": {"study"}, "dask": {"study"}, "ray": {"study"}, "filelock": {"train", "study"},
    "huggingface_hub": {"store", "unet", "sample", "cli", "card"},
    "scipy": {"gates", "metrics", "when"},
    "pandas": {"coarse_fine", "table", "images", "study", "certificate", "sample", "classifier", "guide", "filter", "card", "cli", "when", "bumps"},
    "nbdev": set(), "sklearn": {"bumps"}, "cv2": {"trap"}, "jupyterlab": set(), "pickle": set()}

APART = {"cli", "trap", "certificate", "gpu", "gates", "theory", "bumps"}   # a reader sees gates as rows of a report; a toy stays in its lesson


def imports(tree):
    "Each import statement, wherever it stands, as (module path, imported names)."
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from ((a.name, []) for a in n.names)
        if isinstance(n, ast.ImportFrom): yield ("." * n.level + (n.module or ""), [a.name for a in n.names])


def used(path, names):
    "The modules of this package that one import statement brings in."
    path = path.replace(".", f"{NAME}.", 1).rstrip(".") if path.startswith(".") else path
    if path == NAME: return set(names) - {"__version__"}
    return {path.split(".")[1]} if path.startswith(f"{NAME}.") else set()


def wrong_imports(module, src):
    "What `module` with the source `src` may not import."
    out = []
    if module != "cli" and module not in LAYERS: return [f"{module} has no place in LAYERS"]
    for path, names in imports(ast.parse(src)):
        if "*" in names: out.append(f"{module}: star import of {path}")
        if module != "cli": out += [f"{module} imports {m}" for m in sorted(used(path, names) - LAYERS[module])]
        lib = path.split(".")[0]
        if module not in LIBS.get(lib, {module}): out.append(f"{module} imports {lib}")
    return out


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module): assert not wrong_imports(module, modules()[module].read_text())


@pytest.mark.parametrize("module,src", [
    ("sample", "from rulediff_nb.guide import guided"), ("sample", "import rulediff_nb.guide"),
    ("sample", "from rulediff_nb import guide"), ("sample", "def f():\n    from .guide import guided"),
    ("metrics", "from rulediff_nb.unet import unet"), ("gates", "from .metrics import measure"), ("metrics", "import diffusers"),
    ("store", "from .unet import unet"),
    ("tasks", "from .features import read"), ("core", "from . import tasks"), ("tasks", "import matplotlib.pyplot as plt"),
    ("train", "def f():\n    import ipywidgets"), ("train", "from fastcore.all import *"), ("unknown", ""),
    ("cli", "from rulediff_nb.all import *"), ("store", "import pickle"), ("train", "from .sample import sample")])
def test_wrong_import_is_seen(module, src): assert wrong_imports(module, src)


@pytest.mark.parametrize("module,src", [("core", "import matplotlib.pyplot as plt"), ("sample", "from .unet import unet"),
                                        ("cli", "from .metrics import report"), ("store", "from rulediff_nb import __version__")])
def test_right_import_passes(module, src): assert not wrong_imports(module, src)


def test_all_is_every_module_but_those_apart():
    if not (LIB/"all.py").exists(): pytest.skip("no rulediff_nb/all.py yet")
    found = list(imports(ast.parse((LIB/"all.py").read_text())))
    assert {m for p, n in found for m in used(p, n)} == set(modules()) - APART
    assert not any("*" in n for _, n in found)


def test_all_is_what_a_reader_types():
    code = f"from {NAME}.all import *; import sys; sys.stdout.write(' '.join(k for k in dir() if not k.startswith('_') and k != 'sys'))"
    names = subprocess.run([sys.executable, "-c", code], env=clean_env(), capture_output=True, text=True, check=True).stdout.split()
    assert 50 <= len(names) <= 75, len(names)
    assert {"SunShadow", "rule_report", "unet", "fit", "sample", "fit_classifier", "guided", "load_pretrained", "explore", "show"} <= set(names)
    assert not {"right", "split", "plan", "claim", "OFF", "torch", "Tensor", "annotations"} & set(names)


PROBE = """
import json, os, socket, sys, time
def refuse(*args, **kwargs): raise OSError("network use at import")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
before = set(os.listdir('.')); start = time.perf_counter()
{code}
seconds = time.perf_counter() - start
plt = sys.modules.get('matplotlib.pyplot')
sys.__stdout__.write('RESULT' + json.dumps(dict(seconds=seconds, figures=len(plt.get_fignums()) if plt else 0,
    new=sorted(set(os.listdir('.')) - before), heavy=[m for m in ('nbdev', 'jupyterlab') if m in sys.modules])))
"""


def noticed(code, cwd):
    "What importing by `code` prints, draws, downloads or writes, in a process of its own; and its seconds."
    r = subprocess.run([sys.executable, "-c", PROBE.format(code=code)], cwd=cwd, env=clean_env(), capture_output=True, text=True)
    said, _, result = r.stdout.partition("RESULT")
    if r.returncode: return [r.stderr[-2000:]], None
    result = json.loads(result)
    found = [f"printed {t!r}" for t in (said, r.stderr) if t]
    found += [f"{k}: {result[k]}" for k in ("figures", "new", "heavy") if result[k]]
    return found, result["seconds"]


@pytest.mark.parametrize("module", [m for m in ("all", "cli") if (LIB/f"{m}.py").exists()] or ["core"])
def test_import_is_silent(module, tmp_path, record):
    found, seconds = noticed(f"import {NAME}.{module}", tmp_path)
    assert not found
    record(f"cold import of {NAME}.{module}", f"{seconds:.2f} s")


@pytest.mark.parametrize("code", ["print('hello')", "import sys; print('hello', file=sys.stderr)", "open('left', 'w').close()",
                                  "import matplotlib.pyplot as plt; plt.figure()", "import nbdev",
                                  "import urllib.request as u; u.urlopen('http://127.0.0.1:9')"])
def test_noise_at_import_is_noticed(code, tmp_path): assert noticed(code, tmp_path)[0]
