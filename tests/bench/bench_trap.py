"The exact ruler against the loop of thresholds and outlines: what reading well costs, and what it gives."
from functools import partial

import cv2
import torch

from rulediff_nb.core import to_8bit
from rulediff_nb.metrics import measure
from rulediff_nb.tasks import TASKS
from rulediff_nb.trap import blunt_read

N = 512


def errors_px(task, x, f):
    "Median error of the dependent length against what the rule demands, in pixels: blunt, exact, each over what it reads."
    blunt, exact = blunt_read(task, x), measure(task, x)
    per_side = task.dependent(f)[1]/task.sides(f)[0]   # a length per unit of the rule's side
    off = ((blunt.b - blunt.a).abs()*per_side*task.size)[blunt.detected]
    return off.median().item(), ((exact.measured - exact.predicted).abs()*task.size)[exact.readable].median().item()


def bench_rulers():
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for name in ("sun_shadow", "two_circles"):
        task = TASKS[name]
        x, f = task.sample(N, 0)
        x = to_8bit(x)
        blunt, exact = errors_px(task, x, f)
        what = f"reading {N} images of {name}: OpenCV loop, median error {blunt:.2f} px -> exact ruler, {exact:.4f} px"
        yield what, partial(blunt_read, task, x), partial(task.features, x)
