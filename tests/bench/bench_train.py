"Training: against a textbook loop with the same network, batch and optimizer; against the machine's own peak; memory per image."
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from rulediff_nb.core import to_8bit
from rulediff_nb.tasks import get_task
from rulediff_nb.train import OPTIMIZERS, Run
from rulediff_nb.unet import unet

TASK, STEPS = get_task("two_circles"), 4


class Pictures(Dataset):
    "PNG files in memory, opened and turned into a tensor one by one, as tutorials do."
    def __init__(self, x):
        self.files = []
        for image in ((to_8bit(x) + 1)*127.5).round().byte().permute(0, 2, 3, 1).numpy():
            self.files.append(io.BytesIO())
            Image.fromarray(image).save(self.files[-1], "png")

    def __len__(self): return len(self.files)

    def __getitem__(self, i):
        image = np.asarray(Image.open(self.files[i]).convert("RGB"), dtype=np.float32)
        return torch.from_numpy(image/127.5 - 1).permute(2, 0, 1)


def textbook(x, preset):
    "The loop of a tutorial: DataLoader, float32, contiguous tensors, diffusers' scheduler, no average."
    model = unet(preset, TASK).to(memory_format=torch.contiguous_format).train()
    r, noise = model.recipe, model.recipe.schedule()
    opt = OPTIMIZERS[r.optimizer](model, r)
    loader = DataLoader(Pictures(x), batch_size=r.batch, shuffle=True, drop_last=True)

    def run():
        for k, clean in enumerate(loader):
            if k == STEPS: return
            eps, t = torch.randn_like(clean), torch.randint(r.T, (len(clean),))
            want = noise.get_velocity(clean, eps, t) if r.prediction == "v_prediction" else eps
            loss = F.mse_loss(model(noise.add_noise(clean, eps, t), t).sample, want)
            opt.zero_grad()
            loss.backward()
            opt.step()
    return run


def ours(x, preset, **how):
    run = Run(unet(preset, TASK).train(), 10**6, **how)

    def go():
        for _ in range(STEPS): run.advance(x)
    return go


def bench_textbook():
    "Network, batch and optimizer are the same; bfloat16, how timesteps are drawn, averaged weights, clipping and posterior-mean targets are ours."
    x = TASK.sample(TASK.paper_n, 0)[0]
    for threads in sorted({1, os.cpu_count()}):
        torch.set_num_threads(threads)
        what = f"{STEPS} steps of preset laptop, {threads} thread(s): textbook loop, fp32 -> Run, bf16 and posterior-mean targets"
        yield what, textbook(x, "laptop"), ours(x, "laptop")


def bench_compiled():
    torch.set_num_threads(1)
    x = TASK.sample(512, 0)[0]
    return f"{STEPS} steps of preset laptop, 1 thread: eager -> torch.compile", ours(x, "laptop"), ours(x, "laptop", compiled=True)


def fastest(f, times=8):
    "Seconds of the quickest of several calls."
    took = []
    for _ in range(times):
        start = time.perf_counter()
        f()
        took.append(time.perf_counter() - start)
    return min(took)


def conv_peak(dtype):
    "FLOP/s of the best convolution, forward and backward, that this machine does in a precision."
    best = 0.
    for c, s in ((64, 16), (128, 16), (256, 16), (256, 32)):
        x = torch.randn(32, c, s, s, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        w = torch.randn(c, c, 3, 3, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()

        def both(x=x, w=w): F.conv2d(x, w, padding=1).sum().backward()
        best = max(best, 3*2*32*c*c*9*s*s/fastest(both))
    return best


def figure_share_of_the_peak():
    "Convolutions and products of a step, by torch's own count, over its time, over the machine's measured peak."
    torch.set_num_threads(1)
    x = TASK.sample(256, 0)[0]
    for preset, dtype in (("laptop", torch.bfloat16), ("published", torch.float32)):   # what each trains in
        peak = conv_peak(dtype)
        run = Run(unet(preset, TASK).train(), 10**6)
        with FlopCounterMode(display=False) as count: run.advance(x)
        rate = count.get_total_flops()/fastest(lambda run=run: run.advance(x), 4 if preset == "laptop" else 2)
        yield (f"a training step of preset {preset}, 1 thread: {count.get_total_flops()/1e9:.1f} GFLOP, {rate/1e9:.0f} GFLOP/s, "
               f"{rate/peak:.0%} of the best {dtype} convolution here ({peak/1e9:.0f} GFLOP/s)")


CHILD = """
import sys, torch
sys.path.insert(0, {root!r})
from tests.bench.bench_train import TASK, textbook, ours
from rulediff_nb.sample import sample
from rulediff_nb.unet import unet
import rulediff_nb.unet as u, tests.bench.bench_train as b
from dataclasses import replace
torch.set_num_threads(1)
b.STEPS = 1
u.PRESETS['laptop'] = replace(u.PRESETS['laptop'], batch={batch})
x = torch.rand(256, 3, 32, 32)*2 - 1
what = {what!r}
if what == 'sampling': sample(unet('laptop', TASK).eval(), {batch}, steps=2, batch={batch})
else: (textbook if what == 'textbook loop' else ours)(x, 'laptop')()
from tests.bench.bench_report import peak
print(peak())
"""


def peak_bytes(what, batch):
    "Largest resident memory of a process of its own."
    root = str(Path(__file__).parents[2])
    r = subprocess.run([sys.executable, "-c", CHILD.format(root=root, what=what, batch=batch)], capture_output=True, text=True, cwd=root)
    assert r.returncode == 0, r.stderr[-2000:]
    return int(r.stdout.split()[-1])


def figure_memory_per_image():
    "What one more image in the batch costs, from the peaks of two batch sizes."
    for what in ("textbook loop", "Run", "sampling"):
        small, large = (peak_bytes(what, b) for b in (32, 160))
        peaks = f"peaks {small/2**20:.0f} MiB at 32 and {large/2**20:.0f} MiB at 160"
        yield f"memory of one more image in a batch, preset laptop, {what}: {(large - small)/128/2**20:.2f} MiB ({peaks})"
