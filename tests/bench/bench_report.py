"What a report costs: time, memory, and the import before it."
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from rulediff_nb.metrics import real_images, rule_report
from rulediff_nb.tasks import TASKS

PEAK = """
import sys
sys.path.insert(0, {root!r})
from tests.bench.bench_report import peak
from rulediff_nb.tasks import get_task
from rulediff_nb.metrics import measure
task = get_task("sun_shadow", size={size})
measure(task, task.sample(64, 1)[0])
before = peak()
x = task.sample({n}, 0)[0]
drawn = peak()
measure(task, x[:{read}])
said = {{"before": before, "when drawn": drawn, "when {read} are read": peak()}}
print(f"images {{x.nbytes/2**30:.2f}} GiB; " + ", ".join(f"{{v/2**30:.2f}} GiB {{k}}" for k, v in said.items()))
"""


def peak():
    "Largest resident memory of this process in bytes; getrusage would begin with what the parent held when it forked."
    status = Path("/proc/self/status")
    if not status.exists(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))*1024


def figure_report():
    task = TASKS["sun_shadow"]
    x, _ = task.sample(1024, 5)
    rule_report(task, x[:64])   # to warm up
    model = SimpleNamespace(task=task, trained_on=task.sample(task.paper_n, 0)[0])
    other = task.with_(palette="random").sample(len(x), 5)[0]
    cases = {"floor measured too": (task, x), "floor known": (task, x), f"a model's {task.paper_n} training images compared": (model, x),
             "the other palette's colours, with a note": (task, other)}
    for what, (asked, images) in cases.items():
        if what == "floor measured too": real_images.cache_clear()
        start = time.perf_counter()
        r = rule_report(asked, images)
        took = time.perf_counter() - start
        assert bool(r.notes) == (images is other) and (r.memorized is None) == (asked is task)
        yield f"{took:8.2f} s  rule_report, 1000 resamples, {len(x)} images, {torch.get_num_threads()} threads, {what}"


def figure_memory():
    for size, read in ((32, 10_000), (128, 500)):
        code = PEAK.format(root=str(Path(__file__).parents[2]), size=size, n=10_000, read=read)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        yield f"peak memory, 10000 images of {size} px: {out.stdout.strip()}"


def bench_import():
    def run(code): return lambda: subprocess.run([sys.executable, "-c", code], check=True)
    plain = "import torch, matplotlib, PIL\nfrom diffusers import DDPMScheduler, UNet2DModel"
    what = "import in a process of its own: torch, matplotlib, diffusers' model and scheduler -> rulediff_nb.all"
    return what, run(plain), run("from rulediff_nb.all import *")
