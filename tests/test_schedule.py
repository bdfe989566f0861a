"The forward process: diffusers' numbers for every schedule and target, ends and dtypes, what is refused, and broken formulas seen."
import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from rulediff_nb import schedule as own
from rulediff_nb.core import row_noise
from rulediff_nb.schedule import (
    PREDICTIONS,
    SCHEDULES,
    add_noise,
    amplitudes,
    best_accuracy,
    min_snr_weight,
    noise_schedule,
    snr,
    solve,
    target,
)

torch.set_num_threads(1)
PAIRS = [(k, p) for k in SCHEDULES for p in PREDICTIONS if (k, p) != ("zero_snr", "epsilon")]
pairs = pytest.mark.parametrize("betas,prediction", PAIRS)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_schedule = pytest.mark.parametrize("betas", SCHEDULES)
FULL = torch.arange(1000)


def abar_of(betas="linear", T=1000): return noise_schedule(T, betas=betas).alphas_cumprod


def scenes(n, seed=0, size=8, dtype=torch.float32):
    "An image, its noise and an answer, at random."
    return [row_noise(seed, range(n), (3, size, size), stream=i).to(dtype) for i in range(3)]


# ---------------------------------------------------------------- beside diffusers

def cos2(u): return math.cos((u + .008)/1.008*math.pi/2)**2


def formula(betas, T):
    "abar, timestep by timestep in plain floats."
    out, a = [], 1.
    for i in range(T):
        a *= 1 - (min(1 - cos2((i + 1)/T)/cos2(i/T), .999) if betas == "cosine" else 1e-4 + (2e-2 - 1e-4)*i/(T - 1))
        out.append(a)
    if betas == "zero_snr":
        first, last = math.sqrt(out[0]), math.sqrt(out[-1])
        out = [((math.sqrt(v) - last)*first/(first - last))**2 for v in out]
    return torch.tensor(out, dtype=torch.float64)


def constants_off(betas, T, abar=None): return (formula(betas, T) - (abar_of(betas, T) if abar is None else abar)).abs().max().item()


@pytest.mark.parametrize("T", [2, 3, 50, 1000])
@every_schedule
def test_constants_are_the_published_formulas(betas, T):
    assert constants_off(betas, T) < 5e-6   # float32, which loses digits where it subtracts the last amplitude
    s = noise_schedule(T, betas=betas)
    assert len(s.alphas_cumprod) == T and s.config.num_train_timesteps == T and (s.alphas_cumprod.diff() < 0).all()
    assert (s.alphas_cumprod[-1] == 0) == (betas == "zero_snr")


def against_diffusers(betas, prediction, seed):
    "Largest differences of noise, velocity, implied image and ratio from diffusers' own."
    s = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, prediction_type=prediction, clip_sample=False, **SCHEDULES[betas])
    a, k = s.alphas_cumprod, torch.randint(999, (32,), generator=torch.Generator().manual_seed(seed)).sort().values
    x0, eps, answer = scenes(32, seed)
    xt = own.add_noise(x0, k, eps, a)
    theirs = torch.cat([s.step(answer[i:i + 1], int(k[i]), xt[i:i + 1]).pred_original_sample for i in range(32)])
    apart = dict(noise=xt - s.add_noise(x0, eps, k), v=own.target(x0, eps, k, a, "v_prediction") - s.get_velocity(x0, eps, k),
                 x0=(own.solve(xt, answer, k, a, prediction).x0 - theirs)/theirs.abs().clamp(min=1),
                 snr=own.snr(a[k])/compute_snr(s, k) - 1, weight=own.min_snr_weight(k, a, prediction)/usual(s, k, prediction) - 1)
    return {name: v.abs().max().item() for name, v in apart.items()}


def usual(s, k, prediction):
    "Min-SNR weights as diffusers' training scripts write them."
    r = compute_snr(s, k)
    low = torch.stack([r, 5.*torch.ones_like(k)], 1).min(1)[0]
    return dict(epsilon=low/r, v_prediction=low/(r + 1), sample=low)[prediction]


@pytest.mark.parametrize("seed", [0, 1])
@pairs
def test_the_same_numbers_as_diffusers(betas, prediction, seed):
    off = against_diffusers(betas, prediction, seed)
    assert max(off.values()) < 1e-5, off


def test_the_scheduler_is_diffusers_own():
    s = noise_schedule(T=50, beta_start=1e-3, beta_end=1e-1, prediction="sample")
    assert type(s) is DDPMScheduler and s.config.clip_sample and s.config.prediction_type == "sample"
    assert s.config.beta_start == 1e-3 and s.betas[-1] == torch.tensor(1e-1)


# ---------------------------------------------------------------- conversions

@pytest.mark.parametrize("T", [2, 1000])
@pairs
def test_a_target_gives_back_both_unknowns(betas, prediction, T):
    a, t = abar_of(betas, T).double(), torch.arange(T)
    x0, eps, _ = scenes(T, dtype=torch.float64)
    got = solve(add_noise(x0, t, eps, a), target(x0, eps, t, a, prediction), t, a, prediction)
    assert (got.x0 - x0).abs().max() < 1e-9 and (got.eps - eps).abs().max() < 1e-9


@pairs
def test_a_wrong_answer_implies_a_pair_that_makes_xt(betas, prediction):
    a = abar_of(betas).double()
    xt, answer, _ = scenes(1000, dtype=torch.float64)
    got = solve(xt, answer, FULL, a, prediction)
    assert (add_noise(got.x0, FULL, got.eps, a) - xt).abs().max() < 1e-9
    assert (target(got.x0, got.eps, FULL, a, prediction) - answer).abs().max() < 1e-9


def test_without_signal_epsilon_says_nothing_and_v_everything():
    a, t, (x0, eps, _) = abar_of("zero_snr"), torch.tensor([999, 999]), scenes(2)
    xt = add_noise(x0, t, eps, a)
    assert torch.equal(xt, eps)
    assert torch.equal(solve(xt, target(x0, eps, t, a, "v_prediction"), t, a, "v_prediction").x0, x0)
    assert not solve(xt, eps, t, a, "epsilon").x0.isfinite().any()


# ---------------------------------------------------------------- dtypes, devices, gradients

@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.float16, .01), (torch.bfloat16, .1)])
@every_prediction
def test_the_dtype_of_the_images_is_kept(dtype, bound, wide, prediction):
    a, (x0, eps, _) = abar_of().to(wide), scenes(1000, dtype=dtype)
    xt, want = add_noise(x0, FULL, eps, a), target(x0, eps, FULL, a, prediction)
    got = solve(xt, want, FULL, a, prediction)
    assert {v.dtype for v in (xt, want, *got)} == {dtype}
    exact = abar_of().double().view(-1, 1, 1, 1)
    assert (xt.double() - exact.sqrt()*x0.double() - (1 - exact).sqrt()*eps.double()).abs().max() < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_noise_of_the_first_levels(dtype):
    t, eps = torch.arange(20), torch.ones(20, 1, 1, 1, dtype=dtype)
    got, want = add_noise(0*eps, t, eps, abar_of()).flatten().double(), (1 - abar_of()[:20].double()).sqrt()
    assert ((got - want)/want).abs().max() < .01


def test_results_follow_the_images():
    "The meta device stands for any other one: timesteps and constants may lie on the CPU."
    x, t = torch.empty(2, 3, 8, 8, device="meta"), torch.tensor([0, 999])
    a = abar_of()
    assert add_noise(x, t.to("meta"), x, a).device.type == "meta"
    if torch.cuda.is_available():
        x0, eps, _ = scenes(2)
        for timesteps in (t, t.cuda()):
            xt = add_noise(x0.cuda(), timesteps, eps.cuda(), a)
            got = solve(xt, target(x0.cuda(), eps.cuda(), timesteps, a, "v_prediction"), timesteps, a, "v_prediction")
            assert got.x0.is_cuda and (xt.cpu() - add_noise(x0, t, eps, a)).abs().max() < 1e-6
        assert min_snr_weight(t.cuda(), a, "v_prediction").is_cuda


@every_prediction
def test_gradients_flow(prediction):
    a, t = abar_of().double(), torch.tensor([0, 400, 999])
    x0, eps, answer = [v.requires_grad_() for v in scenes(3, size=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda x, e: add_noise(x, t, e, a), (x0, eps))
    assert torch.autograd.gradcheck(lambda x, e: target(x, e, t, a, prediction), (x0, eps))
    assert torch.autograd.gradcheck(lambda x, p: tuple(solve(x, p, t, a, prediction)), (x0, answer))


def test_inputs_are_left_alone():
    a, (x0, eps, answer) = abar_of(), scenes(4)
    t, before = torch.arange(4), [v.clone() for v in (a, x0, eps, answer)]
    add_noise(x0, t, eps, a), solve(x0, answer, t, a, "v_prediction"), min_snr_weight(t, a, "v_prediction"), best_accuracy(x0, eps, a)
    assert all(torch.equal(v, w) for v, w in zip((a, x0, eps, answer), before, strict=True)) and torch.equal(t, torch.arange(4))


def test_no_rows():
    x = torch.empty(0, 3, 8, 8)
    assert add_noise(x, torch.empty(0).long(), x, abar_of()).shape == x.shape


# ---------------------------------------------------------------- what is refused

ASK = dict(amplitudes=lambda t, x, a, p="epsilon": amplitudes(t, a), add_noise=lambda t, x, a, p="epsilon": add_noise(x, t, x, a),
           target=lambda t, x, a, p="epsilon": target(x, x, t, a, p), solve=lambda t, x, a, p="epsilon": solve(x, x, t, a, p),
           weight=lambda t, x, a, p="epsilon": min_snr_weight(t, a, p))


@pytest.mark.parametrize("t,said", [([0, 1000], r"\[0, 999\], got 0 to 1000"), ([-1, 5], "got -1 to 5")])
@pytest.mark.parametrize("name", ASK)
def test_a_level_that_does_not_exist_is_refused(name, t, said):
    "Without a check -1 would be the last timestep."
    with pytest.raises(ValueError, match=said): ASK[name](torch.tensor(t), scenes(2)[0], abar_of())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
@pytest.mark.parametrize("name", ASK)
def test_a_level_is_a_whole_number(name, dtype):
    "Without a check bool and uint8 would pick timesteps as a mask."
    with pytest.raises(TypeError, match="int64, got torch"): ASK[name](torch.ones(2, dtype=dtype), scenes(2)[0], abar_of())


@pytest.mark.parametrize("name", ["target", "solve", "weight"])
def test_an_unknown_target_is_refused(name):
    with pytest.raises(ValueError, match="prediction must be one of .*'v_prediction'.*, got 'noise'"):
        ASK[name](torch.zeros(2).long(), scenes(2)[0], abar_of(), "noise")


@pytest.mark.parametrize("change,error,said", [
    (dict(prediction="noise"), ValueError, "prediction must be one of"), (dict(betas="sigmoid"), ValueError, "betas must be one of"),
    (dict(prediction="epsilon", betas="zero_snr"), ValueError, "holds no signal"),
    (dict(T=1), ValueError, "T must be in"), (dict(T=1e3), TypeError, "T must be a whole number")])
def test_a_schedule_that_cannot_be_is_refused(change, error, said):
    with pytest.raises(error, match=said): noise_schedule(**change)


def test_checks_do_not_break_a_compiled_graph():
    seen = []
    def backend(g, _):
        seen.append(g)
        return g.forward
    f = torch.compile(lambda x, t: add_noise(x, t, x, A), backend=backend, fullgraph=True)
    A, x = abar_of(), scenes(2)[0]
    assert torch.equal(f(x, torch.tensor([3, 5])), add_noise(x, torch.tensor([3, 5]), x, A)) and len(seen) == 1


# ---------------------------------------------------------------- weights and the best test

@pytest.mark.parametrize("gamma", [1., 5., 20.])
@every_schedule
def test_the_weights_are_one_weight_on_the_image(betas, gamma):
    a = abar_of(betas)
    r = snr(a.double())
    factor = dict(epsilon=r, v_prediction=r + 1, sample=torch.ones_like(r))
    for prediction in PREDICTIONS:
        w = min_snr_weight(FULL, a, prediction, gamma)
        assert w.dtype == torch.float32 and w.isfinite().all()
        assert (w*factor[prediction] - r.clamp(max=gamma)).abs().max() < 1e-5*gamma


@every_prediction
def test_weights_stay_finite_at_both_ends(prediction):
    assert min_snr_weight(torch.tensor([0, 1]), torch.tensor([1., 0.]), prediction).isfinite().all()


def test_snr_ends():
    assert snr(torch.tensor(0.)) == 0 and snr(torch.tensor(1.)).isinf() and snr(torch.tensor(.5)) == 1


def simulated(xa, xb, a, n=4000):
    "Right answers of the likelihood-ratio test, n noises over each scene."
    eps = row_noise(3, range(n), xa.shape[1:])
    right = 0
    for true, other in ((xa, xb), (xb, xa)):
        x = a.sqrt()*true + (1 - a).sqrt()*eps
        right += ((x - a.sqrt()*true).flatten(1).norm(dim=1) < (x - a.sqrt()*other).flatten(1).norm(dim=1)).sum().item()
    return right/(2*n)


@pytest.mark.parametrize("timestep", [100, 300, 500])
@pytest.mark.parametrize("apart", [.5, 2.])
def test_no_test_is_better_and_one_is_as_good(apart, timestep):
    a, (xa, d, _) = abar_of()[timestep], scenes(1)
    xb = xa + apart*d/d.norm()
    want = best_accuracy(xa, xb, a[None]).item()
    assert abs(simulated(xa, xb, a) - want) < 4*math.sqrt(want*(1 - want)/8000)


def test_best_accuracy_of_many_pairs():
    xa, xb, _ = scenes(3)
    p = best_accuracy(xa, torch.cat([xb[:2], xa[2:]]), abar_of("zero_snr"))
    assert p.shape == (3, 1000) and p.dtype == torch.float32 and (p.diff(dim=1) <= 1e-6).all()
    assert (p[2] == .5).all() and (p[:, -1] == .5).all() and p[0, 0] == 1
    assert torch.equal(p[1:2], best_accuracy(xa[1:2], xb[1:2], abar_of("zero_snr")))
    assert best_accuracy(xa.double(), xb.double(), abar_of()).dtype == torch.float64


# ---------------------------------------------------------------- a broken formula is seen

@pytest.mark.parametrize("betas,change", [
    ("linear", dict(betas="cosine")), ("cosine", dict(betas="linear")), ("zero_snr", dict(betas="linear")), ("linear", dict(betas="zero_snr")),
    ("linear", dict(beta_end=.0201)), ("linear", dict(beta_start=2e-4)), ("zero_snr", dict(beta_end=.019))])
def test_other_constants_are_seen(betas, change):
    assert constants_off(betas, 1000, noise_schedule(**(dict(betas=betas) | change)).alphas_cumprod) > 1e-5


def scaled(f, k=1.001): return lambda *a, **kw: f(*a, **kw)*k


def without_roots(t, abar): return tuple(v.square() for v in amplitudes(t, abar))


@pytest.mark.parametrize("name,broken,where,prediction", [
    ("amplitudes", without_roots, "noise", "epsilon"), ("amplitudes", lambda t, a: amplitudes(t, a)[::-1], "noise", "epsilon"),
    ("amplitudes", lambda t, a: amplitudes((t - 1).clamp(min=0), a), "noise", "epsilon"),
    ("add_noise", scaled(add_noise), "noise", "epsilon"), ("snr", lambda a: a, "snr", "epsilon"),
    ("snr", lambda a: (a/(1 - a)).sqrt(), "snr", "epsilon"), ("snr", scaled(snr), "weight", "v_prediction"),
    ("min_snr_weight", lambda t, a, p, g=5.: min_snr_weight(t, a, p, 4.9), "weight", "sample")])
def test_a_broken_function_is_seen(monkeypatch, name, broken, where, prediction):
    monkeypatch.setattr(own, name, broken)
    assert against_diffusers("linear", prediction, 0)[where] > 1e-5


@pytest.mark.parametrize("table,prediction,broken,where", [
    ("PREDICTIONS", "v_prediction", lambda x0, eps, s, n: n*x0 - s*eps, "v"),
    ("PREDICTIONS", "v_prediction", lambda x0, eps, s, n: n*eps - s*x0, "v"),
    ("_SOLVE", "epsilon", lambda xt, p, s, n: own.Clean((xt - p)/s, p), "x0"),
    ("_SOLVE", "epsilon", lambda xt, p, s, n: own.Clean(xt - n*p, p), "x0"),
    ("_SOLVE", "v_prediction", lambda xt, p, s, n: own.Clean(s*xt + n*p, n*xt + s*p), "x0"),
    ("_SOLVE", "sample", lambda xt, p, s, n: own.Clean(p*s, (xt - s*p)/n), "x0"),
    ("_TO_X0", "epsilon", lambda r: 1/(r + 1), "weight"), ("_TO_X0", "v_prediction", lambda r: 1/r, "weight"),
    ("_TO_X0", "sample", lambda r: 1/r, "weight")])
def test_a_broken_conversion_is_seen(monkeypatch, table, prediction, broken, where):
    monkeypatch.setitem(getattr(own, table), prediction, broken)
    assert against_diffusers("linear", prediction, 0)[where] > 1e-5


@pytest.mark.parametrize("prediction,broken", [
    ("v_prediction", lambda xt, p, s, n: own.Clean(s*xt - n*p, n*xt - s*p)),
    ("sample", lambda xt, p, s, n: own.Clean(p, (xt - p)/n)), ("epsilon", lambda xt, p, s, n: own.Clean((xt - n*p)/s, -p))])
def test_a_wrong_noise_is_seen(monkeypatch, prediction, broken):
    monkeypatch.setitem(own._SOLVE, prediction, broken)
    with pytest.raises(AssertionError): test_a_target_gives_back_both_unknowns("linear", prediction, 1000)


@pytest.mark.parametrize("wrong", [lambda d, r: d*r.sqrt(), lambda d, r: d/2*r, lambda d, r: d/2*(r/(1 + r)).sqrt()])
def test_a_wrong_best_accuracy_is_seen(monkeypatch, wrong):
    def broken(xa, xb, a): return torch.special.ndtr(wrong((xa - xb).flatten(1).norm(dim=1)[:, None], snr(a)))
    monkeypatch.setitem(globals(), "best_accuracy", broken)
    with pytest.raises(AssertionError): [test_no_test_is_better_and_one_is_as_good(2., k) for k in (100, 300, 500)]
