"What guidance costs: against no guidance, and against a plain loop that shifts the mean, with the same networks."
import time

import torch

from rulediff_nb.classifier import load_classifier
from rulediff_nb.guide import CleanGuidance, Oracle, guided
from rulediff_nb.sample import ddim, load_pretrained, sample

N, STEPS, SCALE = 64, 10, 2.


def networks(task="sun_shadow_free"):
    torch.set_num_threads(1)
    return load_pretrained(task), load_classifier(task)


def mean_shifting(model, clf):
    "Ancestral sampling as openai's classifier_sample does it: each step's mean + scale*variance*gradient, noise from torch's generator."
    abar = model.abar.double()
    timesteps = ddim(model.recipe)
    timesteps.set_timesteps(STEPS)
    timesteps = timesteps.timesteps.tolist()
    x = torch.randn(N, 3, 32, 32)
    for t, down in zip(timesteps, [*timesteps[1:], None]):
        a, b = abar[t], abar[down] if down is not None else torch.tensor(1., dtype=abar.dtype)
        s, n, alpha = (v.float() for v in (a.sqrt(), (1 - a).sqrt(), a/b))
        at = torch.full((N,), t)
        with torch.no_grad(): x0 = (s*x - n*model.predict(x, at)).clamp(-1, 1)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            g = torch.autograd.grad(clf(leaf, at).log_softmax(1)[:, 1].sum(), leaf)[0]
        variance = ((1 - a/b)*(1 - b)/(1 - a)).float()
        mean = ((1 - alpha)*b.float().sqrt()*x0 + alpha.sqrt()*(1 - b).float()*x)/(1 - a).float()
        x = mean + SCALE*variance*g + variance.sqrt()*torch.randn_like(x)
    return x


def bench_guided():
    "Below 1: guidance costs; .5 is twice the time."
    model, clf = networks()
    def run(m): return lambda: sample(m, N, STEPS, 1., 0)
    plain = run(model)
    for what, guidance in ("the laptop classifier", clf), ("the same at x0_hat", CleanGuidance(clf)), ("the oracle", Oracle(model.recipe.task)):
        yield f"{N} images in {STEPS} steps: not guided -> guided by {what}", plain, run(guided(model, guidance, SCALE))


def bench_classifier_sample():
    model, clf = networks()
    what = f"{N} guided images in {STEPS} steps: a plain loop over shifted means -> guided(model, clf)"
    return what, lambda: mean_shifting(model, clf), lambda: sample(guided(model, clf, SCALE), N, STEPS, 1., 0)


def figure_guided_sample():
    model, clf = networks()
    torch.set_num_threads(2)
    start = time.perf_counter()
    sample(guided(model, clf, SCALE), N, 50, 1., 0)
    yield f"{time.perf_counter() - start:8.1f} s  {N} guided images in 50 steps, laptop classifier, 2 threads"
