"Drawing: exact coverage against matplotlib image by image, and against drawing 16 times too large with Pillow."
from functools import partial

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from PIL import Image, ImageDraw

from rulediff_nb.tasks import TASKS, Disc

N = 16


def by_matplotlib(task, f, big=768):
    "As the study drew: one figure of 768 pixels per image, reduced by area."
    fig, out = Figure(figsize=(1, 1), dpi=big), []
    canvas = FigureCanvasAgg(fig)
    for i in range(len(f.rgb)):
        fig.clear()
        ax = fig.add_axes([0, 0, 1, 1], xlim=(0, 1), ylim=(0, 1))
        ax.set_axis_off()
        for k, shape in enumerate(task.shapes(f)):
            v, kw = [p[i].item() for p in shape], dict(color=f.rgb[i, k].tolist(), lw=0)
            ax.add_patch(Circle(v[:2], v[2], **kw) if isinstance(shape, Disc) else Rectangle((v[0], v[2]), v[1] - v[0], v[3] - v[2], **kw))
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        out.append(pixels.reshape(task.size, big//task.size, task.size, big//task.size, 3).mean((1, 3)))
    return np.stack(out)


def by_pillow(task, f, times=16):
    "Hard edges at 16 times the size, reduced by area."
    big, out = task.size*times, []
    for i in range(len(f.rgb)):
        img = Image.new("RGB", (big, big), "white")
        draw = ImageDraw.Draw(img)
        for k, shape in enumerate(task.shapes(f)):
            v, rgb = [p[i].item()*big for p in shape], tuple(round(255*c) for c in f.rgb[i, k].tolist())
            if isinstance(shape, Disc): draw.ellipse((v[0] - v[2], big - v[1] - v[2], v[0] + v[2], big - v[1] + v[2]), fill=rgb)
            else: draw.rectangle((v[0], big - v[3], v[1] - 1, big - v[2] - 1), fill=rgb)
        out.append(np.asarray(img.resize((task.size, task.size), Image.Resampling.BOX)))
    return np.stack(out)


def bench_drawing():
    torch.set_num_threads(1)
    for name in ("sun_shadow", "two_circles"):
        task = TASKS[name]
        f, what = task.factors(N, 0), f"drawing {N} images of {name}"
        yield f"{what}: matplotlib at 768 px -> exact coverage", partial(by_matplotlib, task, f), partial(task.render, f)
        yield f"{what}: Pillow at 16x -> exact coverage", partial(by_pillow, task, f), partial(task.render, f)
