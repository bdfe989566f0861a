"What a report costs: time, memory, and the import before it."
import subprocess
import sys
import time

import torch

from rulediff_nb.metrics import real_images, rule_report
from rulediff_nb.tasks import TASKS

PEAK = """
import resource, torch
from rulediff_nb.tasks import get_task
from rulediff_nb.metrics import measure
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
task = get_task("sun_shadow", size={size})
measure(task, task.sample(64, 1)[0])
before = peak()
x = task.sample({n}, 0)[0]
drawn = peak()
measure(task, x[:{read}])
print(f"{{before:.2f}} GiB before, images {{x.nbytes/2**30:.2f}} GiB, {{drawn:.2f}} GiB when drawn, {{peak():.2f}} when {read} are read")
"""


def figure_report():
    task = TASKS["sun_shadow"]
    x, _ = task.sample(1024, 5)
    rule_report(task, x[:64])   # to warm up
    for what in ("floor measured too", "floor known"):
        if what == "floor measured too": real_images.cache_clear()
        start = time.perf_counter()
        rule_report(task, x)
        took = time.perf_counter() - start
        yield f"{took:8.2f} s  rule_report, 1000 resamples, {len(x)} images, {torch.get_num_threads()} threads, {what}"


def figure_memory():
    for size, read in ((32, 10_000), (128, 500)):
        code = PEAK.format(size=size, n=10_000, read=read)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        yield f"peak memory, 10000 images of {size} px: {out.stdout.strip()}"


def bench_import():
    def run(code): return lambda: subprocess.run([sys.executable, "-c", code], check=True)
    plain = "import torch, matplotlib, PIL\nfrom diffusers import DDPMScheduler, UNet2DModel"
    what = "import in a process of its own: torch, matplotlib, diffusers' model and scheduler -> rulediff_nb.all"
    return what, run(plain), run("from rulediff_nb.all import *")
