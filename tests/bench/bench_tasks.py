"Drawing: exact coverage against matplotlib image by image, and against drawing 16 times too large with Pillow."
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw

from rulediff_nb.tasks import TASKS, Disc
from tests.drawing import by_matplotlib

N, TIMES = 128, 40   # images, and how often the exact drawing, which takes a millisecond, does the same again


def by_pillow(task, f, times=16):
    "Hard edges at 16 times the size, reduced by area."
    big, out = task.size*times, []
    for i in range(len(f.rgb)):
        img = Image.new("RGB", (big, big), "white")
        draw = ImageDraw.Draw(img)
        for k, shape in enumerate(task.shapes(f)):
            v, rgb = [p[i].item()*big for p in shape], tuple(round(255*c) for c in f.rgb[i, k].tolist())
            if isinstance(shape, Disc): draw.ellipse((v[0] - v[2], big - v[1] - v[2], v[0] + v[2], big - v[1] + v[2]), fill=rgb)
            else: draw.rectangle((v[0], big - v[3], max(v[1] - 1, v[0]), max(big - v[2] - 1, big - v[3])), fill=rgb)
        out.append(np.asarray(img.resize((task.size, task.size), Image.Resampling.BOX)))
    return np.stack(out)


def bench_drawing():
    torch.set_num_threads(1)
    for name in ("sun_shadow", "two_circles"):
        task = TASKS[name]
        f = task.factors(N, 0)

        def exact(task=task, f=f):
            for _ in range(TIMES): task.render(f)
        yield f"matplotlib at 768 px -> exact coverage, drawing {N} images of {name}", partial(by_matplotlib, task, f), exact, TIMES
        yield f"Pillow at 16x -> exact coverage, drawing {N} images of {name}", partial(by_pillow, task, f), exact, TIMES
