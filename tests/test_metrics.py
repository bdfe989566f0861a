"The metrics: every control is seen to fail with a metric that was broken on purpose; statistics against numpy and scipy."
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from scipy import stats

from rulediff_nb import gates, metrics
from rulediff_nb.core import COLOURS, range_known, to_8bit
from rulediff_nb.gates import Gate
from rulediff_nb.metrics import (
    FLOOR_SEED,
    GATES,
    ROWS,
    Measured,
    RuleReport,
    Value,
    bootstrap,
    interval,
    measure,
    paired_gap,
    permuted,
    real_images,
    report_columns,
    rule_report,
    share_interval,
    statistics,
    task_of,
    trained_on,
    training_scenes,
)
from rulediff_nb.tasks import TASKS, get_task

torch.set_num_threads(1)
SQ = get_task("two_squares", palette="random")
N, DRAWS = 128, 200
FRESH, FACTORS = SQ.sample(N, 77)
TRAIN = SQ.sample(300, 3)[0]
KEYS = {"readable", "coarse", "rule_error", "rule_gap", "error_px", "within_5", "bias", "spread", "slope", "rho", "r2_rule", "marginals",
        "joint", "duplicates", "memorized"}
WEIGHTS = Path(metrics.__file__).parent/"weights"


def report(x, **kw): return rule_report(SQ, x, **(dict(draws=DRAWS) | kw))


def noise(n): return 2*torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1


def longer(by=1.1):
    "Cool squares drawn larger by a factor, where there is room."
    room = FACTORS.l2*by < .499
    f = type(FACTORS)(*(v[room] for v in FACTORS))
    return SQ.render(SQ.with_dependent(f, by*f.l2))


def half_noise(x):
    y = x.clone()
    y[::2] = noise(len(y[::2]))
    return y


# ---------------------------------------------------------------- controls: each passes, and fails with a broken metric

def control_real():
    r = report(FRESH).rows["rule_gap"]
    assert r.low <= 0 <= r.high and abs(r.value) < .02


def control_permuted():
    f = SQ.features(to_8bit(FRESH))
    g = SQ.Factors(*permuted(SQ, f)[:len(SQ.Factors._fields)])
    r = report(SQ.render(g))
    assert abs(r.rule_gap - 1) < .25 and abs(report(SQ.sample(N, 7, violate="free")[0]).rule_gap - 1) < .3
    assert r.rows["rule_gap"].chance == pytest.approx(1) and r.rows["rule_gap"].floor == pytest.approx(0) and r.rows["rule_error"].chance > .05


def control_bias():
    r = report(longer())
    assert abs(r.bias - math.log(1.1)) < .003 and r.spread < .006 and r.coarse == r.readable and r.within_5 == 0


def control_half():
    x = longer(1.02)
    whole, half = report(x), report(half_noise(x))
    assert abs(half.readable - whole.readable/2) < .02
    assert half.coarse < .6*whole.coarse and half.within_5 < .6*whole.within_5
    assert half.rule_gap > whole.rule_gap + .3


def control_copies():
    r = report(torch.cat([TRAIN[:32], FRESH[:96]]), train=TRAIN)
    assert .25 <= r.memorized <= .25 + .1


def control_collapse():
    real, same = report(FRESH), report(FRESH[:1].expand(N, -1, -1, -1))
    assert real.marginals < real.rows["marginals"].more["bound"] and same.marginals > 2*same.rows["marginals"].more["bound"]
    assert "marginals" in same.flags and not real.flags


def control_easy():
    "Of a task whose real images cannot all be read, only those that can."
    task = get_task("perspective", palette="random")
    x = task.sample(2*N, 7)[0]
    x = x[measure(task, x).readable][:N]
    assert rule_report(task, x, draws=50).rule_gap > -.005


def control_coarse():
    task = get_task("sun_shadow_free")
    f = task.factors(N, 7)
    r = rule_report(task, task.render(f._replace(side=torch.where(torch.arange(N) % 2 == 0, f.side, -f.side))), draws=50)
    assert abs(r.rule_gap - .5) < .03


CONTROLS = dict(easy=control_easy, coarse=control_coarse, real=control_real, permuted=control_permuted, bias=control_bias,
                half=control_half, memorized=control_copies, collapse=control_collapse)


@pytest.mark.parametrize("name", CONTROLS)
def test_control(name): CONTROLS[name]()


def without_unreadable(plain):
    def f(m, size): return plain(Measured(*(v[..., m.readable] for v in m)) if m.a.ndim == 1 else m, size)
    return f


BROKEN = {  # control -> (name in metrics, what stands there instead), which the control must notice
    "gap ignores what is lost": ("half", "gap", lambda e, g, e0, g0, c: (e - e0)/(c - e0)),
    "gap without the floor": ("real", "gap", lambda e, g, e0, g0, c: .1 + e/c),
    "gap is clipped error": ("permuted", "gap", lambda e, g, e0, g0, c: e),
    "more good images than real ones are a gain": ("easy", "lost", lambda g, g0: 1 - g/g0),
    "a broken coarse rule is no loss": ("coarse", "lost", lambda g, g0: g*0),
    "chance is not permuted": ("permuted", "permuted", lambda task, f, seed=0: f),
    "unreadable rows are dropped": ("half", "statistics", without_unreadable(statistics)),
    "sides are swapped": ("bias", "measured", lambda task, f, plain=metrics.measured: (
        lambda m: m._replace(a=m.b, b=m.a))(plain(task, f))),
    "sides are sorted": ("bias", "measured", lambda task, f, plain=metrics.measured: (
        lambda m: m._replace(a=torch.maximum(m.a, m.b), b=torch.maximum(m.a, m.b)))(plain(task, f))),
    "everything is a copy": ("memorized", "memorized", lambda task, f, pool, train, other: Gate(1., True, dict(low=1., high=1.))),
    "nothing is a copy": ("memorized", "memorized", lambda task, f, pool, train, other: Gate(0., False, dict(low=0., high=0.))),
    "marginals see nothing": ("collapse", "marginals", lambda task, f, pool: Gate(0., False, dict(bound=.1))),
    "marginals are always off": ("collapse", "marginals", lambda task, f, pool: Gate(1., True, dict(bound=.1))),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_metric_trips_its_control(how, monkeypatch):
    control, name, other = BROKEN[how]
    reads = name in ("measured", "permuted")   # what is kept between calls was made with these
    if reads: real_images.cache_clear()
    monkeypatch.setattr(gates if hasattr(gates, name) else metrics, name, other)
    try:
        with pytest.raises(AssertionError): CONTROLS[control]()
    finally:
        if reads: real_images.cache_clear()


# ---------------------------------------------------------------- statistics against numpy and scipy

def made(n=50, seed=0, share=1., extra=()):
    rng = np.random.default_rng(seed)
    a, b = np.exp(rng.normal(size=(2, *extra, n)))
    ok = rng.random((*extra, n)) < share
    got, want = rng.random((2, *extra, n))
    t = torch.from_numpy
    return Measured(t(a), t(b), t(ok & (a < b)), t(got), t(want), t(ok))


@settings(max_examples=40)
@given(st.integers(2, 60), st.integers(0, 10**6), st.floats(.3, 1))
def test_statistics_agree_with_numpy(n, seed, share):
    m, s = made(n, seed, share), None
    ok, good = m.readable.numpy(), m.coarse.numpy()
    if ok.sum() < 2 or not good.any(): return
    s = {k: v.item() for k, v in statistics(m, 32).items()}
    a, b, px = m.a.numpy()[ok], m.b.numpy()[ok], 32*abs(m.measured - m.predicted).numpy()[ok]
    error = (m.b.numpy() - m.a.numpy())/(m.a.numpy() + m.b.numpy())
    log = np.log(m.b.numpy()/m.a.numpy())[good]
    want = dict(readable=ok.mean(), coarse=good.mean(), rule_error=abs(error[good]).mean(), error_px=np.median(px),
                error_px_90=np.quantile(px, .9), within_5=(abs(b/a - 1) <= .05).sum()/n, bias=np.median(log),
                spread=stats.median_abs_deviation(log, scale=1/1.4826), slope=np.polyfit(a, b, 1)[0], rho=np.corrcoef(a, b)[0, 1],
                r2_rule=1 - ((b - a)**2).sum()/((b - b.mean())**2).sum())
    assert s.keys() == want.keys()
    assert all(s[k] == pytest.approx(want[k], rel=1e-6, abs=1e-9) for k in want)


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=30), st.floats(0, 1))
def test_quantiles_agree_with_numpy(values, q):
    v = torch.tensor([*values, 99.], dtype=torch.float64)
    ok = torch.tensor([True]*len(values) + [False])
    assert metrics._quantile(v, ok, q).item() == pytest.approx(np.quantile(values, q), abs=1e-5)


def test_resamples_are_computed_like_single_sets():
    m = made(40, 1, .8, (5,))
    together = statistics(m, 32)
    for i in range(5):
        one = statistics(Measured(*(v[i] for v in m)), 32)
        assert all(torch.allclose(one[k], together[k][i], equal_nan=True) for k in one)


# ---------------------------------------------------------------- bootstrap

def test_bootstrap_covers_what_it_should():
    "A mean of normal numbers: nominally 95 % of the intervals hold it."
    def f(m): return dict(mean=m.a.mean(-1))
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 60)))
    hits = 0
    for k, row in enumerate(x):
        lo, hi = interval(bootstrap(Measured(*[row]*6), f, 300, k)["mean"])
        hits += lo <= 0 <= hi
    assert .90 <= hits/300 <= .985


def test_bootstrap_has_a_seed():
    m = made()
    a, b, c = (bootstrap(m, lambda v: statistics(v, 32), 50, s) for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["bias"], c["bias"]) and len(a["bias"]) == 50


def test_blocks_change_nothing_but_memory():
    m = made(30)
    a, b = (bootstrap(m, lambda v: statistics(v, 32), 60, 0, block) for block in (2**21, 30*7))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_bootstrap_agrees_with_scipy():
    m = made(80, 2)
    m = m._replace(coarse=m.readable)
    mine = bootstrap(m, lambda v: statistics(v, 32), 2000)["bias"]
    log = (m.b/m.a).log()[m.coarse].numpy()
    other = stats.bootstrap((log,), np.median, n_resamples=2000, method="percentile", rng=np.random.default_rng(0))
    assert mine.std().item() == pytest.approx(other.standard_error, rel=.1)
    assert interval(mine) == pytest.approx(tuple(other.confidence_interval), abs=.2*other.standard_error)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_shares_agree_with_wilson(n, part):
    "Wilson 1927: the shares p whose own standard error puts the seen share 1.96 of them away, so both ends solve one equation."
    k, z = round(part*n), stats.norm.ppf(.975)
    low, high = share_interval(k, n)
    assert 0 <= low <= k/n + 1e-12 and k/n - 1e-12 <= high <= 1 and type(low) is type(high) is float
    for p, end in ((low, 0), (high, n)):
        if k != end: assert abs(p - k/n) == pytest.approx(z*math.sqrt(p*(1 - p)/n), rel=1e-6, abs=1e-9)
        else: assert p == end/n
    assert all(math.isnan(v) for v in share_interval(0, 0))


@pytest.mark.parametrize("draws,want", [([], None), ([math.nan], None), ([1.]*9, (1., 1.)), ([math.nan, 2., math.inf], (2., 2.))])
def test_interval(draws, want):
    found = interval(torch.tensor(draws))
    assert all(map(math.isnan, found)) if want is None else found == want


# ---------------------------------------------------------------- reports

def finite(v):
    if isinstance(v, dict): return all(map(finite, v.values()))
    if isinstance(v, list): return all(map(finite, v))
    return not isinstance(v, float) or math.isfinite(v)


def whole(r, n):
    d = r.to_dict()
    assert set(d) == KEYS == set(ROWS) and finite(d) and json.loads(json.dumps(d, allow_nan=False)) == d and r.n == n
    text, html = str(r), r._repr_html_()
    assert all(k in text and k in html for k in KEYS) and text == repr(r) and html.count("<tr>") == len(KEYS) + 3   # head, both parts of the gap
    assert set(r.flags) <= set(GATES) and all((k in r.flags) == r.rows[k].more["failed"] for k in GATES)
    assert "nan" not in text and max(map(len, text.splitlines())) < 140
    return d


def test_a_report_says_everything():
    d = whole(report(FRESH, train=TRAIN), N)
    assert all({"value", "low", "high", "floor", "chance"} <= set(v) for v in d.values())
    for k in KEYS - {"marginals", "joint"}: assert d[k]["low"] <= d[k]["value"] <= d[k]["high"], k
    error = d["rule_error"]
    for k in ("floor", "chance"): assert error[f"{k}_low"] <= error[k] <= error[f"{k}_high"] and error[f"{k}_low"] < error[f"{k}_high"]
    assert len(d["rule_gap"]["terciles"]) == 3 and sum(t["share"] for t in d["rule_gap"]["terciles"]) == pytest.approx(1)
    assert all({"weight", "error_px", "error_px_floor", "rule_gap"} <= set(t) for t in d["rule_gap"]["terciles"])
    assert d["rule_gap"]["lost"] + d["rule_gap"]["missed"] == pytest.approx(d["rule_gap"]["value"])
    assert {"p90", "p90_floor"} <= set(d["error_px"]) and d["memorized"]["floor"] == .01 and d["marginals"]["factor"]
    assert {"shift", "ratio", "bound"} <= set(d["marginals"])


def test_without_a_training_set_copies_are_not_measured():
    r = report(FRESH[:16])
    assert r.memorized is None and "not measured" in str(r)


@pytest.mark.parametrize("name", TASKS)
def test_every_world(name):
    task = get_task(name, palette="fixed")
    x, _ = task.sample(32, 5)
    r = rule_report(task, x, train=x, draws=50)
    whole(r, 32)
    assert r.memorized > .9 and r.rule_gap < .1 and task.name in str(r) and "memorized" in r.flags


def test_real_images_by_the_published_numbers_at_chance():
    r = report(FRESH)
    row = r.rows["r2_rule"]
    assert abs(row.chance + 1) < .6 and row.floor > .999 and abs(r.rows["rho"].chance) < .3 and r.slope == pytest.approx(1, abs=.01)


@pytest.mark.parametrize("x", [torch.ones(9, 3, 32, 32), noise(9), -torch.ones(9, 3, 32, 32), torch.full((9, 3, 32, 32), math.nan)])
def test_nothing_readable(x):
    r = report(x, train=TRAIN)
    whole(r, 9)
    assert r.readable == r.coarse == r.within_5 == 0 and r.rule_gap == 1 and r.rows["rule_gap"].low == r.rows["rule_gap"].high == 1


@pytest.mark.parametrize("x", [FRESH[:1], noise(1), torch.cat([FRESH[:1], noise(8)]), FRESH[:2]])
def test_few_images(x): whole(report(x, train=TRAIN), len(x))


def test_a_report_has_a_seed():
    a, b, c = (report(FRESH[:40], seed=s).to_dict() for s in (0, 0, 1))
    assert a == b and a["readable"]["value"] == c["readable"]["value"] and a["rule_gap"]["low"] != c["rule_gap"]["low"]


def test_the_order_of_the_images_does_not_matter():
    a, b = report(FRESH, train=TRAIN), report(FRESH.flip(0), train=TRAIN)
    for k in KEYS: assert getattr(a, k) == pytest.approx(getattr(b, k), abs=1e-6), k


def test_images_are_rounded_to_8_bits():
    m, n = measure(SQ, FRESH[:8]), measure(SQ, to_8bit(FRESH[:8]))
    assert torch.equal(m.b, n.b)


@pytest.mark.parametrize("bad,error,word", [
    (FRESH[:0], ValueError, "at least one"), (FRESH[:, :, :16, :16], ValueError, "32x32.*16x16"), (FRESH[0], ValueError, "shape"),
    (FRESH.numpy(), TypeError, "Tensor"), (FRESH*127.5 + 127.5, ValueError, "127.5"),
    ((FRESH*127.5 + 127.5).byte(), TypeError, "uint8"), (None, TypeError, "NoneType")])
def test_wrong_images(bad, error, word):
    with pytest.raises(error, match=word): report(bad)


@pytest.mark.parametrize("bad,error,word", [
    (TRAIN[:0], ValueError, "train|empty"), (TRAIN[:, :, :16, :16], ValueError, "32x32.*16x16"),
    (TRAIN*127.5 + 127.5, ValueError, "127.5"), ((TRAIN*127.5 + 127.5).byte(), TypeError, "uint8"), (TRAIN.numpy(), TypeError, "Tensor")])
def test_wrong_training_sets(bad, error, word):
    with pytest.raises(error, match=word): report(FRESH[:4], train=bad)


def test_images_that_look_like_0_to_1_are_measured_with_a_warning():
    "As what a briefly trained model draws may be; what a model is said to have drawn is in range."
    pale = (FRESH[:16] + 1)/2
    with pytest.warns(UserWarning, match="these 16 lie in .*2\\*x - 1") as heard: r = report(pale)
    assert len(heard) == 1
    with warnings.catch_warnings(action="error"):
        with range_known(): assert report(pale) == r
        assert rule_report(SimpleNamespace(task=SQ), pale, draws=DRAWS) == r
    with pytest.warns(UserWarning, match="these 300 lie"): report(FRESH[:4], train=(TRAIN + 1)/2)


@pytest.mark.parametrize("kw,error,word", [(dict(draws=0), ValueError, "draws"), (dict(draws=1.5), TypeError, "draws"),
                                           (dict(seed=-1), ValueError, "seed"), (dict(seed=1.), TypeError, "seed")])
def test_wrong_arguments(kw, error, word):
    with pytest.raises(error, match=word): report(FRESH[:4], **kw)


def test_an_unknown_row_is_an_attribute_error():
    r = RuleReport(SQ.spec(), 0, {"readable": Value(.5, .4, .6, 1., 1., {})})
    assert r.readable == .5 and not hasattr(r, "accuracy")
    import copy
    import pickle
    assert copy.deepcopy(r) == r == pickle.loads(pickle.dumps(r))


def test_a_report_keeps_what_was_read_and_shows_none_of_it():
    import pickle
    r = report(FRESH[:8])
    assert all(torch.equal(a, b) for a, b in zip(r.features, SQ.features(to_8bit(FRESH[:8]))))
    bare = RuleReport(r.task, r.n, r.rows)
    assert bare == r and str(bare) == str(r) and bare.to_dict() == r.to_dict() and bare._repr_html_() == r._repr_html_()
    again = pickle.loads(pickle.dumps(r)).features
    assert type(again) is type(r.features) and all(torch.equal(a, b) for a, b in zip(again, r.features))


def test_floor_images_are_not_those_of_a_small_seed():
    assert FLOOR_SEED > 2**60
    a = SQ.factors(50, FLOOR_SEED).l1
    assert not any(torch.equal(a, SQ.factors(50, s).l1) for s in range(20))


def test_permuted_keeps_the_marginal_and_refused_rows():
    f = SQ.features(to_8bit(half_noise(FRESH)))
    g = permuted(SQ, f)
    assert torch.equal(f.readable, g.readable) and torch.equal(f.l1, g.l1) and torch.equal(f.l2[~f.readable], g.l2[~f.readable])
    assert torch.equal(f.l2[f.readable].sort().values, g.l2[f.readable].sort().values) and not torch.equal(f.l2, g.l2)
    sun = get_task("sun_shadow_free", palette="random")
    f = sun.features(to_8bit(sun.sample(100, 0)[0]))
    g = permuted(sun, f)
    pairs = [sorted(zip(v.l2[v.readable].tolist(), v.side[v.readable].tolist())) for v in (f, g)]
    assert pairs[0] == pairs[1] and not torch.equal(f.side, g.side)   # length and side travel together


def test_values_are_clamped_below():
    f = SimpleNamespace(l1=torch.tensor([0., 1.]), l2=torch.tensor([-1., 1.]), readable=torch.tensor([True, True]))
    m = metrics.measured(SQ, f)
    assert m.a.tolist() == [1e-6, 1.5] and m.b.tolist() == [1e-6, 1.] and m.a.dtype == torch.float64


def test_a_world_may_be_named():
    x = get_task("two_squares").sample(16, 3)[0]
    assert rule_report("two_squares", x).to_dict() == rule_report(get_task("two_squares"), x).to_dict()
    assert torch.equal(measure("two_squares", x).a, measure(get_task("two_squares"), x).a)
    for f in (rule_report, measure):
        with pytest.raises(ValueError, match="unknown task 'moon'"): f("moon", x)


# ---------------------------------------------------------------- what is measured: a task, its name, a model

class Module(torch.nn.Module):
    "A network as far as the report knows one."
    def __init__(self, **parts):
        super().__init__()
        for k, v in parts.items(): setattr(self, k, v)


MIXED = torch.cat([TRAIN[-20:], FRESH[:20]])   # the end of the training set, which a part of it would miss
RECIPE = SimpleNamespace(task=SQ)
MODELS = {
    "task and set": Module(task=SQ, trained_on=TRAIN), "task from the recipe": Module(recipe=RECIPE, trained_on=TRAIN),
    "set on demand": Module(recipe=RECIPE, trained_on=lambda: TRAIN),
    "task before recipe": Module(task=SQ, recipe=SimpleNamespace(task=get_task("two_circles")), trained_on=TRAIN),
    "guided": Module(model=Module(recipe=RECIPE, trained_on=TRAIN), recipe=RECIPE),
    "guided twice": Module(model=Module(model=Module(task=SQ, trained_on=lambda: TRAIN))), "no module": SimpleNamespace(task=SQ, trained_on=TRAIN),
    "guided, with a set of its own": Module(model=Module(recipe=RECIPE, trained_on=TRAIN[:5]), trained_on=TRAIN)}


@pytest.mark.parametrize("what", MODELS)
def test_a_model_stands_for_its_task_and_its_training_set(what):
    r = rule_report(MODELS[what], MIXED, draws=DRAWS)
    assert r == report(MIXED, train=TRAIN) and .45 < r.memorized < .6 and measure(MODELS[what], MIXED).b.equal(measure(SQ, MIXED).b)


def test_an_explicit_training_set_wins():
    def never(): raise AssertionError("not asked for")
    r = rule_report(SimpleNamespace(task=SQ, trained_on=never), MIXED, train=TRAIN[:200], draws=DRAWS)
    assert r.memorized < .1 and r == report(MIXED, train=TRAIN[:200])


@pytest.mark.parametrize("model", [SQ, "two_squares", SimpleNamespace(task=SQ), SimpleNamespace(task=SQ, trained_on=None),
                                   SimpleNamespace(task=SQ, trained_on=lambda: None), SimpleNamespace(recipe=RECIPE, model=None)])
def test_without_a_known_training_set_nothing_is_compared(model):
    r = rule_report(model, FRESH[:8], draws=DRAWS)
    assert r.memorized is None and "not measured" in str(r) and trained_on(model) is None


def test_a_wrong_training_set_of_a_model_is_refused():
    for bad, error in ((TRAIN[:0], ValueError), (TRAIN.numpy(), TypeError), (TRAIN[:, :, :16, :16], ValueError)):
        with pytest.raises(error): rule_report(SimpleNamespace(task=SQ, trained_on=bad), FRESH[:4])


@pytest.mark.parametrize("bad,said", [
    (None, "NoneType"), (3, "int"), (FRESH, "Tensor"), (torch.nn.Linear(2, 2), "Linear"), (type(SQ), "TwoSquares"), (["two_squares"], "list"),
    (SimpleNamespace(task="two_squares"), "SimpleNamespace"), (SimpleNamespace(recipe=SimpleNamespace(task=None)), "SimpleNamespace")])
def test_what_names_no_task_is_refused(bad, said):
    for f in (lambda: rule_report(bad, FRESH[:4]), lambda: measure(bad, FRESH[:4]), lambda: task_of(bad)):
        with pytest.raises(TypeError, match=f"a task, the name of one, or a model .*got {said}$"): f()


def test_a_model_that_wraps_itself_ends():
    loop = SimpleNamespace()
    loop.model = loop
    with pytest.raises(TypeError, match="SimpleNamespace"): task_of(loop)


# ---------------------------------------------------------------- notes, marks, the figure

@pytest.mark.parametrize("name", TASKS)
def test_the_other_palette_is_noted(name):
    random, fixed = (get_task(name, palette=p) for p in ("random", "fixed"))
    xr, xf = random.sample(100, 5)[0], fixed.sample(100, 5)[0]
    (said,) = rule_report(name, xr, draws=2).notes
    strange, more, now = int(said.split()[0]), int(said.split("reads ")[1].split()[0]), int(said.split()[-1][:-1])
    assert "of 100 images are refused for their colours alone" in said and "palette='random' reads" in said and strange > 70
    assert more == int(measure(random, xr[:64]).readable.sum()) > 30 > now == int(measure(fixed, xr[:64]).readable.sum())
    r = rule_report(random, xf, draws=2)
    assert r.readable > .5 and f"of {round(100*r.readable)} readable images have the fixed colours: palette='fixed' reads 64 of" in r.notes[0]
    for task, x in ((random, xr), (fixed, xf)): assert rule_report(task, x, draws=2).notes == ()


FAULTS = {
    "none": lambda x: x, "noise": lambda x: noise(32), "white": torch.ones_like, "not finite": lambda x: x*math.nan, "half noise": half_noise,
    "moved": lambda x: x.roll(9, 2), "upside down": lambda x: x.flip(2), "pale": lambda x: .6 + .4*x,
    "dark": lambda x: .6*x - .4, "blurred": lambda x: torch.nn.functional.avg_pool2d(x, 5, 1, 2), "two images": lambda x: x[:2]}


@pytest.mark.filterwarnings("ignore:images must be in")   # the pale ones
@pytest.mark.parametrize("palette", ["random", "fixed"])
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_images_are_no_case_of_the_other_palette(palette, fault):
    task = SQ.with_(palette=palette)
    assert rule_report(task, FAULTS[fault](task.sample(32, 77)[0]), draws=2).notes == ()


@pytest.mark.parametrize("share,noted", [(.4, False), (.6, True)])
def test_a_note_needs_more_than_half_of_the_images(share, noted):
    x = SQ.with_(palette="fixed").sample(40, 77)[0]
    x[:int(40*share)] = FRESH[:int(40*share)]
    assert bool(rule_report("two_squares", x, draws=2).notes) == noted


def test_a_few_images_or_many_strange_ones_say_nothing_about_the_random_palette():
    x = SQ.with_(palette="fixed").sample(40, 77)[0]
    assert not report(x[:3]).notes and report(x[:4]).notes
    x[:8] = FRESH[:8]
    assert not report(x).notes


def test_wrong_colours_are_noted_whatever_they_are():
    x = SQ.with_(palette="fixed").sample(32, 77)[0]
    assert "32 of 32 images are refused for their colours alone" in rule_report("two_squares", x.flip(1), draws=2).notes[0]   # BGR


def test_honest_images_are_read_once(monkeypatch):
    "A note costs a second reading, of 64 images at most; without one there is none."
    seen, plain = [], type(SQ).features
    monkeypatch.setattr(type(SQ), "features", lambda self, x: seen.append((self.palette, len(x))) or plain(self, x))
    real_images(SQ, N), real_images(SQ.with_(palette="fixed"), N), seen.clear()
    report(FRESH), report(half_noise(FRESH))
    assert seen == [("random", N)]*2
    rule_report("two_squares", FRESH, draws=2)
    assert seen[2:] == [("fixed", N), ("random", 64)]


def test_notes_stand_under_the_rows():
    r = rule_report("two_squares", FRESH[:16], draws=DRAWS)
    bare = RuleReport(r.task, r.n, r.rows)
    assert len(r.notes) == 1 and str(r) == f"{bare}\nNote: {r.notes[0]}" and "Note" not in str(bare)
    assert r._repr_html_().startswith(bare._repr_html_()) and "palette=&#x27;random&#x27;" in r._repr_html_()
    assert r.to_dict() == bare.to_dict() and r.table() == bare.table() and set(r.to_dict()) == KEYS
    assert "<b>" not in RuleReport(r.task, 0, {}, notes=("<b>",))._repr_html_()


@pytest.mark.parametrize("failed", [False, True])
def test_marginals_stand_beside_their_bound(failed):
    more = dict(factor="r1", bound=.05, shift=-.77, ratio=.4, failed=failed)
    r = RuleReport(SQ.spec(), 9, {"marginals": Value(.1, None, None, 0., None, more)})
    said = "bound 0.050, worst r1 (-0.77 sd, spread 0.400)" + " FLAG"*failed
    assert r.table()[1] == ("marginals", "0.100", said, "0.000", "-") and f"  {said}  " in str(r) and f"<td>{said}</td>" in r._repr_html_()
    assert r.flags == ("marginals",)*failed and ("Flags: marginals." in str(r)) == ("Flags: marginals." in r._repr_html_()) == failed


def test_a_report_flags_marginals_above_their_bound():
    def beside(x): return {row[0]: row[2] for row in report(x).table()}["marginals"]
    assert beside(FRESH).startswith("bound ") and beside(FRESH[:1].expand(N, -1, -1, -1)).endswith("FLAG") and "FLAG" not in beside(FRESH)


def test_the_report_says_where_the_error_lies():
    sun = get_task("sun_shadow_free")
    f = sun.factors(128, 9)
    r = rule_report(sun, sun.render(f._replace(l2=(f.l2 + .5/32).clamp(max=.5))), draws=20)
    line = next(v for v in str(r).splitlines() if v.startswith("Median miss in px"))
    assert [w.split()[0] for w in line.split(": ")[1].split(", ")] == ["short", "middle", "long", "near", "far"] and line in r._repr_html_()
    d = r.to_dict()["rule_gap"]
    assert d["near"]["weight"] + d["far"]["weight"] == pytest.approx(1) and d["near"]["weight"] > d["near"]["share"]
    assert sum(t["weight"] for t in d["terciles"]) == pytest.approx(1) and abs(d["far"]["error_px"] - .5) < .02
    assert "near" not in report(FRESH).to_dict()["rule_gap"] and "near" not in str(report(FRESH))


def test_exact_factors_stand_for_a_training_set():
    "They are what the ruler would have read, and need no reading."
    task = get_task("two_circles")
    x, f = task.sample(200, 3)
    a, b = (rule_report(task, torch.cat([x[:32], task.sample(32, 9)[0]]), train=t, draws=5) for t in (x, f))
    assert a.memorized == pytest.approx(b.memorized, abs=.04) and "memorized" in a.flags and "memorized" in b.flags
    model = SimpleNamespace(task=task, trained_scenes=lambda: f, trained_on=lambda: 1/0)
    assert rule_report(model, x[:32], draws=5).memorized > .9
    with pytest.raises(TypeError, match="CircleFactors, got SunFactors"): training_scenes(task, get_task("sun_shadow").factors(4, 0))


def test_a_training_set_is_read_once(monkeypatch):
    seen, plain = [], metrics.read
    monkeypatch.setattr(metrics, "read", lambda task, x: seen.append(len(x)) or plain(task, x))
    train = SQ.sample(50, 12)[0]
    for t in (train, train.clone(), train[:49]): report(FRESH[:20], train=t)
    assert [n for n in seen if n != 20] == [50, 49]


def test_columns_of_a_report():
    r = report(FRESH[:1].expand(N, -1, -1, -1), train=TRAIN)
    line = report_columns(r)
    assert line["rule_gap"] == r.rule_gap and line["lost"] + line["missed"] == pytest.approx(r.rule_gap)
    assert line["marginals_factor"] in SQ.Factors._fields + tuple(metrics.real_images(SQ, N).pool._fields) or " " in line["marginals_factor"]
    assert line["flags"].split() == list(r.flags) and "marginals" in line["flags"] and line["marginals_bound"] < line["marginals"]
    assert set(report_columns(r, ("readable",), ("value",))) == {"readable", "flags"}


# ---------------------------------------------------------------- pairs

def pair(by, n=256):
    m = measure(SQ, SQ.sample(n, 31)[0])
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=n))
    one = m._replace(b=m.b*(.1*noise).exp())
    return one, one._replace(b=one.b*math.exp(by))


def test_pairs_share_their_luck():
    "The paired interval is narrower than two separate ones, holds nothing for equal batches, and is what says the same."
    a, b = pair(.02)
    same, off = paired_gap(SQ, a, a), paired_gap(SQ, b, a)
    assert same == dict(diff=0., diff_low=0., diff_high=0., same=True)
    assert off["diff_low"] <= off["diff"] <= off["diff_high"]
    apart = paired_gap(SQ, b._replace(**{k: getattr(b, k).flip(0) for k in b._fields}), a)
    assert off["diff_high"] - off["diff_low"] < .7*(apart["diff_high"] - apart["diff_low"])
    far = paired_gap(SQ, pair(.3)[1], a)
    assert far["diff_low"] > 0 and not far["same"]


def test_pairs_of_several_batches_are_averaged():
    a, b = pair(.1)
    one, two = paired_gap(SQ, b, a), paired_gap(SQ, [b, a], [a, a])
    assert two["diff"] == pytest.approx(one["diff"]/2)
    with pytest.raises(ValueError, match="as many rows"): paired_gap(SQ, a, Measured(*(v[:5] for v in a)))
    with pytest.raises(ValueError): paired_gap(SQ, [a], [a, a])


def test_a_report_has_the_form_of_the_shipped_manifests():
    d = report(FRESH, train=TRAIN).to_dict()
    for path in sorted(WEIGHTS.glob("*.json")):
        rows = json.loads(path.read_text())["report"]["rows"]
        assert list(rows) == list(d) and all(set(d[k]) <= set(rows[k]) for k in d), path.name


def test_plot():
    r = report(half_noise(FRESH), train=TRAIN)
    fig = r.plot("images", "guided")
    left, right = fig.axes
    assert [t.get_text() for t in left.get_legend().get_texts()] == [f"real, {N} of {N}", f"images, {N//2} of {N}"]
    ends = {line.get_label().split(",")[0]: line.get_ydata()[-1] for line in right.lines}
    assert ends == {"images": .5, "real": 1, "no rule": 1} and right.lines[0].get_color() == COLOURS["guided"]
    assert left.collections[-1].get_facecolor()[0, :3] == pytest.approx(to_rgb(COLOURS["guided"]))
    middle = right.lines[1].get_xdata()[np.searchsorted(right.lines[1].get_ydata(), .5)]
    assert middle == pytest.approx(max(r.rows["error_px"].floor, 1e-3), rel=.05)
    said = fig.get_suptitle()
    assert "two_squares random" in said
    assert all(f"{v:.3f}" in said for v in (r.rule_gap, r.rows["rule_gap"].low, r.readable)) and all(k in said for k in r.flags) and r.flags


@pytest.mark.parametrize("x", [noise(9), FRESH[:1], FRESH[:2]])
def test_anything_can_be_plotted(x): assert len(report(x).plot().axes) == 2 and "not measured" in report(x).plot().get_suptitle()


def test_a_plot_needs_images_and_survives_a_pickle():
    import pickle
    r = report(FRESH[:8])
    assert len(pickle.loads(pickle.dumps(r)).plot().axes) == 2
    with pytest.raises(ValueError, match="no images to plot"): RuleReport(r.task, r.n, r.rows).plot()


def test_a_task_by_name_and_the_task_of_a_model_agree():
    x = get_task("sun_shadow_free").sample(24, 3)[0]
    model = SimpleNamespace(recipe=SimpleNamespace(task=TASKS["sun_shadow_free"]))
    a, b = (rule_report(v, x, draws=DRAWS) for v in ("sun_shadow_free", model))
    assert a == b and a.task["palette"] == "fixed" and a.readable > .9
