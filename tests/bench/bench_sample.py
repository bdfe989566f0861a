"What rows of their own cost, one generator per row against one call of torch.randn; and what bfloat16 gains. Below 1 means slower."
import torch

from rulediff_nb.core import row_noise
from rulediff_nb.sample import sample
from rulediff_nb.tasks import get_task
from rulediff_nb.train import draw_batch
from rulediff_nb.unet import unet

SHAPE, TIMES = (64, 3, 32, 32), 30


def often(f):
    "Many nfe, so that a pause of the machine weighs less."
    def run():
        for _ in range(TIMES): f()
    return run


def bench_noise():
    torch.set_num_threads(1)
    what = f"noise for {SHAPE[0]} images, {TIMES} times: torch.randn -> one Philox generator per row"
    return what, often(lambda: torch.randn(SHAPE)), often(lambda: row_noise(0, range(SHAPE[0]), SHAPE[1:]))


def bench_noise_in_a_step():
    "The same beside one call of the laptop network: what share of a sampling step it is."
    torch.set_num_threads(1)
    model = unet("laptop", get_task("two_circles", palette="fixed")).eval()
    x, t = torch.randn(SHAPE), torch.full((SHAPE[0],), 500)

    def step(noise):
        with torch.no_grad(): return model.predict(x, t) + noise()
    return "one network call with fresh noise: torch.randn -> per row", lambda: step(lambda: torch.randn(SHAPE)), lambda: step(
        lambda: row_noise(0, range(SHAPE[0]), SHAPE[1:]))


def bench_training_batch():
    shares = torch.full((1000,), 1e-3, dtype=torch.float64)

    def plain(): return torch.randint(2000, (32,)), torch.randint(1000, (32,)), torch.randn(32, *SHAPE[1:])
    what = f"a training batch of 32, {TIMES} times: torch's global generator -> a function of (seed, step)"
    return what, often(plain), often(lambda: draw_batch(0, 1, 2000, 32, shares, SHAPE[1:]))


def bench_precision():
    "The laptop network, float32 against bfloat16, for a batch of samples and for as few as a widget draws."
    torch.set_num_threads(2)
    model = unet("laptop", get_task("two_circles")).eval()
    def draw(n, steps, precision): return lambda: sample(model, n, steps, precision=precision, progress=False)
    for n, steps in ((64, 5), (8, 10)):
        yield f"{n} images in {steps} steps, 2 threads: fp32 -> bf16", draw(n, steps, "fp32"), draw(n, steps, "bf16")
