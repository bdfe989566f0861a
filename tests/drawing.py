"Scenes drawn by another renderer, for the tests and the benchmarks: one matplotlib figure per image, reduced by area."
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from torch.nn.functional import avg_pool2d

from rulediff_nb.core import from_bytes
from rulediff_nb.tasks import Disc


def patch(shape, i, rgb):
    v, kw = [p[i].item() for p in shape], dict(color=rgb, lw=0, snap=False)
    return Circle(v[:2], v[2], **kw) if isinstance(shape, Disc) else Rectangle((v[0], v[2]), v[1] - v[0], v[3] - v[2], **kw)


def by_matplotlib(task, f, big=768):
    fig, out = Figure(figsize=(1, 1), dpi=big), []
    canvas = FigureCanvasAgg(fig)
    for i in range(len(f.rgb)):
        fig.clear()
        ax = fig.add_axes([0, 0, 1, 1], xlim=(0, 1), ylim=(0, 1))
        ax.set_axis_off()
        for k, shape in enumerate(task.shapes(f)): ax.add_patch(patch(shape, i, f.rgb[i, k].tolist()))
        canvas.draw()
        out.append(avg_pool2d(from_bytes(np.asarray(canvas.buffer_rgba())[None, ..., :3]), big//task.size))
    return torch.cat(out)
