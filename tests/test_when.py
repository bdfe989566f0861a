"The diagnoses of 11_when against cases in which the answer is known."
import math

import pandas as pd
import pytest
import torch
from rulediff_nb import when
from rulediff_nb.core import row_noise
from rulediff_nb.sample import ExactDenoiser
from rulediff_nb.table import find_study
from rulediff_nb.tasks import TASKS, SunShadow
from rulediff_nb.unet import recipe, unet
from rulediff_nb.when import DIAGNOSES, Linearized, clean_estimate, coherence, continue_from, inpaint, known_pixels

torch.set_num_threads(1)
TASK = TASKS["two_squares"]
TINY = dict(channels=(16, 32), attention=(False, False), head_dim=16)


@pytest.fixture(scope="module")
def net(): return unet("laptop", TASK, 0, **TINY).eval()


@pytest.fixture(scope="module")
def exact(): return ExactDenoiser(TASK.sample(64, 0)[0], recipe("laptop", TASK))


class Affine(torch.nn.Module):
    "x0_hat = scale times the clean image that the noisy one shows, plus what a matrix makes of it: a Jacobian that is known."
    def __init__(self, scale=1., matrix=None):
        super().__init__()
        self.recipe, self.w = recipe("laptop", TASK, prediction="sample", sigma_data=0.), torch.nn.Parameter(torch.tensor(scale))
        self.matrix = matrix

    def predict(self, xt, t, y=None):
        s = self.recipe.schedule().alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
        x = xt/s
        return self.w*x + (0 if self.matrix is None else (x.flatten(1)@self.matrix.T).view_as(x))


def value(d, part, sigma=None):
    t = d.table[d.table.part == part]
    return (t if sigma is None else t[(t.sigma - sigma).abs() < 1e-9]).value.item()


@pytest.mark.parametrize("name", DIAGNOSES)
def test_every_diagnosis_has_the_same_form(name, net):
    fast = dict(draws=1) if name == "forced_choice" else dict(steps=10) if name == "conditional" else {}
    d = DIAGNOSES[name](net, 16, **fast)
    assert isinstance(d.table, pd.DataFrame) and list(d.table.columns) == ["part", "sigma", "value", "low", "high"] and len(d.table)
    assert d.name == name and d.nfe > 0 and "<table" in d._repr_html_() and len(d.wide()) == d.table.part.nunique()
    with_interval = d.table.dropna(subset=["value", "low", "high"])
    inside = (with_interval.low <= with_interval.value + 1e-9) & (with_interval.value <= with_interval.high + 1e-9)
    assert not len(inside) or inside.mean() > .9
    again = DIAGNOSES[name](net, 16, **fast)
    pd.testing.assert_frame_equal(d.table, again.table)


def test_coherence_of_the_exact_denoiser_is_none(exact):
    d = coherence(exact, 64, (.1, .8))
    assert max(value(d, "coherence", s) for s in (.1, .8)) < .01 and value(d, "error of the drawn length, px", .1) > .05


def test_coherence_of_independent_errors_is_one():
    class Blurred(Affine):   # each object's size is read off its own noise
        def predict(self, xt, t, y=None):
            f = TASK.factors(len(xt), 1)
            off = row_noise(7, range(len(xt)), (2,))/64
            return TASK.render(f._replace(l1=f.l1 + off[:, 0], l2=f.l2 + 1.5*off[:, 1]))
    d = coherence(Blurred(), 64, (.1,))
    assert value(d, "coherence", .1) == pytest.approx(1, abs=.35)
    assert value(d, "error of the drawn length, px", .1) == pytest.approx(.75, rel=.3)


def test_a_known_jacobian_comes_out():
    skew = torch.zeros(3072, 3072)
    skew[0, 1], skew[1, 0], skew[5, 5] = 2., -2., 3.
    x, z = TASK.sample(3, 0)[0], row_noise(3, range(3), (3, 32, 32))
    near = Linearized(Affine(.5, skew), x, .3)
    J = .5*torch.eye(3072) + skew
    assert torch.allclose(near.backward(z).flatten(1), z.flatten(1)@J, atol=1e-3)
    assert torch.allclose(near.forward(z).flatten(1), z.flatten(1)@J.T, atol=2e-2)
    assert torch.allclose(near.gain(z), torch.tensor([(v@J@v/(v@v)).item() for v in z.flatten(1)]).double(), atol=1e-3)


def test_gains_and_dimension_of_a_multiple_of_the_identity():
    g, d = when.gains(Affine(.25), 8, (.2,)), when.dimension(Affine(.25), 8, (.2,))
    assert "never varied" not in set(g.table.part)   # squares move freely, so the canvas may
    for part in ("along the rule", "across the rule", "noise"): assert value(g, part) == pytest.approx(.25, abs=1e-4)
    assert value(d, "dimension") == pytest.approx(.25*3072, rel=1e-4) and value(d, "asymmetry") < .05
    assert value(d, "best without the rule") - value(d, "best with the rule") == pytest.approx(1, abs=.02)


def test_directions_are_orthonormal_and_along_keeps_the_rule():
    slopes = when.scene_slopes(TASK, 12, 1)
    Q = torch.cat(list(when._directions(slopes).values()), 2)
    assert torch.allclose(Q.mT@Q, torch.eye(Q.shape[2], dtype=Q.dtype).expand(len(Q), -1, -1), atol=1e-6)
    along = when._directions(slopes)["along the rule"]
    assert (slopes.free - along@(along.mT@slopes.free)).abs().max() < 1e-6


def test_the_exact_denoiser_follows_no_move_across(exact):
    d = when.gains(exact, 16, (.4,))
    assert abs(value(d, "across the rule")) < .2 and value(d, "noise") < .05


def test_continuing_from_pure_noise_is_sampling(exact):
    x = row_noise(5, range(4), (3, 32, 32), 20)
    whole = [d.x for d in when.sample_steps(exact, range(4), 10, seed=5, precision="fp32")][-1]
    part = [d.x for d in continue_from(exact, x, exact.recipe.T - 1, 10, 5)][-1]
    assert torch.allclose(whole, part, atol=1e-5)
    assert len(list(continue_from(exact, x, 0, 10))) == 1


def test_restart_of_the_exact_denoiser_keeps_the_rule(exact):
    d = when.restart(exact, 64, (.4,), steps=10)
    assert value(d, "rule_gap", .4) < .02 and d.table.sigma.isna().sum() == 2   # drawn freely, for comparison


def test_no_step_of_a_continued_chain_is_tiny(exact):
    sch = when.plan(exact, 25, "auto", 0)
    ln = sch.sigmas_at(torch.arange(exact.recipe.T)).log()
    t = int(sch.timesteps[15]) + 3
    times = [d.t for d in continue_from(exact, row_noise(5, range(1), (3, 32, 32)), t, 25)]
    assert times[0] == t and (ln[times].diff().abs() > .2).all()


def test_rows_of_a_continued_chain_have_their_own_noise(exact):
    x = row_noise(5, range(3), (3, 32, 32))
    whole, last = [d.x for d in continue_from(exact, x, 300, 10, 1)][-1], [d.x for d in continue_from(exact, x[2:], 300, 10, 1, 2)][-1]
    assert torch.allclose(whole[2:], last, atol=1e-4)


def test_the_best_denoiser_against_a_grid():
    """One free number is left uncertain: the posterior by importance sampling and by a dense grid."""
    task, sigma = TASKS["two_squares"], .5
    slopes = when.scene_slopes(task, 8, 1)
    one = slopes._replace(free=slopes.free[:, :, :1], numbers=slopes.numbers[:1])
    got = when.posterior(task, one, sigma, True, 1, candidates=2000)
    noisy = slopes.x + sigma*row_noise(1, range(len(slopes.x)), (3, 32, 32), 5051)
    grid = (torch.arange(4000, dtype=torch.float64) + .5)/4000
    for i in range(3):
        u = slopes.u[i].repeat(4000, 1)
        u[:, slopes.numbers[0]] = grid
        f = task.draw(u, slopes.rgb[i:i + 1].expand(4000, -1, -1))
        ok, x = task.inside(f), task.render(type(f)(*(v.float() for v in f)))
        w = (-(x - noisy[i]).square().sum((1, 2, 3)).double()/(2*sigma**2)).masked_fill(~ok, -math.inf).softmax(0)
        assert ((w.view(-1, 1, 1, 1)*x).sum(0) - got.x[i]).abs().max() < .03
    assert got.weight.min() > 100


def test_the_best_denoiser_keeps_the_rule_if_it_uses_it():
    d = when.best_denoiser("sun_shadow", 32, (.2,), candidates=300)
    assert value(d, "coherence, with the rule", .2) < .05 < .4 < value(d, "coherence, without the rule", .2)
    assert value(d, "across the rule, with the rule", .2) < .05 and value(d, "across the rule, without the rule", .2) > .8
    assert value(d, "dimension, without the rule", .2) - value(d, "dimension, with the rule", .2) == pytest.approx(1, abs=.15)


def test_what_two_ends_share():
    a, b = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)).double()
    assert when._shared(torch.stack([a, a])) == 1 and abs(when._shared(torch.stack([a, b]))) < .03
    assert when._shared(torch.stack([a + b, a - b])) == pytest.approx(0, abs=.03)
    assert when._shared(torch.stack([3*a + b, 3*a - b])) == pytest.approx(.8, abs=.02)   # half of the variance of the difference: b's


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_known_pixels_say_nothing_of_the_length(task):
    f = task.factors(24, 3)
    known = known_pixels(task, f)
    assert known.dtype == torch.bool and known.shape == (24, 32, 32) and 4 < known.sum((1, 2)).float().mean() < 300
    if task.name == "two_circles": return   # there the other disc moves with the length, so that the two touch
    g = task.with_dependent(f, getattr(task.factors(24, 9), task.length))
    ok = task.inside(g)
    off = ((task.render(f) - task.render(g)).abs().amax(1) > 1e-5) & known
    assert not off[ok].any()


def test_inpainting_keeps_what_is_known(net):
    x, f = TASK.sample(3, 2)
    known = known_pixels(TASK, f)
    steps = list(inpaint(net, x, known, steps=4, again=2, seed=1))
    assert len(steps) == 7 and all(torch.equal(d.x.permute(0, 2, 3, 1)[known], x.permute(0, 2, 3, 1)[known]) for d in steps)
    assert torch.equal(steps[-1].x, list(inpaint(net, x, known, steps=4, again=2, seed=1))[-1].x)
    assert not torch.equal(steps[-1].x, list(inpaint(net, x, known, steps=4, again=2, seed=2))[-1].x)


def test_inpainting_with_the_exact_denoiser_finds_the_image():
    sun = TASKS["sun_shadow_free"]
    x, f = sun.sample(200, 0)
    few = type(f)(*(v[:12] for v in f))
    out = list(inpaint(ExactDenoiser(x, recipe("laptop", sun)), x[:12], known_pixels(sun, few), 30, 3))[-1].x
    assert ((out - x[:12]).abs().amax((1, 2, 3)) < .05).double().mean() > .8


def test_the_exact_denoiser_finds_the_margin(exact):
    d = when.forced_choice(exact, 24, (.4,), (1.,), 2, scenes=TASK.factors(24, 0))
    assert value(d, "1 px", .4) > .9


def test_ink_alone_does_not_choose():
    class White(Affine):   # the more ink, the larger its error: always right for longer lengths, always wrong for shorter ones
        def predict(self, xt, t, y=None): return torch.ones_like(xt)
    assert value(when.forced_choice(White(), 48, (.4,), (1.,), 1), "1 px", .4) == pytest.approx(.5, abs=.02)


def test_ridge_finds_what_is_linear_and_nothing_else():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 30, generator=rng).double()
    y = torch.stack([x[:, 0] - 2*x[:, 3], torch.randn(400, generator=rng).double(), x[:, 0]*x[:, 1]], 1)
    r2 = when._ridge(x, y, torch.arange(400) % 4 != 3)
    assert r2[0] > .99 and r2[1] < .1 and r2[2] < .1


def test_activations_are_those_of_the_blocks_and_no_hook_stays(net):
    x = TASK.sample(5, 0)[0]
    got = when.activations(net, x, .3, 2)
    assert list(got) == ["pixels", "down 0", "down 1", "middle", "up 0", "up 1"] and all(len(v) == 5 for v in got.values())
    assert not any(m._forward_hooks for m in net.modules())
    handle = net.net.conv_out.register_forward_hook(lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): when.activations(net, x, .3)
    handle.remove()
    assert not any(m._forward_hooks for m in net.modules())


def test_auc():
    score, broken = torch.tensor([.1, .2, .3, .9]), torch.tensor([False, False, True, True])
    assert when.auc(score, broken) == 1 and when.auc(-score, broken) == 0 and math.isnan(when.auc(score, broken & False))
    assert when.auc(torch.ones(4), broken) == .5
    length, rng = torch.arange(300.), torch.Generator().manual_seed(0)
    longer = torch.rand(300, generator=rng) < length/300   # a score that is the length and nothing else
    assert when.auc(length, longer) > .8 > .7 > when._auc_within(length, longer, length)
    assert when._auc_within(torch.rand(300, generator=rng), longer, length) == pytest.approx(.5, abs=.1)


@pytest.mark.parametrize("call,error,words", [
    (lambda m: coherence(m, 4), ValueError, "n must be"), (lambda m: coherence(m, task="sun_shadow"), ValueError, "made for two_squares"),
    (lambda m: coherence(m, task=SunShadow(size=64)), ValueError, "64x64"), (lambda m: coherence(m, 16, (0.,)), ValueError, "sigma must lie"),
    (lambda m: coherence(torch.nn.Linear(2, 2)), TypeError, "recipe"),
    (lambda m: clean_estimate(m, torch.zeros(0, 3, 32, 32), .1), ValueError, "no images"),
    (lambda m: clean_estimate(m, torch.zeros(2, 3, 16, 16), .1), ValueError, "32x32"),
    (lambda m: clean_estimate(m, torch.zeros(2, 3, 32, 32), .1, y=torch.zeros(2).long()), ValueError, "without class labels"),
    (lambda m: next(continue_from(m, torch.zeros(2, 3, 32, 32), 1000)), ValueError, "t must be"),
    (lambda m: next(continue_from(m, torch.zeros(2, 3, 16, 16), 10)), ValueError, "noised images"),
    (lambda m: next(inpaint(m, torch.zeros(2, 3, 32, 32), torch.ones(2, 32, 32))), ValueError, "bool"),
    (lambda m: next(inpaint(m, torch.zeros(2, 3, 32, 32), torch.ones(3, 32, 32).bool())), ValueError, "known must be"),
    (lambda m: DIAGNOSES["readout"](ExactDenoiser(torch.zeros(2, 3, 32, 32), recipe("laptop", TASK)), 16), ValueError, "U-Net"),
    (lambda m: coherence(m, 16, (.1,)).plot("nothing"), ValueError, "no part")])
def test_mistakes_are_named(call, error, words, net):
    with pytest.raises(error, match=words): call(net)


def test_a_model_with_labels_is_refused():
    with pytest.raises(ValueError, match="takes labels"): coherence(unet("laptop", TASK, 0, classes=3, **TINY).eval(), 16)


def test_the_plan_has_every_diagnosis_of_every_task():
    rows = find_study("when").plan(False)
    whole = {(r.task, r.diagnosis, r.seed) for r in rows if r.label == "laptop" and r.steps == 3200}
    assert whole == {(t, d, s) for t in TASKS for d in DIAGNOSES for s in range(3)}
    assert len(rows) == len(set(rows)) and {r.label for r in rows} >= {"untrained", "exact", "no rule", *when.TRIALS}
