"Commands as tests run them: in this process with what they say, or in a shell."
import subprocess
import sys

import torch
from tree import ROOT, clean_env

from rulediff_nb.cli import main

torch.set_num_threads(1)
RULEDIFF = f"{sys.executable} -m rulediff_nb"


def run(capsys, *args):
    "Exit status, standard output, standard error."
    return main([str(a) for a in args]), *capsys.readouterr()


def fails(capsys, *args):
    "The single line that a user reads when a command cannot do it."
    status, _, err = run(capsys, *args)
    said = err.split("\r")[-1]   # a bar may have stood there
    assert status == 1 and said.startswith(f"rulediff {args[0]}: ") and said.count("\n") == 1 and "Traceback" not in err, err
    return said


def shell(line, cwd=ROOT, **env):
    "What bash makes of a line, as (status, standard output, standard error)."
    p = subprocess.run(["bash", "-c", line], cwd=cwd, env=clean_env(OMP_NUM_THREADS="1", **env), capture_output=True, text=True, timeout=300)
    return p.returncode, p.stdout, p.stderr
