"Sampling: the exact denoiser, rows that belong to (seed, i), diffusers' schedulers, weights that load or are refused by name."
import copy
import json
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.utils import hub_utils
from tree import clean_env

from rulediff_nb import sample as sampling
from rulediff_nb import store
from rulediff_nb.core import row_noise
from rulediff_nb.gates import nearest as nearest_rows
from rulediff_nb.metrics import Measured, measure, paired_gap, real_images, rule_report
from rulediff_nb.sample import (
    FEW,
    TURN,
    WEIGHTS,
    Denoised,
    ExactDenoiser,
    InPrecision,
    LogSigmaScheduler,
    Setting,
    Shipped,
    as_pipeline,
    bf16_gains,
    check_precision,
    ddim,
    eta_of,
    fresh_below,
    load_pretrained,
    misfit,
    sample,
    sample_batches,
    sample_steps,
)
from rulediff_nb.schedule import add_noise, amplitudes, solve
from rulediff_nb.store import StoreError, list_releases, save_release
from rulediff_nb.study import outdated
from rulediff_nb.table import KEPT, STUDIES, Work, results
from rulediff_nb.tasks import TASKS, get_task
from rulediff_nb.unet import RuleUNet, recipe, unet

torch.set_num_threads(1)
TASK = get_task("two_squares", palette="fixed", size=16)
SMALL = dict(channels=(8, 8, 16), head_dim=8, batch=4, betas="linear")
PREDICTIONS = ["v_prediction", "epsilon", "sample"]


def net(prediction="v_prediction", **kw):
    "An untrained network whose last layer is not zero."
    m = unet("laptop", TASK, 0, **(SMALL | dict(prediction=prediction, sigma_data=.3 if prediction == "v_prediction" else 0.) | kw))
    return m.eval()


NET = net()


def nearest(x, train): return nearest_rows(x.flatten(1), train.flatten(1))


every = pytest.mark.parametrize("prediction", PREDICTIONS)


# ---------------------------------------------------------------- rows and seeds

@pytest.mark.parametrize("eta", [0., 1.])
def test_the_same_seed_gives_the_same_bits(eta):
    a, b, c = (sample(NET, 3, steps=5, seed=s, eta=eta) for s in (1, 1, 2))
    assert torch.equal(a, b) and (a - c).abs().amax((1, 2, 3)).min() > .01
    assert a.shape == (3, 3, 16, 16) and a.dtype == torch.float32 and a.abs().max() <= 1 and a.isfinite().all()


@pytest.mark.parametrize("eta", [0., .5, 1.])
@every
def test_a_row_does_not_know_its_batch(prediction, eta):
    m = net(prediction)
    bound = 5e-3 if (prediction, eta) == ("epsilon", 0.) else 1e-3   # x0_hat from epsilon divides by sqrt(abar) = .006 at the last timestep
    whole = sample(m, 64, steps=10, seed=3, eta=eta, precision="fp32")
    for i in (0, 7, 63): assert (list(sample_steps(m, [i], 10, eta, 3, precision="fp32"))[-1].x.clamp(-1, 1)[0] - whole[i]).abs().max() <= bound
    for batch in (1, 8):
        assert (sample(m, 8, steps=10, seed=3, eta=eta, batch=batch, precision="fp32") - whole[:8]).abs().max() <= bound


def test_later_rows_are_the_same_rows():
    m, y = net(classes=3), torch.arange(12) % 3
    whole = sample(m, 12, steps=5, seed=3, eta=1., y=y, precision="fp32")
    for batch in (2, 64): assert (sample(m, 5, 5, 1., 3, batch=batch, y=y[4:9], first=4, precision="fp32") - whole[4:9]).abs().max() < 1e-3


def test_neighbouring_seeds_share_no_image():
    a, b = (sample(NET, 12, steps=3, seed=s) for s in (0, 1))
    assert torch.cdist(a.flatten(1), b.flatten(1)).min() > .5 < torch.pdist(a.flatten(1)).min()


def states(rows, eta=0., scheduler=None, m=NET):
    "What the network is shown first, and the noise that was added at every step."
    seen = []

    class Noted:
        recipe, parameters = m.recipe, m.parameters
        def predict(self, x, t, y=None): return seen.append(x.clone()) or torch.zeros_like(x)
    list(sample_steps(Noted(), rows, 6, eta, 5, scheduler))
    return torch.stack(seen, 1)


@pytest.mark.parametrize("eta,scheduler", [(0., None), (1., None), (0., DDPMScheduler)])
def test_noise_is_bit_equal_across_batch_sizes(eta, scheduler):
    s = scheduler and scheduler.from_config(NET.recipe.schedule().config)
    whole = states(range(16), eta, s)
    assert torch.equal(whole[:, 0], row_noise(5, range(16), (3, 16, 16), 20))
    for rows in ([0], [15], [3, 9], range(4, 12)): assert torch.equal(states(rows, eta, s), whole[list(rows)])


def test_fresh_noise_is_fresh_at_every_step(monkeypatch):
    streams = []
    monkeypatch.setattr(sampling, "row_noise", lambda seed, rows, shape, stream, *args: (
        streams.append((seed, stream)) or row_noise(seed, rows, shape, stream, *args)))
    states(range(4), 1.)
    assert len(streams) == 7 == len(set(streams)) and {s for s, _ in streams} == {5}


def test_eta_matters():
    a, b, c = (sample(NET, 2, steps=5, seed=1, eta=e) for e in (0., .5, 1.))
    assert min((a - b).abs().max(), (b - c).abs().max(), (a - c).abs().max()) > .01


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    state, a = torch.get_rng_state(), sample(NET, 2, steps=3, eta=1.)
    b = sample(NET, 2, steps=3, scheduler=DDPMScheduler.from_config(NET.recipe.schedule().config))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    assert torch.equal(a, sample(NET, 2, steps=3, eta=1.))
    assert torch.equal(b, sample(NET, 2, steps=3, scheduler=DDPMScheduler.from_config(NET.recipe.schedule().config)))


# ---------------------------------------------------------------- against diffusers' own loop

@torch.no_grad()
def library_loop(m, x, sch, steps):
    "The loop of diffusers' pipelines, with eta 0."
    sch.set_timesteps(steps)
    for t in sch.timesteps: x = sch.step(m(sch.scale_model_input(x, t), t).sample, t, x).prev_sample
    return x.clamp(-1, 1)


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("betas,schedule", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@every
def test_ddim_is_diffusers(prediction, betas, schedule, steps):
    m = net(prediction, betas=betas)
    r = m.recipe
    s = DDIMScheduler(num_train_timesteps=r.T, beta_start=r.beta_start, beta_end=r.beta_end, beta_schedule=schedule,
                      prediction_type=prediction, timestep_spacing="trailing", clip_sample=True)
    x = row_noise(4, range(3), (3, 16, 16), 20)
    assert (library_loop(m, x, s, steps) - sample(m, 3, steps, 0., 4, ddim(m.recipe), precision="fp32")).abs().max() < 1e-5


def test_ddim_starts_at_the_last_level():
    s = ddim(NET.recipe)
    s.set_timesteps(10)
    assert s.timesteps[0] == NET.recipe.T - 1 and len(s.timesteps) == 10


OTHERS = [DPMSolverMultistepScheduler, PNDMScheduler, EulerDiscreteScheduler, DDIMScheduler]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_other_schedulers(kind, prediction):
    m = net(prediction)
    s = kind.from_config(m.recipe.schedule().config)
    before = dict(s.config)
    a = sample(m, 4, 8, 0., 2, s, precision="fp32")
    assert a.isfinite().all() and torch.equal(a, sample(m, 4, 8, 0., 2, s, precision="fp32")) and dict(s.config) == before
    assert (sample(m, 4, 8, 0., 2, s, batch=1, precision="fp32") - a).abs().max() < 1e-3
    fresh = kind.from_config(m.recipe.schedule().config)
    fresh.set_timesteps(8)
    x = row_noise(2, range(4), (3, 16, 16), 20)*fresh.init_noise_sigma
    assert (library_loop(m, x, fresh, 8) - a).abs().max() < 1e-5


@pytest.mark.parametrize("eta", [0., 1.])
def test_ancestral_sampling_has_noise_of_its_own_per_row(eta):
    s = DDPMScheduler.from_config(NET.recipe.schedule().config)
    a = sample(NET, 6, steps=8, seed=2, scheduler=s, eta=eta)
    assert torch.equal(a, sample(NET, 6, steps=8, seed=2, scheduler=s, eta=eta))
    assert (sample(NET, 6, steps=8, seed=2, scheduler=s, batch=2) - a).abs().max() < 1e-3
    assert (a - sample(NET, 6, steps=8, seed=3, scheduler=s)).abs().amax((1, 2, 3)).min() > .01


@pytest.mark.parametrize("change,word", [
    (dict(prediction_type="epsilon"), "prediction_type='epsilon'.*v_prediction"),
    (dict(num_train_timesteps=500), "num_train_timesteps=500"),
    (dict(beta_schedule="squaredcos_cap_v2"), "beta_schedule"), (dict(beta_start=1e-3), "beta_start"), (dict(beta_end=.1), "beta_end")])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_a_scheduler_of_another_model_is_refused(kind, change, word):
    with pytest.raises(ValueError, match=f"{kind.__name__} has {word}"):
        sample(NET, 2, steps=3, scheduler=kind.from_config(NET.recipe.schedule().config, **change))


def test_a_flow_scheduler_is_refused():
    with pytest.raises(ValueError, match="FlowMatch"): sample(NET, 1, steps=3, scheduler=FlowMatchEulerDiscreteScheduler())


# ---------------------------------------------------------------- the generator, sizes, bad arguments

def test_steps_can_be_watched():
    steps = list(sample_steps(NET, range(2), 5, seed=1))
    assert [s.step for s in steps] == [1, 2, 3, 4, 5] and all(isinstance(s, Denoised) for s in steps)
    assert steps[0].t == 999 and [s.t for s in steps] == sorted({s.t for s in steps}, reverse=True)
    assert all(s.x0_hat.abs().max() <= 1 for s in steps) and not steps[-1].x.requires_grad
    assert torch.equal(steps[-1].x.clamp(-1, 1), sample(NET, 2, steps=5, seed=1))


def test_batches_tell_of_every_step():
    out = list(sample_batches(NET, 5, steps=3, batch=2))
    assert [None if v is None else len(v) for v in out] == [None]*3 + [2] + [None]*3 + [2] + [None]*3 + [1]


def test_no_images(): assert sample(NET, 0, steps=3).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("kw,error,word", [
    (dict(n=-1), ValueError, "n must"), (dict(n=2.), TypeError, "n must"), (dict(n=True), TypeError, "n must"),
    (dict(steps=0), ValueError, "steps"), (dict(steps=1001), ValueError, "steps"), (dict(steps=2.5), TypeError, "steps"),
    (dict(eta=-.1), ValueError, "eta"), (dict(eta=1.1), ValueError, "eta"), (dict(eta=float("nan")), ValueError, "eta"),
    (dict(seed=-1), ValueError, "seed"), (dict(seed=.5), TypeError, "seed"), (dict(seed=True), TypeError, "seed"),
    (dict(batch=0), ValueError, "batch"), (dict(batch=1.), TypeError, "batch"),
    (dict(first=-1), ValueError, "first"), (dict(first=.5), TypeError, "first")])
def test_wrong_arguments(kw, error, word):
    with pytest.raises(error, match=word): sample(NET, **{**dict(n=2, steps=2), **kw})


@pytest.mark.parametrize("kw,word", [(dict(n=0, steps=0), "steps"), (dict(n=0, eta=2.), "eta"), (dict(n=0, seed=-1), "seed")])
def test_wrong_arguments_are_seen_without_images(kw, word):
    with pytest.raises(ValueError, match=word): sample(NET, **kw)


def test_a_model_keeps_its_weights_and_mode():
    m = net()
    before = [p.clone() for p in m.parameters()]
    sample(m, 2, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, m.parameters())) and not m.training


def test_half_precision_gives_float32_images():
    x = sample(net().to(torch.bfloat16), 2, steps=3)
    assert x.dtype == torch.float32 and x.isfinite().all()


def test_class_labels_are_refused():
    with pytest.raises(ValueError, match="class labels"): NET.predict(torch.zeros(1, 3, 16, 16), torch.tensor([1]), torch.tensor([1]))


def test_a_timestep_may_be_a_number():
    x = row_noise(0, range(3), (3, 16, 16))
    a = NET.predict(x, torch.tensor([500]*3))
    for t in (500, torch.tensor(500), torch.tensor([500])): assert torch.equal(NET(x, t).sample, a)
    assert torch.equal(NET(x, 500, return_dict=False)[0], a)


# ---------------------------------------------------------------- the exact denoiser

X0 = TASK.sample(12, 3)[0]


def exact(prediction="v_prediction", x0=X0, block=2**20, **kw):
    return ExactDenoiser(x0, recipe("laptop", TASK, **(dict(prediction=prediction, sigma_data=0., betas="linear") | kw)), block)


def by_loop(m, xt, t, train=X0):
    "x0_hat and log density of each row in float64, image by image."
    out = []
    for x, k in zip(xt.double(), t):
        s, n = m.abar[k].double().sqrt(), (1 - m.abar[k].double()).sqrt()
        logits = torch.stack([-((x - s*v)**2).sum()/(2*n*n) for v in train.double()])
        out.append((logits.softmax(0).view(-1, 1, 1, 1)*train.double()).sum(0))
    return torch.stack(out)


TIMESTEPS = torch.tensor([0, 1, 10, 100, 300, 600, 999])


def noisy(m, x0=None, seed=5):
    x = TASK.sample(len(TIMESTEPS), 4)[0] if x0 is None else x0.expand(len(TIMESTEPS), -1, -1, -1)
    return add_noise(x, TIMESTEPS, row_noise(seed, range(len(TIMESTEPS)), x.shape[1:]), m.abar)


@pytest.mark.parametrize("betas", ["linear", "cosine", "zero_snr"])
@every
def test_the_exact_denoiser_is_the_posterior_mean(prediction, betas):
    if (prediction, betas) == ("epsilon", "zero_snr"): pytest.skip("refused by the recipe")
    m = exact(prediction, betas=betas)
    xt = noisy(m)
    want = by_loop(m, xt, TIMESTEPS)
    assert (m.x0_hat(xt, TIMESTEPS) - want).abs().max() < 1e-4
    told = solve(xt, m.predict(xt, TIMESTEPS), TIMESTEPS, m.abar, prediction)
    seen = m.abar[TIMESTEPS] > 1e-6 if prediction == "epsilon" else torch.ones(len(TIMESTEPS), dtype=torch.bool)
    assert (told.x0 - want)[seen].abs().max() < (1e-2 if prediction == "epsilon" else 1e-4)   # epsilon is divided by sqrt(abar) = .006
    w = m.weights(xt, TIMESTEPS)
    assert w.shape == (len(TIMESTEPS), 12) and (w.sum(1) - 1).abs().max() < 1e-5 and w.min() >= 0


def test_the_exact_score_is_the_gradient_of_the_log_density():
    m = exact()
    for x, t in zip(noisy(m).double(), TIMESTEPS[1:]):
        s, n, x = m.abar[t].double().sqrt(), (1 - m.abar[t].double()).sqrt(), x.clone().requires_grad_()
        log_p = torch.stack([-((x - s*v)**2).sum()/(2*n*n) for v in X0.double()]).logsumexp(0)
        score, = torch.autograd.grad(log_p, x)
        x0 = m.x0_hat(x.detach().float()[None], t[None])[0].double()
        assert (n*n*score - (s*x0 - x)).abs().max() < 1e-4


@pytest.mark.parametrize("broken", ["no signal", "no square", "no half"])
def test_a_wrong_posterior_is_seen(broken):
    m = exact()
    xt, (s, n) = noisy(m), (v.flatten(1) for v in amplitudes(TIMESTEPS, m.abar))
    far = {"no signal": torch.cdist(xt.flatten(1), X0.flatten(1)), "no square": n.sqrt()*torch.cdist(xt.flatten(1)/s, X0.flatten(1))*s,
           "no half": 2**.5*torch.cdist(xt.flatten(1)/s, X0.flatten(1))*s}[broken]
    assert ((-.5*(far/n)**2).softmax(1) - m.weights(xt, TIMESTEPS)).abs().max() > .01


def test_memory_of_the_exact_denoiser_is_bounded(monkeypatch):
    m, rows, weights = exact(block=4*(12 + 768)), [], ExactDenoiser.weights
    monkeypatch.setattr(ExactDenoiser, "weights", lambda self, x, t, among=None: rows.append(len(x)) or weights(self, x, t, among))
    xt, t = row_noise(0, range(11), (3, 16, 16)), torch.full((11,), 500)
    a = m.predict(xt, t)
    assert rows == [4, 4, 3] and (exact(block=1).predict(xt, t) - a).abs().max() < 1e-5 > (exact().predict(xt, t) - a).abs().max()
    assert exact().predict(xt[:0], t[:0]).shape == (0, 3, 16, 16)


def test_near_twins_and_a_single_image():
    twins = torch.cat([X0[:1], X0[:1] + 1e-3*torch.sign(row_noise(1, [0], (3, 16, 16)))]).clamp(-1, 1)
    m = exact(x0=twins)
    xt = noisy(m, X0[:1])
    assert (m.x0_hat(xt, TIMESTEPS) - by_loop(m, xt, TIMESTEPS, twins)).abs().max() < 1e-3
    assert (exact(x0=X0[:1]).x0_hat(xt, TIMESTEPS) - X0[:1]).abs().max() < 1e-6


@pytest.mark.parametrize("x0,error", [(X0[:0], ValueError), (X0*200, ValueError), (X0[0], ValueError), (None, TypeError)])
def test_wrong_training_sets_are_refused(x0, error):
    with pytest.raises(error): exact(x0=x0)


def test_the_exact_denoiser_takes_no_labels():
    with pytest.raises(ValueError, match="no labels"): exact().predict(X0, torch.tensor([3]*12), torch.zeros(12).long())


@pytest.mark.parametrize("eta", [0., 1.])
@every
def test_samples_of_the_exact_denoiser_are_copies(prediction, eta):
    x = sample(exact(prediction), 8, steps=50, eta=eta, seed=1)
    assert nearest(x, X0).max() < .05 < torch.pdist(X0.flatten(1)).min()
    assert (sample(exact(prediction), 8, steps=50, eta=eta, seed=1, batch=3) - x).abs().max() < 1e-3


def test_the_exact_denoiser_is_called_like_a_network():
    m, x = exact(), row_noise(0, range(3), (3, 16, 16))
    a = m.predict(x, torch.tensor([500]*3))
    for t in (500, torch.tensor(500), torch.tensor([500])): assert torch.equal(m(x, t).sample, a)


# ---------------------------------------------------------------- which schedulers fit

def make(name, of=NET.recipe, **kw):
    return getattr(diffusers, f"{name}Scheduler").from_config(of.schedule().config, **kw)


STEEP = {"HeunDiscrete", "KDPM2AncestralDiscrete"}


@pytest.mark.parametrize("spacing,betas", [("leading", "linear"), ("trailing", "linear"), ("trailing", "cosine")])
@pytest.mark.parametrize("name", [
    "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerAncestralDiscrete",
    "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "PNDM", "SASolver", "TCD",
    "UniPCMultistep"])
def test_these_fit(name, spacing, betas):
    m, steps = exact(betas=betas), 50 if betas == "cosine" and name in STEEP else 20
    s = make(name, m.recipe, timestep_spacing=spacing)
    assert misfit(s, m.recipe, steps) < .08
    x = sample(m, 4, steps, seed=1, scheduler=s)
    assert nearest(x, X0).max() < 1 < 2*torch.pdist(X0.flatten(1)).median()
    assert (sample(m, 4, steps, seed=1, scheduler=s, batch=1) - x).abs().max() < 1e-3


@pytest.mark.parametrize("name", sorted(STEEP))
@pytest.mark.parametrize("steps", [10, 20])
def test_a_step_that_blows_differences_up_is_refused(name, steps):
    "Between timesteps a factor of thousands apart; one known picture would not tell, since nothing differs."
    m = exact(betas="cosine")
    with pytest.raises(ValueError, match=f"{name}Scheduler does not fit"):
        sample(m, 1, steps, scheduler=make(name, m.recipe, timestep_spacing="trailing"))


@pytest.mark.parametrize("name,kw", [("DDIMInverse", {}), ("DPMSolverMultistepInverse", {}), ("CogVideoXDDIM", {}), ("CogVideoXDPM", {}),
    ("EDMEuler", {}), ("EDMDPMSolverMultistep", {}), ("IPNDM", {}), ("CMStochasticIterative", {}), ("FlowMatchEulerDiscrete", {}),
    ("FlowMatchHeunDiscrete", {}), ("RePaint", {}), ("DDPMWuerstchen", {}), ("ScoreSdeVe", {}), ("SCM", {}),
    ("DPMSolverMultistep", dict(use_flow_sigmas=True)), ("UniPCMultistep", dict(use_flow_sigmas=True)),
    ("EulerDiscrete", dict(timestep_type="continuous")), ("EulerDiscrete", dict(interpolation_type="log_linear")),
    ("DDIM", dict(trained_betas=[.01]*1000)), ("DDIM", dict(trained_betas=[.01]*10))])
@pytest.mark.parametrize("steps", [10, 50])
def test_these_are_refused_by_name(name, kw, steps):
    with pytest.raises(ValueError, match=f"{name}Scheduler (does not|has another)"): sample(NET, 1, steps, scheduler=make(name, **kw))


def test_a_scheduler_that_is_no_use_in_few_steps_is_refused():
    with pytest.raises(ValueError, match="PNDMScheduler does not work with 3 steps"): sample(NET, 1, 3, scheduler=make("PNDM"))
    with pytest.raises(ValueError, match="LCMScheduler does not work with 60 steps"): sample(NET, 1, 60, scheduler=make("LCM"))


def test_a_scheduler_is_tried_once_and_not_changed(monkeypatch):
    seen, s = [], make("DPMSolverMultistep")
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in vars(s).items()}
    monkeypatch.setattr(sampling, "misfit", lambda *a: seen.append(a) or 0.)
    sample(NET, 4, 3, scheduler=s, batch=1)
    sample(NET, 4, 3)
    assert len(seen) == 1 and all(str(v) == str(vars(s)[k]) for k, v in before.items())


def test_stochastic_solvers_draw_from_the_rows_without_eta():
    "A solver whose noise eta does not switch."
    for name, kw in (("DPMSolverMultistep", dict(algorithm_type="sde-dpmsolver++")), ("EulerAncestralDiscrete", {}), ("SASolver", {})):
        a = []
        for seed in (3, 4):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            a.append(sample(NET, 3, 6, scheduler=make(name, **kw), seed=1))
            assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(*a) and (sample(NET, 3, 6, scheduler=make(name, **kw), seed=1, batch=1) - a[0]).abs().max() < 1e-3


# ---------------------------------------------------------------- ancestral, clipping

@torch.no_grad()
def ancestral(m, steps, clip, n=3, seed=2):
    "Every state of diffusers' DDPMScheduler that is handed the fresh noise of our rows."
    s, out = make("DDPM", timestep_spacing="trailing", clip_sample=clip), []
    s.set_timesteps(steps)
    x, *fresh = (row_noise(seed, range(n), (3, 16, 16), 20 + k) for k in range(steps + 1))
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **kw: fresh.pop(0)):
        for t in s.timesteps:
            x = s.step(m(x, t).sample, t, x).prev_sample
            out.append(x)
    return torch.stack(out)


def path(m, steps, clip, eta=1., n=3, seed=2):
    return torch.stack([d.x for d in sample_steps(m, range(n), steps, eta, seed, ddim(m.recipe, clip))])


@pytest.mark.parametrize("m,steps,bound", [(exact(), 1000, 1e-3), (exact(), 50, 1e-4), (NET, 50, 1e-3)])
def test_eta_1_is_ancestral_sampling(m, steps, bound):
    assert (path(m, steps, False) - ancestral(m, steps, False)).abs().max() < bound


def test_with_clipping_they_part(): assert (path(NET, 20, True) - ancestral(NET, 20, True)).abs().max() > .01


def test_clip_is_an_argument():
    assert ddim(NET.recipe).config.clip_sample and not ddim(NET.recipe, clip=False).config.clip_sample
    def largest(clip): return max(d.x0_hat.abs().max() for d in sample_steps(NET, range(2), 5, scheduler=ddim(NET.recipe, clip)))
    assert largest(True) <= 1 < largest(False)


# ---------------------------------------------------------------- stock diffusers, offline

def quiet(pipe): return pipe.set_progress_bar_config(disable=True) or pipe


@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
def test_stock_pipelines_draw_our_images(prediction, tmp_path):
    m = net(prediction)
    before = dict(m.config)
    as_pipeline(m).save_pretrained(tmp_path)
    index = json.loads((tmp_path/"model_index.json").read_text())
    assert dict(m.config) == before and index["unet"] == ["rulediff_nb.unet", "RuleUNet"]
    pipe = quiet(DDIMPipeline.from_pretrained(tmp_path))
    def noise(shape, **kw): return row_noise(4, range(shape[0]), shape[1:], 20)
    with mock.patch("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", noise):
        x = pipe(batch_size=3, num_inference_steps=7, output_type="pt").images*2 - 1
    assert (x - sample(m, 3, 7, 0., 4, ddim(m.recipe), precision="fp32")).abs().max() < 1e-5
    y = quiet(DDPMPipeline.from_pretrained(tmp_path))(batch_size=2, num_inference_steps=7, output_type="pt").images
    assert y.shape == (2, 3, 16, 16) and y.isfinite().all()
    assert RuleUNet.from_pretrained(tmp_path, subfolder="unet").recipe == m.recipe


def test_a_pipeline_loads_in_a_process_of_its_own(tmp_path):
    "Nothing but the import of the network's module is needed; without it diffusers says so."
    as_pipeline(NET).save_pretrained(tmp_path)
    load = ("from diffusers import DDPMPipeline; p = DDPMPipeline.from_pretrained('.'); "
            "print(p(num_inference_steps=2, output_type='np').images.shape)")
    for first, good in (("import rulediff_nb.unet; ", True), ("", False)):
        r = subprocess.run([sys.executable, "-c", first + load], cwd=tmp_path, env=clean_env(), capture_output=True, text=True)
        assert (r.returncode == 0) == good and (r.stdout.strip() == "(1, 16, 16, 3)" if good else "rulediff_nb.unet" in r.stderr)


def test_only_networks_become_pipelines():
    with pytest.raises(TypeError, match="ExactDenoiser"): as_pipeline(exact())


@pytest.mark.parametrize("whole", [False, True])
def test_pushing_sends_a_folder_that_loads(whole, tmp_path, monkeypatch):
    sent = {}

    def upload(repo_id, folder_path, **kw):
        sent["to"] = repo_id
        shutil.copytree(folder_path, tmp_path/"hub")
    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **kw: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    (as_pipeline(NET) if whole else NET).push_to_hub("someone/two-squares")
    again = DDPMPipeline.from_pretrained(tmp_path/"hub").unet if whole else RuleUNet.from_pretrained(tmp_path/"hub")
    assert sent["to"] == "someone/two-squares" and again.recipe == NET.recipe and (tmp_path/"hub/README.md").exists()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in NET.state_dict().items())


# ---------------------------------------------------------------- precision

class Asked(torch.nn.Module):
    "A model around a model that wants a gradient of it too, as guidance does; it notes in what precision each was computed."
    def __init__(self, model, broken=False):
        super().__init__()
        self.model, self.recipe, self.broken, self.seen = model, model.recipe, broken, []
        model.net.conv_out.register_forward_hook(lambda m, x, out: self.seen.append((torch.is_grad_enabled(), out.dtype)))

    def predict(self, xt, t, y=None):
        out = self.model.predict(xt, t)
        if self.broken: raise RuntimeError("broken")
        with torch.enable_grad():
            x = xt.detach().requires_grad_()
            g, = torch.autograd.grad(self.model.predict(x, t).square().sum(), x)
        assert g.abs().max() > 0 and g.dtype == torch.float32 and not torch.is_autocast_enabled(xt.device.type)
        return out + 0*g


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_the_network_is_halved_and_no_gradient(precision):
    m = Asked(net())
    x = sample(m, 3, 4, 1., precision=precision)
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    assert m.seen == [(False, half), (True, torch.float32)]*4 and x.dtype == torch.float32
    assert "forward" not in vars(m.model.net) and all(p.dtype == torch.float32 for p in m.parameters())


def test_a_network_is_as_before_after_an_error():
    m = Asked(net(), broken=True)
    with pytest.raises(RuntimeError, match="broken"): sample(m, 2, 2, precision="bf16")
    assert "forward" not in vars(m.model.net)


def test_noise_and_the_schedulers_arithmetic_stay_float32(monkeypatch):
    seen, step, m = [], LogSigmaScheduler.step, net("epsilon")   # without preconditioning the network's output is the prediction

    def noted(self, out, t, x, **kw):
        seen.append((out.dtype, x.dtype, kw["variance_noise"].dtype if "variance_noise" in kw else torch.float32))
        if len(seen) == 1: assert torch.equal(x, row_noise(5, range(3), (3, 16, 16), 20))
        return step(self, out, t, x, **kw)
    monkeypatch.setattr(LogSigmaScheduler, "step", noted)
    sample(m, 3, 4, 1., 5, precision="bf16")
    assert len(seen) == 4 and {d for s in seen for d in s} == {torch.float32}


def test_bf16_draws_nearly_the_same_images():
    a, b = (sample(NET, 20, 10, 1., 3, precision=p) for p in ("fp32", "bf16"))
    assert 1e-5 < (a - b).abs().max() and (a - b).abs().amax((1, 2, 3)).median() < .1
    assert torch.equal(b, sample(NET, 20, 10, 1., 3, precision="bf16"))
    assert torch.equal(list(sample_steps(NET, range(20), 10, 1., 3, precision="bf16"))[-1].x.clamp(-1, 1), b)


def test_the_default_precision_is_bf16_where_it_gains(monkeypatch):
    asked = []
    monkeypatch.setattr(sampling, "bf16_gains", lambda device: asked.append(device) or True)
    assert check_precision(NET, None, FEW) == [NET.net] and not check_precision(NET, None, FEW - 1)
    assert not check_precision(net().to(torch.bfloat16), None, FEW) and not check_precision(exact(), None, FEW)
    assert not check_precision(NET, "fp32", FEW) and check_precision(NET, "bf16", 1) == [NET.net]
    assert torch.equal(sample(NET, FEW, 3), sample(NET, FEW, 3, precision="bf16"))
    assert torch.equal(sample(NET, FEW, 3, batch=2), sample(NET, FEW, 3, batch=2, precision="fp32"))
    monkeypatch.setattr(sampling, "bf16_gains", lambda device: False)
    assert not check_precision(NET, None, FEW) and torch.equal(sample(NET, FEW, 3), sample(NET, FEW, 3, precision="fp32"))
    assert {d.type for d in asked} == {"cpu"}


@pytest.mark.parametrize("have,gains", [(dict(avx512_bf16=True), True), (dict(avx512_bf16=False), False), ({}, False)])
def test_where_bf16_gains(have, gains, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: have, raising=False)
    assert bf16_gains(torch.device("cpu")) is gains and not bf16_gains(torch.device("cuda")) and not bf16_gains(torch.device("mps"))


def test_an_older_torch_that_cannot_tell_stays_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not bf16_gains(torch.device("cpu"))


@pytest.mark.parametrize("precision", ["fp16", "", 16, True])
def test_unknown_precisions(precision):
    for n in (0, 2):
        with pytest.raises(ValueError, match=f"must be 'fp32', 'bf16' or None, got {precision!r}"): sample(NET, n, 2, precision=precision)


def test_bf16_without_a_network_is_refused():
    with pytest.raises(ValueError, match="ExactDenoiser holds no network"): sample(exact(), 2, 2, precision="bf16")


# ---------------------------------------------------------------- a bar

@pytest.mark.parametrize("progress,notebook,delay", [(None, True, 5.), (None, False, None), (True, False, 0.), (True, True, 0.), (False, True, None)])
def test_who_sees_a_bar(progress, notebook, delay, monkeypatch):
    seen = []
    monkeypatch.setattr(sampling, "IN_NOTEBOOK", notebook)
    monkeypatch.setattr(sampling, "progress_bar", lambda steps, total, label, delay: seen.append((total, delay, v := list(steps))) or v)
    x = sample(NET, 5, 3, batch=2, progress=progress)
    assert torch.equal(x, sample(NET, 5, 3, batch=2, progress=False))
    assert [d for _, d, _ in seen] == ([] if delay is None else [delay]) and all(total == len(v) for total, _, v in seen)


@pytest.mark.parametrize("test", ["", "1"])
def test_a_bar_is_drawn_unless_notebooks_are_tested(test, monkeypatch, capsys):
    monkeypatch.setenv("IN_TEST", test)
    sample(NET, 3, 3, progress=True)
    assert bool(capsys.readouterr().err) == (not test)


# ---------------------------------------------------------------- the default sampler

def log_sigma(steps, betas="cosine", **kw):
    s = LogSigmaScheduler.from_config(recipe("laptop", TASK, betas=betas).schedule().config, **kw)
    s.set_timesteps(steps)
    return s


@pytest.mark.parametrize("betas", ["linear", "cosine", "zero_snr"])
@pytest.mark.parametrize("steps", [1, 2, 3, 25, 100, 1000])
def test_steps_are_equal_in_ln_sigma_and_none_comes_twice(betas, steps):
    t = log_sigma(steps, betas).timesteps
    assert len(t) == steps and t[0] == 999 and (t.diff() < 0).all() and t[-1] >= 0
    if steps == 25:
        ln = log_sigma(steps, betas).sigmas_at(t[1:]).log()
        assert ln[0] == pytest.approx(np.log(40), abs=.05) and ln[-1] == pytest.approx(np.log(.02), abs=.25)
        assert (ln.diff()[:15] + np.log(2000)/23).abs().max() < .05   # further down the timesteps are coarser than that


def test_without_order_and_noise_it_is_ddim_on_its_own_timesteps():
    "Between the same two timesteps, clipped or not, the step of diffusers' DDIM (whose noise comes from the clipped image then)."
    s, d = log_sigma(1000, "linear", second_above=float("inf"), highest=1e3, lowest=1e-3), ddim(recipe("laptop", TASK, betas="linear"))
    d.set_timesteps(1000)
    assert torch.equal(s.timesteps, d.timesteps)
    x, out = row_noise(0, range(2), (3, 16, 16), 20), row_noise(1, range(2), (3, 16, 16), 20)
    for t, eta in ((999, 0.), (500, 0.), (500, 1.), (3, .5)):
        z = row_noise(2, range(2), (3, 16, 16), 20)
        want = d.step(out, t, x, eta=eta, use_clipped_model_output=True, **dict(variance_noise=z) if eta else {})
        got = s.step(out, t, x, eta=eta, variance_noise=z)
        for k in ("prev_sample", "pred_original_sample"): assert (got[k] - want[k]).abs().max() < 1e-4, (t, eta, k)


@pytest.mark.parametrize("eta", [0., 1.])
def test_second_order_is_dpm_solver(eta):
    "From the second step on, the update of diffusers' DPM-Solver++ (2M) between the same noise levels, with fresh noise its SDE form."
    m = exact()
    ours = log_sigma(12, "linear", clip_sample=False)
    kind = "sde-dpmsolver++" if eta else "dpmsolver++"
    lib = diffusers.DPMSolverMultistepScheduler.from_config(m.recipe.schedule().config, lower_order_final=False, algorithm_type=kind)
    lib.set_timesteps(12)
    a = lib.alphas_cumprod[ours.timesteps].double()
    lib.timesteps, lib.sigmas = ours.timesteps, torch.cat([((1 - a)/a).sqrt(), torch.zeros(1)]).float()
    x = y = row_noise(3, range(2), (3, 16, 16), 20)
    for k, t in enumerate(ours.timesteps[:-1]):
        z = row_noise(4, range(2), (3, 16, 16), 21 + k)
        noise = dict(variance_noise=z) if eta else {}
        x = ours.step(m.predict(x, t), t, x, eta=eta, **noise).prev_sample
        y = lib.step(m.predict(y, t), t, y, **noise).prev_sample
        assert (x - y).abs().max() < 2e-3, int(t)


def spread_of_a_gaussian(s, eta, size, n=100_000):
    "Standard deviation over the true one, of what the exact denoiser of N(0, size^2) draws."
    r = recipe("laptop", TASK)
    abar, fresh, x = r.schedule().alphas_cumprod, eta_of(eta, r), torch.from_numpy(np.random.default_rng(0).standard_normal((n, 1, 1, 1)))
    for k, t in enumerate(s.timesteps):
        a, b = abar[t].double().sqrt(), (1 - abar[t].double()).sqrt()
        x0 = a*size**2/(a*a*size**2 + b*b)*x
        z = torch.from_numpy(np.random.default_rng(k + 1).standard_normal(x.shape))
        x = s.step((a*x - x0)/b, t, x, eta=fresh(int(t)), variance_noise=z).prev_sample
    return (x.std()/size).item()


@pytest.mark.parametrize("size", [.25, .5, 1., 2., 4.])
@pytest.mark.parametrize("eta", ["auto", 0., 1.])
def test_the_default_keeps_the_spread_of_a_gaussian(size, eta):
    "No finite set shows this: its exact denoiser has settled on one image where small differences are decided."
    assert abs(spread_of_a_gaussian(log_sigma(25, clip_sample=False), eta, size) - 1) < (.03 if eta == 1 else .02)   # 1 is not the default
    if size <= 1: assert spread_of_a_gaussian(log_sigma(25, clip_sample=False, second_above=float("inf")), eta, size) < .95


def test_fresh_noise_is_a_function_of_the_timestep():
    r = recipe("laptop", TASK)
    abar, eta = r.schedule().alphas_cumprod.double(), fresh_below(r)
    for t in range(0, 1000, 37): assert eta(t) == float((1 - abar[t])/abar[t] <= TURN**2)
    assert eta_of("auto", r)(999) == 0 and eta_of("auto", r)(0) == 1 and eta_of(.3, r)(5) == .3 and eta_of(lambda t: t/999, r)(999) == 1
    a, b, c = (sample(NET, 2, 6, e, 1) for e in ("auto", fresh_below(NET.recipe), 1.))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("eta", ["always", -1., 1.5, float("nan"), lambda t: 2.])
def test_wrong_fresh_noise_is_refused(eta):
    with pytest.raises(ValueError, match="eta must be 'auto', in"): sample(NET, 1, 3, eta)


def test_the_default_covers_where_ancestral_steps_shrink():
    "The exact denoiser of discs: 25 ancestral steps equal in t draw them too small; the default does not."
    task = get_task("two_circles", size=16)
    r = recipe("laptop", task)
    m = ExactDenoiser(task.sample(500, 0)[0], r)
    def size(**kw): return task.features(sample(m, 128, 25, seed=3, batch=128, **kw)).r2.mean()/task.factors(500, 0).r2.mean()
    assert abs(size() - 1) < .04 and size(eta=1., scheduler=ddim(r)) < size() - .02


# ---------------------------------------------------------------- the studies

CPU = torch.device("cpu")


@pytest.mark.parametrize("name,row", [("sampling", Setting), ("precision", InPrecision)])
def test_the_plan_is_the_stored_table(name, row):
    study, df = STUDIES[name], results(name)
    r = study.plan(True)[0]
    line = study.measure(r, Work((Shipped(r.task, r.palette).load(None, CPU),), CPU))
    assert study.needs(r) == (Shipped(r.task, r.palette),) and {"rule_gap", "diff", "same"} <= set(line)
    if outdated(name): return   # its rows are those of an earlier plan
    assert [[str(v) for v in r] for r in study.plan(False)] == df[list(row._fields)].astype(str).values.tolist()
    assert list(line) == [c for c in df if c not in (*row._fields, *KEPT)]


def test_the_exact_study_has_every_task_with_every_sampler():
    df = results("exact")
    assert len(df) == len(STUDIES["exact"].plan(False)) == 5*13 and not outdated("exact")
    assert (df.groupby(["scheduler", "steps", "eta"]).task.nunique() == 5).all() and (df.rule_gap.abs() < .1).all()
    line = STUDIES["exact"].measure(STUDIES["exact"].plan(True)[0], Work((), CPU))
    assert list(line) == [c for c in df if c not in ("task", "scheduler", "steps", "eta", "n", *KEPT)]


def test_the_stored_tables_are_sound():
    default = dict(scheduler="log sigma, second order", steps=25, eta="auto", clip=True)
    for name, same in (("sampling", default), ("precision", dict(precision="fp32"))):
        df = results(name)
        if outdated(name) and name == "sampling": same = dict(scheduler="DDIM", steps=50, eta=1., clip=True)   # what it was compared with then
        for k in ("rule_gap", "readable", "coarse", "diff"):
            assert (df[f"{k}_low"] <= df[k] + 1e-6).all() and (df[k] <= df[f"{k}_high"] + 1e-6).all(), (name, k)
        assert (df.rule_gap_floor == 0).all() and (df.rule_gap_chance - 1).abs().max() < 1e-5
        of_itself = (df[list(same)] == list(same.values())).all(axis=1)
        assert of_itself.sum() >= 2 and (df["diff"][of_itself] == 0).all() and (df["diff"][~of_itself] != 0).all(), name


def test_a_paired_difference():
    real = real_images(TASK, 64)
    off = Measured(*(v.clone() for v in real.floor))
    off.b[:16] *= 1.2
    a, b = paired_gap(TASK, off, real.floor), paired_gap(TASK, real.floor, off)
    assert a["diff"] == -b["diff"] > 0 and (a["diff_low"], a["diff_high"]) == (-b["diff_high"], -b["diff_low"])
    assert 0 < a["diff_low"] < a["diff"] < a["diff_high"] and paired_gap(TASK, off, off) == dict(diff=0., diff_low=0., diff_high=0., same=True)


def test_pairing_makes_the_interval_narrower():
    "Rows that share most of their error: against other rows of the same kind the interval is much wider."
    x = TASK.sample(128, 3)[0]
    m = measure(TASK, (x + .1*row_noise(1, range(128), x.shape[1:])).clamp(-1, 1))
    worse = m._replace(b=m.b*1.001)
    def width(d): return d["diff_high"] - d["diff_low"]
    assert width(paired_gap(TASK, worse, m)) < .5*width(paired_gap(TASK, worse, Measured(*(v.flip(0) for v in m))))


def test_a_setting_is_compared_with_the_reference_of_its_size(monkeypatch):
    asked = []
    monkeypatch.setattr(sampling, "_reference", lambda row, device: asked.append(row) or measure(net_task, x))
    net_task = get_task("two_squares", palette="fixed")
    x = net_task.sample(8, 1)[0]
    monkeypatch.setattr(sampling, "sample", lambda *a, **kw: x)
    row = Setting("two_squares", "fixed", "DDPM", 20, 0., False, 8)
    line = sampling._measure_setting(row, Work((SimpleNamespace(recipe=recipe("laptop", net_task), task=net_task, trained_on=None),), CPU))
    assert asked == [Setting("two_squares", "fixed", "log sigma, second order", 25, "auto", True, 8)] and line["nfe"] == 20 and line["diff"] == 0
    assert line["memorized"] is None and line["seed"] == sampling.SAMPLING_SEED


@pytest.mark.parametrize("name,steps,nfe", [("DDIM", 10, 10), ("KDPM2Discrete", 11, 21), ("PNDM", 20, 29)])
def test_network_evaluations_of_a_scheduler(name, steps, nfe):
    s = sampling._scheduler(name, False, NET.recipe)
    s.set_timesteps(steps)
    assert len(s.timesteps) == nfe and (name != "DDIM" or s.config.clip_sample is False)


def test_a_pair_is_drawn_in_both_precisions(monkeypatch):
    asked = []

    def drawn(model, n, steps, eta, seed, scheduler, batch, y, first, precision, progress):
        asked.append((precision, first, n))
        return torch.cat([TASK32.sample(n, 40 + first)[0]])
    TASK32, draw = get_task("two_squares", palette="fixed"), sampling._draw_pair.__wrapped__
    monkeypatch.setattr(sampling, "sample", lambda m, n, *a, **kw: drawn(m, n, *a) if a[1:] else None)
    monkeypatch.setattr(sampling, "load_pretrained", lambda *a, **kw: SimpleNamespace(task=TASK32))
    d = draw(InPrecision("two_squares", "fixed", "bf16", 10, 2, 0., 9), CPU, 4)
    assert asked == [(p, first, min(4, 10 - first)) for first in (0, 4, 8) for p in ("fp32", "bf16")]
    assert {k: len(v) for k, v in d.seconds.items()} == dict(fp32=3, bf16=3) and all(len(v.a) == 10 for v in d.measured.values())


# ---------------------------------------------------------------- weights

def shipped(folder, name="two_squares-fixed"):
    m = net()
    save_release(folder, name, m.state_dict(), dict(recipe=m.recipe.to_dict(), seed=0, steps=1, images_in_set=4))
    return m


def test_weights_round_trip(tmp_path):
    m, again = shipped(tmp_path), load_pretrained("two_squares", folder=tmp_path)
    assert again.recipe == m.recipe and not again.training and again.manifest["steps"] == 1
    for p, q in zip(m.parameters(), again.parameters()): assert torch.equal(p.half().float(), q) and q.dtype == torch.float32
    assert (sample(again, 2, steps=5) - sample(m, 2, steps=5)).abs().max() < .05


@pytest.mark.parametrize("name,near", [("", ""), ("squares", "two_squares"), ("two_squares-fixed", "two_squares"), (None, ""), (3, "")])
def test_unknown_names_list_the_known_ones(name, near, tmp_path):
    said = f", did you mean '{near}'[?]" if near else ""
    with pytest.raises(ValueError, match=f"unknown task {name!r}{said}; known: sun_shadow, .*two_squares"): load_pretrained(name, folder=tmp_path)


def test_missing_weights_list_what_is_there(tmp_path):
    with pytest.raises(StoreError, match="there are: none"): load_pretrained("two_squares", folder=tmp_path/"gone")
    shipped(tmp_path)
    for kw in (dict(name="two_circles"), dict(name="two_squares", palette="random"), dict(name="two_squares", palette="sepia")):
        with pytest.raises(StoreError, match="there are: two_squares-fixed"): load_pretrained(folder=tmp_path, **kw)
    with pytest.raises(StoreError, match="no weights 'two_squares-fixd'.*did you mean 'two_squares-fixed'"):
        load_pretrained("two_squares", "fixd", tmp_path)


def test_a_path_loads_what_stands_there(tmp_path, monkeypatch):
    m = shipped(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    rel = tmp_path.name
    for path in (tmp_path, str(tmp_path), rel, f"{rel}/two_squares-fixed.json", tmp_path/"two_squares-fixed.safetensors"):
        again = load_pretrained(path, "random")   # a path needs no palette
        assert again.recipe == m.recipe and all(torch.equal(p.half().float(), q) for p, q in zip(m.parameters(), again.parameters()))
    monkeypatch.chdir(tmp_path)
    assert load_pretrained("two_squares-fixed.json").recipe == m.recipe


def test_a_file_of_any_name_loads_by_its_path(tmp_path):
    shipped(tmp_path, "mine")
    assert load_pretrained(tmp_path).task == load_pretrained(tmp_path/"mine.json").task == TASK
    with pytest.raises(StoreError, match="no weights 'two_squares-fixed'.*there are: mine"): load_pretrained("two_squares", folder=tmp_path)


def test_a_folder_that_is_called_like_a_task_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path/"two_squares").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_pretrained("two_squares").manifest["steps"] > 1
    with pytest.raises(StoreError, match="must hold the weights of one model, it holds 0: none"): load_pretrained("./two_squares")


def test_a_path_that_is_not_clear_says_what_there_is(tmp_path):
    with pytest.raises(StoreError, match="it holds 0: none"): load_pretrained(tmp_path)
    with pytest.raises(StoreError, match="no folder .*gone"): load_pretrained(tmp_path/"gone")
    shipped(tmp_path)
    with pytest.raises(StoreError, match="no weights 'two_square-fixed'.*did you mean 'two_squares-fixed'"):
        load_pretrained(tmp_path/"two_square-fixed.safetensors")
    (tmp_path/"checkpoint.safetensors").write_bytes(b"")   # a run's: no weights to ship
    with pytest.raises(StoreError, match="no weights 'checkpoint'.*there are: two_squares-fixed"):
        load_pretrained(tmp_path/"checkpoint.safetensors")
    shipped(tmp_path, "two_squares-random")
    with pytest.raises(StoreError, match="it holds 2: two_squares-fixed, two_squares-random; name one, such as .*two_squares-fixed.safetensors"):
        load_pretrained(tmp_path)


def old_weights(folder, name="two_circles-pure"):
    "As version 0.1 wrote them."
    m = unet("laptop", get_task("two_circles", palette="fixed", size=16), 0, **SMALL)
    r = m.recipe.to_dict()
    r = {k: v for k, v in r.items() if k not in ("sigma_data", "posterior_mean")} | dict(contrast=.3, exact_target=True)
    r["task"] = r["task"] | dict(palette="pure")
    save_release(folder, name, m.state_dict(), dict(recipe=r, seed=0, set_seed=0, steps=1, images_in_set=4))


@pytest.mark.parametrize("args", [("two_circles",), ("two_circles", "random"), ("two_circles", "paper")])
def test_weights_of_version_0_1_say_what_to_do(args, tmp_path):
    old_weights(tmp_path)
    with pytest.raises(StoreError, match="two_circles-pure.*version 0.1.*train again, or use rulediff_nb 0.1") as e:
        load_pretrained(*args, folder=tmp_path)
    assert ("'paper' is called 'random'" in str(e.value)) == ("paper" in args) and "did you mean" not in str(e.value)


@pytest.mark.parametrize("name", ["two_circles-pure", "two_circles-fixed"])
def test_recipes_of_version_0_1_say_what_to_do(name, tmp_path):
    old_weights(tmp_path, name)
    for path in (tmp_path, tmp_path/f"{name}.json"):
        with pytest.raises(StoreError, match=f"{name}.*before version 0.2.*contrast, exact_target; train again, or use"): load_pretrained(path)


def test_the_old_name_of_a_palette_is_explained():
    for old, new in dict(pure="fixed", paper="random").items():
        with pytest.raises(StoreError, match=f"palette '{old}' is called '{new}'"): load_pretrained("two_circles", old)


# ---------------------------------------------------------------- what a model was trained on

def test_a_loaded_model_draws_its_training_set_again(monkeypatch):
    drawn, draw = [], type(TASKS["two_squares"]).sample
    monkeypatch.setattr(type(TASKS["two_squares"]), "sample", lambda self, n, seed, **kw: drawn.append((n, seed)) or draw(self, n, seed, **kw))
    sampling._training_set.cache_clear()
    m = load_pretrained("two_squares")
    assert m.task == get_task("two_squares", palette="fixed") and not drawn   # not before it is asked for
    x = m.trained_on
    assert drawn == [(2000, 0)] and torch.equal(x, draw(m.task, 2000, 0)[0]) and m.trained_on is x and len(drawn) == 1


def test_a_training_set_with_other_bits_warns(tmp_path):
    m = net()
    for sha, warns in (("0"*64, True), (store.content_hash(dict(x0=TASK.sample(4, 3)[0]), {}), False)):
        save_release(tmp_path, "a", m.state_dict(), dict(recipe=m.recipe.to_dict(), set_seed=3, images_in_set=4, images_sha256=sha))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert torch.equal(load_pretrained(tmp_path).trained_on, TASK.sample(4, 3)[0])
        assert [str(w.message) for w in said if "other bits" in str(w.message)] != [] if warns else not said


def test_what_a_model_was_trained_on_may_be_unknown(tmp_path):
    assert net().trained_on is None and net().task == TASK
    m = net()
    save_release(tmp_path, "a", m.state_dict(), dict(recipe=m.recipe.to_dict()))
    assert load_pretrained(tmp_path).trained_on is None
    assert exact().task == TASK and exact().trained_on is X0


def test_a_training_set_is_neither_weights_nor_copied_along():
    m = net()
    m.trained_on = X0
    assert m.trained_on is X0 and set(m.state_dict()) == set(net().state_dict()) and "x0" not in str(m.config)
    assert RuleUNet(m.config.recipe).trained_on is None and copy.copy(m).trained_on is X0


def test_a_report_knows_the_training_set_of_a_model():
    m = net()
    m.trained_on = X0
    assert rule_report(m, X0).memorized == 1 and rule_report(net(), X0).memorized is None and rule_report(exact(), X0).memorized == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "gone", "manifest"])
def test_damaged_weights_are_refused_by_name(damage, tmp_path):
    shipped(tmp_path)
    f, j = tmp_path/"two_squares-fixed.safetensors", tmp_path/"two_squares-fixed.json"
    blob = f.read_bytes()
    if damage == "gone": f.unlink()
    elif damage == "manifest": j.write_text(j.read_text()[:-30])
    else: f.write_bytes(dict(cut=blob[:-9], flip=blob[:-9] + b"\x33" + blob[-8:], foreign=b"PK\3\4" + blob[4:])[damage])
    with pytest.raises(StoreError, match="two_squares-fixed"): load_pretrained("two_squares", folder=tmp_path)


def test_weights_of_another_world_are_refused(tmp_path):
    "A file that was renamed: its recipe says what it is."
    shipped(tmp_path)
    for e in ("json", "safetensors"): shutil.copy(tmp_path/f"two_squares-fixed.{e}", tmp_path/f"two_circles-random.{e}")
    with pytest.raises((StoreError, ValueError), match="two_circles"): load_pretrained("two_circles", "random", tmp_path)


@pytest.mark.parametrize("change", [dict(channels=[8, 16, 16]), dict(layers=2), dict(unknown=1), dict(task=None),
                                    dict(task={"name": "moon"})])
def test_weights_that_do_not_fit_their_recipe_are_refused_by_name(change, tmp_path):
    shipped(tmp_path)
    j = tmp_path/"two_squares-fixed.json"
    manifest = json.loads(j.read_text())
    changed = manifest | dict(recipe=manifest["recipe"] | change)
    j.write_text(json.dumps(changed | dict(manifest_sha256=store._seal(changed))))
    with pytest.raises(ValueError, match="two_squares-fixed"): load_pretrained("two_squares", folder=tmp_path)


def test_a_model_saved_the_diffusers_way_comes_back(tmp_path):
    NET.save_pretrained(tmp_path)
    again = RuleUNet.from_pretrained(tmp_path).eval()
    assert again.recipe == NET.recipe and torch.equal(sample(again, 2, steps=3), sample(NET, 2, steps=3))


SHIPPED = list_releases(WEIGHTS)
pretrained = pytest.mark.skipif(not SHIPPED, reason=f"no weights in {WEIGHTS.name}/ yet")


@pretrained
@pytest.mark.parametrize("key", SHIPPED or ["none"])
def test_shipped_weights(key):
    name, palette = key.rsplit("-", 1)
    m = load_pretrained(name, palette)
    assert m.recipe.task == get_task(name, palette=palette) and (WEIGHTS/f"{key}.safetensors").stat().st_size <= 6_000_000
    assert {"recipe", "seed", "steps", "images_seen", "revision", "sha256", "hardware", "report"} <= set(m.manifest)
    x = sample(m, 4, steps=10, seed=11)
    assert x.isfinite().all() and x.mean() > .2   # mostly white background
    assert torch.equal(x, sample(m, 4, steps=10, seed=11))


@pretrained
def test_each_world_has_weights(): assert {k.rsplit("-", 1)[0] for k in SHIPPED} == set(TASKS)


def test_names_exported_exist(): assert all(hasattr(sampling, k) for k in sampling.__all__)


@pytest.mark.parametrize("steps", [3, 5, 10, 20, 40, 250])
@pytest.mark.parametrize("betas", ["zero_snr", "cosine"])
def test_next_to_no_signal_at_the_last_level_is_sampled_with_fresh_noise(betas, steps):
    model = ExactDenoiser(get_task("two_squares").sample(4, 0)[0], recipe("laptop", "two_squares", betas=betas))
    assert sampling.sample(model, 2, steps, 1.).isfinite().all()


def test_an_end_that_is_no_number_is_never_returned():
    class Broken(ExactDenoiser):
        def predict(self, xt, t, y=None): return xt*float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity after 3 network evaluations"):
        sampling.sample(Broken(get_task("two_squares").sample(4, 0)[0], recipe("laptop", "two_squares")), 2, 3)


def test_what_is_no_model_is_named():
    with pytest.raises(TypeError, match="recipe.*got str"): sampling.sample("two_squares")


def test_every_setting_of_the_study_fits_the_model():
    "A sampler that is refused would be a row that fails."
    m = unet("laptop", "sun_shadow", channels=(8, 8), attention=(False, False), head_dim=8)
    for s in STUDIES["sampling"].plan(False):
        if s.steps < 1000: sampling.plan(m, s.steps, s.eta, 0, sampling._scheduler(s.scheduler, s.clip, m.recipe))
