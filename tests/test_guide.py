"Guided models are models: exact in their formula, harmless at scale 0, finite at any scale, refused where they cannot be right."
import copy
import math

import diffusers
import numpy as np
import pytest
import torch

from rulediff_nb.classifier import classifier
from rulediff_nb.core import row_noise
from rulediff_nb.guide import (
    CleanGuidance,
    ShuffledGuidance,
    Guided,
    GuidedPipeline,
    Oracle,
    OtherGuidance,
    Guidance,
    RegressorGuidance,
    ClassifierGuidance,
    as_mean_shift,
    classifier_free,
    guided,
    interval_scale,
    last_scale,
    rising_scale,
)
from rulediff_nb.sample import ddim, sample
from rulediff_nb.schedule import add_noise, solve
from rulediff_nb.tasks import TASKS
from rulediff_nb.unet import unet

SMALL = dict(channels=(16, 16), attention=(False, False), head_dim=8)
TASK = TASKS["two_squares"].with_(palette="fixed")


class Fixed(Guidance):
    "A gradient that is known."
    def __init__(self, g):
        super().__init__()
        self.g = g

    def forward(self, model, xt, t): return self.g.expand_as(xt)


def net(prediction="v_prediction", seed=0, **kw):
    m = unet("laptop", TASK, seed, prediction=prediction, sigma_data=.3*(prediction == "v_prediction"), **SMALL, **kw).eval()
    with torch.no_grad():
        for i, p in enumerate(m.parameters()): p += .05*row_noise(i, [seed], p.shape)[0]
    return m


def clf(**kw): return classifier("laptop", TASK, 0, channels=(8, 8), attention=(False, False), width=8, **kw).eval()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scale", [.5, -3.])
def test_the_noise_moves_by_the_formula(prediction, scale):
    "eps' = eps - scale*sqrt(1-abar)*g, whatever the model predicts."
    m, g, t = net(prediction), 1e-3*row_noise(1, [0], (3, 32, 32)), torch.tensor([5, 300, 700])
    xt = row_noise(2, range(3), (3, 32, 32))
    with torch.no_grad(): a, b = (solve(xt, k.predict(xt, t), t, m.abar, prediction) for k in (m, guided(m, Fixed(g), scale, clip=False)))
    n = (1 - m.abar[t]).sqrt().view(-1, 1, 1, 1)
    assert torch.allclose(b.eps - a.eps, -scale*n*g, atol=1e-4)


def test_scale_0_is_the_model_itself():
    m = net()
    assert guided(m, clf(), 0) is m and guided(m, clf(), 0.) is m
    x, t = row_noise(0, range(2), (3, 32, 32)), torch.tensor([10, 500])
    with torch.no_grad(): assert torch.equal(guided(m, clf(), lambda t: torch.zeros(len(t))).predict(x, t), m.predict(x, t))


def test_guidance_leaves_the_model_alone():
    m, c = net(), clf()
    before, state = copy.deepcopy(m.state_dict()), torch.get_rng_state()
    for guidance in (c, CleanGuidance(c), Oracle(TASK)): sample(guided(m, guidance, 2.), 2, 3)
    assert all(torch.equal(v, m.state_dict()[k]) for k, v in before.items()) and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in (*m.parameters(), *c.parameters())) and not m.training and not c.training
    m.train()
    assert guided(m, c, 2.).training and m.training


@pytest.mark.parametrize("scale", [1e-30, 1e6, 1e30, 1e300, -1e30])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_no_nan_at_any_finite_scale(scale, prediction):
    for clip in (True, False):
        assert sample(guided(net(prediction, betas="linear"), clf(betas="linear"), scale, clip), 2, 6).isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_no_pixel_is_moved_out_of_its_range(prediction):
    m, t = net(prediction), torch.tensor([400])
    xt = row_noise(2, [0], (3, 32, 32))
    with torch.no_grad(): a, b = (solve(xt, k.predict(xt, t), t, m.abar, prediction).x0 for k in (m, guided(m, Fixed(xt), 1e9)))
    assert torch.allclose(b, torch.where(xt > 0, a.clamp(min=1), a.clamp(max=-1)), atol=1e-4)
    with torch.no_grad(): c = solve(xt, guided(m, Fixed(xt), 1e-3).predict(xt, t), t, m.abar, prediction).x0
    assert (((c - a).sign() == xt.sign()) | (a.abs() >= 1)).float().mean() > .99


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match="finite"): guided(net(), clf(), scale)
    with pytest.raises(ValueError, match="finite"): sample(guided(net(), clf(), lambda t: torch.full(t.shape, scale)), 1, 2)


@pytest.mark.parametrize("scale,said", [
    ("high", "str 'high'"), (None, "NoneType None"), (2j, "complex 2j"), (True, "bool True"), ([1.], r"list \[1.0\]"),
    (torch.ones(2), r"a tensor of shape \(2,\) and torch.float32"), (torch.tensor(2j), "complex64"), (torch.tensor(True), "torch.bool")])
def test_what_is_no_scale_is_refused_with_what_was_wanted(scale, said):
    f = "scale must be a number, or a function from .n,. timesteps to .n,. numbers, got "
    for make in (lambda: guided(net(), clf(), scale), lambda: Guided(net(), ClassifierGuidance(clf()), scale), lambda: last_scale(scale),
                 lambda: classifier_free(net(classes=3, label_drop=.1), 1, scale), lambda: interval_scale(scale, .1, 1., net().recipe),
                 lambda: rising_scale(scale)):
        with pytest.raises(TypeError, match=f + ".*" + said): make()


@pytest.mark.parametrize("scale", [2, np.float64(2.), np.int64(2), torch.tensor(2.), torch.tensor(2)])
def test_every_kind_of_number_is_a_scale(scale):
    m, c, x, t = net(), clf(), row_noise(0, range(2), (3, 32, 32)), torch.tensor([10, 500])
    assert isinstance(guided(m, c, scale).scale, float) and guided(m, c, 0*scale) is m
    with torch.no_grad(): assert torch.equal(guided(m, c, scale).predict(x, t), guided(m, c, 2.).predict(x, t))


@pytest.mark.parametrize("value,said", [("high", "str 'high'"), (None, "NoneType None"), (2j, "complex 2j"), (torch.ones(3), r"shape \(3,\)"),
                                        (torch.ones(2, 1), r"shape \(2, 1\)"), (torch.ones(2)*1j, "complex64")])
def test_a_scale_function_that_gives_something_else_is_refused(value, said):
    with pytest.raises(ValueError, match=r"a scale function must give \(2,\) numbers for 2 timesteps, got .*" + said):
        guided(net(), clf(), lambda t: value).scales(torch.tensor([10, 500]))


@pytest.mark.parametrize("change,said", [
    (dict(betas="linear"), "schedule: linear"), (dict(T=500), "schedule: cosine, T=500"),
    (dict(task=TASKS["two_circles"].spec()), "two_circles"),
    (dict(task=TASK.with_(palette="random").spec()), r"\(random\)"), (dict(task=TASK.with_(size=16).spec()), "size: 16")])
def test_a_classifier_of_something_else_is_refused_by_name(change, said):
    task = change.pop("task", TASK.spec())
    from rulediff_nb.tasks import get_task
    other = classifier("laptop", get_task(**task), 0, channels=(8, 8), attention=(False, False), width=8, **change)
    for guidance in (other, CleanGuidance(other), ShuffledGuidance(ClassifierGuidance(other))):
        with pytest.raises(ValueError, match=said): guided(net(), guidance, 1.)


@pytest.mark.parametrize("call,error,said", [
    (lambda: ClassifierGuidance(clf(), 3), ValueError, r"\[0,3\)"), (lambda: ClassifierGuidance(clf(), -1), ValueError, r"\[0,3\)"),
    (lambda: ClassifierGuidance(clf(), 1.), TypeError, "label"), (lambda: RegressorGuidance(clf()), ValueError, "classifier"),
    (lambda: ClassifierGuidance(clf(classes=0, conditions=1)), ValueError, "regressor"),
    (lambda: guided(torch.nn.Linear(2, 2), clf()), TypeError, "recipe"),
    (lambda: guided(net(), lambda x: x), TypeError, "Guidance"), (lambda: classifier_free(net()), ValueError, "without class labels"),
    (lambda: classifier_free(net(classes=3, label_drop=.1), 3), ValueError, r"\[0,3\)"),
    (lambda: classifier_free(net(classes=3, label_drop=.1), 1, math.nan), ValueError, "finite"),
    (lambda: classifier_free(net(classes=3, label_drop=0.)), ValueError, "label_drop"),
    (lambda: classifier_free(net(classes=3, label_drop=.1))(torch.zeros(1, 3, 32, 32), 5, torch.tensor([0])), ValueError, "chosen"),
    (lambda: interval_scale(1., 1e-9, 1e-8, net().recipe), ValueError, "no timestep"),
    (lambda: GuidedPipeline(net(), clf(classes=0, conditions=1), ddim(net().recipe)), ValueError, "regressor"),
    (lambda: last_scale(1., 0), ValueError, "timesteps"), (lambda: rising_scale(1., power=-1), ValueError, "power"),
    (lambda: interval_scale(1., 2., 1., net().recipe), ValueError, "interval"), (lambda: Oracle(TASK, 0.), ValueError, "spread"),
    (lambda: sample(guided(net(), clf(), 1.), 1, -1), ValueError, "steps")])
def test_what_cannot_be_is_refused(call, error, said):
    with pytest.raises(error, match=said): call()


@pytest.mark.parametrize("task", [TASKS["two_circles"], TASK.with_(palette="random"), TASK.with_(size=16)])
def test_an_oracle_of_another_task_is_refused(task):
    with pytest.raises(ValueError, match="Oracle was made for another"): guided(net(), Oracle(task), 1.)


def test_half_precision_and_labels():
    m, c, x, t = net(classes=3, label_drop=.1), clf(), row_noise(0, range(2), (3, 32, 32)), torch.tensor([2, 500])
    y = torch.tensor([0, 2])
    with torch.no_grad():
        full = [guided(m, p, .5).predict(x, t, y) for p in (c, CleanGuidance(c))]
        half = [guided(m, p, .5).bfloat16().predict(x.bfloat16(), t, y) for p in (c, CleanGuidance(c))]
    for a, b in zip(full, half): assert b.dtype == torch.bfloat16 and b.isfinite().all() and (a - b.float()).abs().median() < .05


@pytest.mark.parametrize("kind", ["ClassifierGuidance", "RegressorGuidance", "CleanGuidance"])
def test_guidance_is_the_gradient_of_its_log_probability(kind):
    "A small step along it raises the log probability by about the step's length times the gradient's."
    m, c, x, t = net(), clf(), row_noise(3, range(4), (3, 32, 32)), torch.tensor([5, 100, 400, 900])
    r = clf(classes=0, conditions=1)
    sure = r(x, t)[:, 1].exp().detach()   # held fixed
    def x0(v): return solve(v, m.predict(v, t), t, m.abar, "v_prediction").x0.clamp(-1, 1)
    guidance, log_p = dict(
        ClassifierGuidance=(ClassifierGuidance(c, 2), lambda v: c(v, t).log_softmax(1)[:, 2]),
        RegressorGuidance=(RegressorGuidance(r), lambda v: -.5*r(v, t)[:, 0]**2/sure),
        CleanGuidance=(CleanGuidance(c, 2), lambda v: c(x0(v), torch.zeros_like(t)).log_softmax(1)[:, 2]))[kind]
    g = guidance(m, x, t)
    step = 1e-2/g.flatten(1).norm(dim=1)
    with torch.no_grad(): gain = log_p(x + step.view(-1, 1, 1, 1)*g) - log_p(x)
    assert torch.allclose(gain, 1e-2*g.flatten(1).norm(dim=1), rtol=.2, atol=1e-6) and (gain > 0).all()


class Darker(Guidance):
    "A reader's own guidance, which does not care whether gradients are on."
    def forward(self, model, xt, t):
        x = xt.detach().requires_grad_()
        return torch.autograd.grad(-x.square().sum(), x, create_graph=True)[0]


def test_own_guidance_may_differentiate():
    x = sample(guided(net(), Darker(), .5), 2, 3)
    assert (x - sample(net(), 2, 3)).abs().max() > .01 and not x.requires_grad


@pytest.mark.parametrize("g", [torch.zeros(2), torch.zeros(2, 3, 16, 16), torch.zeros(2, 1, 32, 32)])
def test_a_gradient_of_another_shape_is_refused(g):
    class Odd(Guidance):
        def forward(self, model, xt, t): return g
    with pytest.raises(ValueError, match=r"Odd must give a gradient of shape \(2, 3, 32, 32\), got"): sample(guided(net(), Odd(), 1.), 2, 3)


@pytest.mark.parametrize("make", [ShuffledGuidance, OtherGuidance, lambda c: Guided(net(), c, 1.)])
def test_only_guidance_guides(make):
    with pytest.raises(TypeError, match="ClassifierGuidance"): make(clf())


def test_a_gradient_that_is_not_finite_guides_nothing():
    m, t, x = net(), torch.tensor([300, 300]), row_noise(0, range(2), (3, 32, 32))
    g = torch.ones(2, 3, 32, 32)
    g[0, 0, 0, 0] = math.nan
    with torch.no_grad(): a, b = m.predict(x, t), guided(m, Fixed(g), 1.).predict(x, t)
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


def test_classifier_free_takes_a_scale_per_timestep_and_gives_no_nan():
    m, t, x = net(classes=3, label_drop=.1), torch.tensor([200, 800]), row_noise(0, range(2), (3, 32, 32))
    with torch.no_grad():
        part = classifier_free(m, 2, lambda t: torch.where(t < 500, 3., 1.)).predict(x, t)
        for row, w in ((0, 3.), (1, 1.)): assert torch.allclose(part[row], classifier_free(m, 2, w).predict(x, t)[row], atol=1e-5)
    for w in (3e38, 1e300, -1e300): assert sample(classifier_free(m, 2, w), 2, 4).isfinite().all()


def test_oracle_reduces_the_rule_error():
    m, t = net(), torch.full((8,), 100)
    class Known(torch.nn.Module):
        "Predicts given images."
        recipe, abar = m.recipe, m.abar
        def predict(self, xt, t):
            s, n = m.abar[t].sqrt().view(-1, 1, 1, 1), (1 - m.abar[t]).sqrt().view(-1, 1, 1, 1)
            return (s*xt - (self.x0 + 1e-2*(xt - xt.detach())))/n    # depends on xt, so that there is a gradient
    known, x0 = Known(), TASK.sample(8, 0, violate="up", margin=1/32)[0]
    known.x0 = x0
    g = Oracle(TASK)(known, add_noise(x0, t, row_noise(0, range(8), (3, 32, 32)), m.abar), t)
    def error(x):
        a, b = TASK.sides(TASK.features(x.clamp(-1, 1)))
        return (b/a).log().abs()
    assert (error(x0 + .1*g/g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)) < error(x0)).float().mean() > .8


def test_oracle_is_silent_where_it_cannot_read():
    x = row_noise(0, range(3), (3, 32, 32))
    assert not Oracle(TASK)(net(), x, torch.full((3,), 990)).any()


def test_guided_models_compose():
    m, t, x = net(), torch.tensor([300]), row_noise(0, [0], (3, 32, 32))
    g, h = (1e-3*row_noise(k, [0], (3, 32, 32)) for k in (1, 2))
    with torch.no_grad(): a, b = (k.predict(x, t)
                                for k in (guided(guided(m, Fixed(g), 2., False), Fixed(h), 3., False),
                                                              guided(m, Fixed(2*g + 3*h), 1., False)))
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("w,at", [(rising_scale(2.), (2 + 3*.999, 2 + 3*.001)), (rising_scale(2., 3., 2), (2 + 3*.999**2, 2 + 3*.001**2)),
                                  (last_scale(5.), (5*19/20, 0.))])
def test_scales_by_timestep(w, at):
    assert torch.allclose(w(torch.tensor([1, 999])), torch.tensor(at, dtype=torch.float64))


def test_an_interval_of_noise():
    m = net()
    w, sigma = interval_scale(2., .5, 2., m.recipe)(torch.arange(1000)), ((1 - m.abar)/m.abar).sqrt()
    assert torch.equal(w != 0, (sigma >= .5) & (sigma < 2.)) and w.max() == 2.


@pytest.mark.parametrize("timesteps", [None, [19, 39, 499, 999]])
def test_mean_shift_scale(timesteps):
    "w*Sigma_t over the shift of the epsilon form, beta_t/sqrt(alpha_t), between neighbours among the sampler's timesteps."
    r = net().recipe
    abar = r.schedule().alphas_cumprod.double()
    for t, down in ((7, 6), (400, 399)) if timesteps is None else ((39, 19), (999, 499)):
        alpha = abar[t]/abar[down]
        want = 3*(1 - alpha)*(1 - abar[down])/(1 - abar[t])/((1 - alpha)/alpha.sqrt())
        assert torch.allclose(as_mean_shift(3., r, timesteps)(torch.tensor([t])), want)
    assert as_mean_shift(3., r, timesteps)(torch.tensor([0 if timesteps is None else 19])) == 0   # the last step has no variance


def test_classifier_free():
    m, t, x = net(classes=3, label_drop=.1), torch.tensor([200, 800]), row_noise(0, range(2), (3, 32, 32))
    with torch.no_grad():
        none, given = m.predict(x, t), m.predict(x, t, torch.tensor([2, 2]))
        for w in (0., 1., 4.): assert torch.allclose(classifier_free(m, 2, w, False).predict(x, t), none + w*(given - none), atol=1e-4)
    assert (none - given).abs().max() > 1e-4 and sample(classifier_free(m), 2, 3).shape == (2, 3, 32, 32)


def test_shuffled_guidance_is_the_same_in_other_places():
    c, x, t = clf(), row_noise(0, range(2), (3, 32, 32)), torch.tensor([100, 700])
    g, e = ClassifierGuidance(c)(None, x, t), ShuffledGuidance(ClassifierGuidance(c))(None, x, t)
    assert torch.equal(g.flatten(1).sort().values, e.flatten(1).sort().values)
    assert torch.allclose(ShuffledGuidance(ClassifierGuidance(c))(None, x[1:], t[1:]), e[1:], atol=1e-6)         # whatever stands beside it
    assert abs((g*e).sum()/(g*g).sum()) < .2 and not torch.equal(e, ShuffledGuidance(ClassifierGuidance(c), 1)(None, x, t))


def test_the_other_image_s_gradient_has_the_own_length():
    c, x, t = clf(), row_noise(0, range(3), (3, 32, 32)), torch.tensor([100, 700, 400])
    g, e = ClassifierGuidance(c)(None, x, t).flatten(1), OtherGuidance(ClassifierGuidance(c))(None, x, t).flatten(1)
    assert torch.allclose(e.norm(dim=1), g.norm(dim=1), rtol=1e-4) and not torch.allclose(g.norm(dim=1), g.norm(dim=1).roll(1), rtol=.01)
    def cosine(a, b): return torch.nn.functional.cosine_similarity(a, b)
    assert (cosine(e, g.roll(1, 0)) > .9999).all() and (cosine(e, g) < .9).all()


def test_the_other_image_s_gradient_composes_and_needs_another_image():
    m, g = net(), OtherGuidance(ClassifierGuidance(clf()))
    twice = ShuffledGuidance(OtherGuidance(g))
    for made in (g, twice): assert (sample(guided(m, made, 4.), 3, 3) - sample(m, 3, 3)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="must hold at least 2 images, got 1"): sample(guided(m, g, 4.), 1, 3)


@pytest.mark.parametrize("rows,want", [([0., 2., 3.], [0., 0., 1.]), ([math.nan, 2., 3.], [0., 0., 1.])])
def test_where_either_gradient_is_missing_the_other_image_guides_nothing(rows, want):
    m, t, x = net(), torch.full((3,), 300), row_noise(0, range(3), (3, 32, 32))
    g = 1e-3*torch.tensor(rows).view(-1, 1, 1, 1)*torch.ones(3, 3, 32, 32)
    with torch.no_grad(): moved = (guided(m, OtherGuidance(Fixed(g)), 1.).predict(x, t) - m.predict(x, t)).flatten(1).abs().amax(1)
    assert ((moved > 0).float().tolist() == want) and moved.isfinite().all()


class Grey(torch.nn.Module):
    "The exact denoiser of pixels that are normal around 0 with deviation .3."
    def __init__(self):
        super().__init__()
        self.net, self.recipe, self.abar = torch.nn.Linear(1, 1), net(betas="linear").recipe, net(betas="linear").abar

    def predict(self, xt, t):
        s, n = (v.view(-1, 1, 1, 1) for v in (self.abar[t.long()].sqrt(), (1 - self.abar[t.long()]).sqrt()))
        x0 = s*.09/(s*s*.09 + n*n)*xt
        return s*(xt - s*x0)/n - n*x0


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "PNDM",
                                  "EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "SASolver"])
def test_every_scheduler_takes_a_guided_model(name):
    m = Grey()
    def draw(model):
        s = getattr(diffusers, f"{name}Scheduler").from_config(m.recipe.schedule().config, timestep_spacing="trailing")
        return sample(model, 2, 20, scheduler=s)
    plain, silent, brighter = draw(m), draw(guided(m, Fixed(torch.zeros(1)), 1.)), draw(guided(m, Fixed(torch.ones(1)), 1.))
    assert torch.equal(plain, silent) and brighter.isfinite().all() and brighter.mean() > plain.mean() + .03


def test_a_scheduler_that_cannot_be_served_is_refused_by_name():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        sample(guided(net(), clf(), 1.), 1, 3, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())


def test_rows_do_not_depend_on_the_batch():
    m = guided(net(), clf(), 3.)
    assert torch.allclose(sample(m, 5, 4, 1., 3, batch=2), sample(m, 5, 4, 1., 3, batch=5), atol=1e-3)


def test_pipeline_in_a_folder(tmp_path):
    pipe = GuidedPipeline(net(), clf(), ddim(net().recipe))
    pipe.save_pretrained(tmp_path)
    again = GuidedPipeline.from_pretrained(tmp_path)
    a, b = (p(2, 3, 2., output_type="pt").images for p in (pipe, again))
    assert torch.equal(a, b) and a.shape == (2, 3, 32, 32) and 0 <= a.min() and a.max() <= 1 and not list(tmp_path.rglob("*.bin"))
    assert pipe(2, 3, output_type="np").images.shape == (2, 32, 32, 3) and len(pipe(2, 3).images) == 2
    assert len(pipe(2, 3, return_dict=False)[0]) == 2
    with pytest.raises(ValueError, match="output_type"): pipe(output_type="jpg")
    with pytest.raises(ValueError, match="schedule"): GuidedPipeline(net(betas="linear"), clf(), ddim(net().recipe))
