"The toy in which everything is known: optima against brute force, and samples against what theory says."
import math

import pytest
import torch

from rulediff_nb.theory import (
    TOY_RULES,
    Guided,
    Polynomial,
    PatchNetwork,
    PosteriorMean,
    Separable,
    ThreeWay,
    TwoLayer,
    dsm_loss,
    fit_toy,
    Slopes,
    bayes_error,
    rule_rmse,
    scene_slopes,
    toy_curve,
    toy_data,
    toy_patches,
    toy_sample,
    toy_schedule,
)
from rulediff_nb.tasks import TASKS

torch.set_num_threads(1)
ABAR = toy_schedule()
LINE, WAVE = TOY_RULES["line"], TOY_RULES["wave"]


def noisy(points, s, n, seed=0): return s*points + n*torch.randn(points.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rule", TOY_RULES.values(), ids=TOY_RULES)
def test_data_keep_the_rule(rule):
    for x in (toy_data(rule, 500, 3), toy_curve(rule, 500)):
        assert x.shape == (500, 2) and rule_rmse(x, rule) < 1e-12 and x.min() > -1e-9 and x.max() < 1 + 1e-9
    assert torch.equal(toy_data(rule, 9, 1), toy_data(rule, 9, 1)) and not torch.equal(toy_data(rule, 9, 1), toy_data(rule, 9, 2))


@pytest.mark.parametrize("s, n", [(.99, .05), (.8, .6), (.2, .98)])
def test_the_posterior_mean_is_bayes_rule(s, n):
    points, x = toy_curve(WAVE, 50), noisy(toy_data(WAVE, 20), s, n)
    weight = torch.stack([torch.stack([(-(v - s*p).square().sum()/(2*n*n)).exp() for p in points]) for v in x])
    want = weight@points/weight.sum(1, keepdim=True)
    assert (PosteriorMean(points).x0_hat(x, s, n) - want).abs().max() < 1e-9
    alone = Separable(points).x0_hat(x, s, n)
    for k in (0, 1): assert torch.allclose(alone[:, k:k + 1], PosteriorMean(points[:, k:k + 1]).x0_hat(x[:, k:k + 1], s, n))
    moved = x.clone()
    moved[:, 1] += .3
    assert torch.equal(Separable(points).x0_hat(moved, s, n)[:, 0], alone[:, 0]), "it cannot see the other number"


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("s, n", [(.95, .3), (.5, .87)])
def test_a_polynomial_is_least_squares_over_all_noise(degree, s, n):
    "Against least squares on a million noisy points."
    points = toy_data(WAVE, 2000, 1)
    x0 = points.repeat(500, 1)
    x = noisy(x0, s, n)
    fit = Polynomial(points, degree)
    a, b = (torch.stack([x[:, k]**i for i in range(degree + 1)]) for k in (0, 1))
    phi = torch.stack([a[i]*b[j] for i, j in fit.powers.T.tolist()], 1)
    want = torch.linalg.lstsq(phi, x0).solution
    grid = noisy(points, s, n, 9)[:500]
    a, b = (torch.stack([grid[:, k]**i for i in range(degree + 1)]) for k in (0, 1))
    there = torch.stack([a[i]*b[j] for i, j in fit.powers.T.tolist()], 1)@want
    assert (fit.x0_hat(grid, s, n) - there).square().mean().sqrt() < .01
    assert (phi@fit.weights(s, n) - x0).square().sum(1).mean() < 1.001*(phi@want - x0).square().sum(1).mean()


def test_no_class_beats_the_exact_one_and_a_larger_one_is_better():
    test, times = toy_data(WAVE, 4000, 99), (50, 200, 400)
    own = [dsm_loss(c, test, ABAR, times) for c in (PosteriorMean(toy_curve(WAVE)), *(Polynomial(toy_data(WAVE, 20_000, 1), d) for d in (6, 4, 1)))]
    for better, worse in zip(own, own[1:]): assert all(a < b + 1e-4 for a, b in zip(better, worse))
    assert sum(dsm_loss(Separable(toy_curve(WAVE)), test, ABAR, times)) > 1.02*sum(own[0])


def test_samples_of_the_exact_and_of_the_separable_class():
    few = ABAR[::4].contiguous()
    assert rule_rmse(toy_sample(PosteriorMean(toy_curve(LINE, 200)), 400, few), LINE) < .01
    x = toy_sample(Separable(toy_curve(LINE, 200)), 2000, few, 1)
    assert abs(rule_rmse(x, LINE) - 6**-.5) < .02 and abs(torch.corrcoef(x.T)[0, 1]) < .06
    assert torch.equal(toy_sample(Separable(toy_curve(LINE, 20)), 5, few, 1), toy_sample(Separable(toy_curve(LINE, 20)), 5, few, 1))


def test_the_gaussian_that_a_linear_denoiser_draws():
    "Unclipped it has mean and covariance of the data, so the parabola's error is known."
    x = toy_sample(Polynomial(toy_curve(TOY_RULES["parabola"], 2000), 1), 20_000, ABAR, clip=math.inf)
    want = torch.cov(toy_curve(TOY_RULES["parabola"], 2000).T)
    assert (torch.cov(x.T) - want).abs().max() < .004 and abs(rule_rmse(x, TOY_RULES["parabola"]) - .1395) < .005


@pytest.mark.parametrize("s, n", [(1., .01), (.9, .44)])
def test_guidance_is_the_gradient_of_the_scorer(s, n):
    curve = toy_curve(WAVE, 100)
    base, scorer, x = PosteriorMean(curve), ThreeWay(curve, .1), noisy(toy_data(WAVE, 6), s, n)
    def wanted(v): return scorer.logits(v, s, n).log_softmax(1)[:, 1]
    step = torch.eye(2, dtype=torch.float64)*1e-6
    slope = torch.stack([(wanted(x + h) - wanted(x - h))/2e-6 for h in step], 1)
    got = Guided(base, scorer, 2.).x0_hat(x, s, n) - base.x0_hat(x, s, n)
    assert (got - 2*n*n/s*slope).abs().max() < 1e-5
    assert torch.equal(Guided(base, scorer, 0.).x0_hat(x, s, n), base.x0_hat(x, s, n))


def test_the_scorer_is_blind_under_noise_and_sharp_without():
    c = ThreeWay(toy_curve(LINE, 300), .1)
    at = [c.accuracy(1000, math.sqrt(1 - n*n), n) for n in (.005, .1, .5, .99)]
    assert at[0] > .99 and at == sorted(at, reverse=True) and abs(at[-1] - 1/3) < .04


@pytest.mark.parametrize("name, free", [("sun_shadow", 2), ("sun_shadow_free", 3), ("perspective", 3), ("two_circles", 3), ("two_squares", 5)])
def test_each_free_number_costs_the_noise_once(name, free):
    "Positions across which a task slides count: two_squares has two on each side, perspective and sun_shadow_free none."
    s = scene_slopes(TASKS[name], 48)
    assert s.free.shape[2] == free and s.free.shape[0] == s.dependent.shape[0] > 20
    for sigma in (.01, .05):
        known, unknown = bayes_error(s, sigma), bayes_error(s, sigma, False)
        assert known == pytest.approx(free*sigma**2, rel=.02) and unknown == pytest.approx((free + 1)*sigma**2, rel=.02)
    assert bayes_error(s, 1e4) == pytest.approx(s.free.square().sum((1, 2)).mean().item()/12, rel=.01), "so much noise: the prior is left"


def test_slopes_are_those_of_the_renderer():
    "Along the free numbers and the dependent length, against a step half as large; an edge that crosses a pixel's border has a kink."
    a, b = (scene_slopes(TASKS["two_squares"], 24, step=h) for h in (1e-3, 5e-4))
    for v, w in ((a.free, b.free), (a.dependent, b.dependent)): assert torch.corrcoef(torch.stack([v.flatten(), w.flatten()]))[0, 1] > .99


def test_the_best_error_is_that_of_the_best_linear_denoiser():
    "Numbers, pixels and noise that are normal: simulated."
    g = torch.Generator().manual_seed(0)
    def normal(*shape): return torch.randn(shape, generator=g, dtype=torch.float64)
    J, sigma = normal(1, 30, 3), .8
    theta = normal(20_000, 3)/12**.5
    x = theta@J[0].T
    xt = x + sigma*normal(20_000, 30)
    best = torch.linalg.lstsq(xt, x).solution
    assert (xt@best - x).square().sum(1).mean().item() == pytest.approx(bayes_error(Slopes(J, normal(1, 30), 1., *[None]*4), sigma), rel=.02)


def test_scenes_that_cannot_be_drawn_are_left_out_and_none_is_refused():
    with pytest.raises(ValueError, match="none of 1 scenes of two_circles"):
        next(scene_slopes(TASKS["two_circles"], 1, seed) for seed in range(50) if not TASKS["two_circles"].inside(TASKS["two_circles"]._factors(
            seed, [0], 0, 0)).any())


@pytest.mark.parametrize("call, word", [
    (lambda: toy_data(LINE, 0), "n must be"), (lambda: toy_data(LINE, 3, -1), "seed must be"), (lambda: toy_schedule(1), "T must be"),
    (lambda: Polynomial(toy_curve(LINE), 7), "degree must be"), (lambda: Polynomial(toy_curve(LINE), 0), "degree must be"),
    (lambda: ThreeWay(toy_curve(LINE), -.1), "margin must be positive"), (lambda: toy_curve(LINE, 0), "n must be")])
def test_what_cannot_be_is_refused(call, word):
    with pytest.raises(ValueError, match=word): call()


@pytest.mark.parametrize("joint", [True, False])
def test_two_layers_learn_and_repeat(joint):
    points = toy_data(LINE, 2000, 1)
    def run(seed): return [*fit_toy(net := TwoLayer(32, joint, seed), points, ABAR, 400, seed)], net
    (one, net), (two, _), (other, _) = run(0), run(0), run(1)
    assert one == two != other and len(one) == 400 and sum(one[-50:]) < .7*sum(one[:50])
    x = torch.tensor([[.3, .7], [.3, .1]], dtype=torch.float64)
    out = net.x0_hat(x, .99, .14)
    assert out.shape == (2, 2) and out.dtype == torch.float64
    assert torch.equal(out[0, 0], out[1, 0]) is not joint   # a tied network's first number does not depend on the second


def test_a_tied_network_is_no_better_than_the_separable_optimum():
    points, fresh, curve = toy_data(WAVE, 5000, 1), toy_data(WAVE, 3000, 2), toy_curve(WAVE)
    for _ in fit_toy(net := TwoLayer(64, False), points, ABAR, 1500): pass
    times = [50, 200]
    got, best = dsm_loss(net, fresh, ABAR, times), dsm_loss(Separable(curve), fresh, ABAR, times)
    assert all(b*.98 < g < 1.6*b for g, b in zip(got, best))


def test_patches_show_the_numbers_along_their_directions():
    points = toy_data(WAVE, 50, 3)
    p = toy_patches(points, 16, 3, .2, 5)
    assert p.x.shape == (50, 3, 16) and abs(p.u@p.v) < 1e-6 and p.u.norm() == pytest.approx(1)
    assert torch.allclose(torch.stack([p.x[:, 0]@p.u, p.x[:, 1]@p.v], 1).double(), points, atol=1e-5)
    assert p.x[:, 2].std() == pytest.approx(.2, rel=.1) and torch.linalg.matrix_rank(p.x[:, 0]) == 1


def test_patch_network_turns_towards_the_features():
    p = toy_patches(toy_data(WAVE, 2000, 1), 16, 3)
    net = PatchNetwork(16, 16)
    before = sum(net.alignment(p.u, p.v))
    for _ in fit_toy(net, p.x, ABAR, 400, lr=1e-2): pass
    assert before < .3 and sum(net.alignment(p.u, p.v)) > .45
    assert sum(net.alignment(*torch.eye(16))) == pytest.approx(1, abs=1e-5)
    swapped = net(p.x[:4].flip(1), torch.zeros(4, 3))
    assert torch.allclose(swapped, net(p.x[:4], torch.zeros(4, 3)).flip(1), atol=1e-6)   # all patches alike
