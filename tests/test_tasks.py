"The tasks: distributions and supports as published, rows of their own, four ways to break a rule, exact drawing."
import colorsys
import json
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from drawing import by_matplotlib
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rulediff_nb.core import to_8bit
from rulediff_nb.features import features_type  # noqa: F401  (gives every task its `features`)
from rulediff_nb.tasks import (
    METHODS,
    RANDOM,
    FIXED,
    TASKS,
    Disc,
    Perspective,
    Rect,
    SunShadow,
    Task,
    TwoCircles,
    TwoSquares,
    check_task,
    disc_coverage,
    draw_rgb,
    get_task,
    hsv_to_rgb,
    rect_coverage,
    register,
)

torch.set_num_threads(1)
NAMES = list(TASKS)
PUBLISHED = {name: t.with_(palette="random") for name, t in TASKS.items()}   # colours vary as well
names = pytest.mark.parametrize("name", NAMES)
FACTORS = {}


def factors(name, n=4000, seed=5, **kw):
    "Factors, drawn once."
    key = name, n, seed, *sorted(kw.items())
    if key not in FACTORS: FACTORS[key] = PUBLISHED[name].factors(n, seed, **kw)
    return FACTORS[key]


def take(f, i): return type(f)(*(v[i] for v in f))


def double(f): return type(f)(*(v.double() for v in f))


def equal(f, g): return all(torch.equal(a, b) for a, b in zip(f, g))


# ---------------------------------------------------------------- what holds for every image

tasks = st.builds(lambda name, size, palette: get_task(name, size=size, palette=palette),
                   st.sampled_from(NAMES), st.integers(16, 128), st.sampled_from(["random", "fixed"]))


@settings(max_examples=40)
@given(tasks, st.integers(0, 2**63 - 1), st.integers(1, 9))
def test_any_seed_size_and_palette_keeps_the_rule(task, seed, n):
    x, f = task.sample(n, seed)
    assert x.shape == (n, 3, task.size, task.size) and x.dtype == torch.float32
    assert x.isfinite().all() and x.min() >= -1 and x.max() <= 1
    a, b = task.sides(f)
    assert (a - b).abs().max() < 1e-5 and task.coarse(f).all()
    got, want = task.dependent(f)
    assert torch.equal(got, getattr(f, task.length)) and (got - want).abs().max() < 1e-5
    assert all(v.dtype == torch.float32 and len(v) == n for v in f) and f.rgb.shape == (n, len(task.colours), 3)


@settings(max_examples=40)
@given(tasks, st.integers(0, 2**63 - 1), st.sampled_from([None, "up", "down", "coarse", "free"]))
def test_a_row_does_not_depend_on_how_many_there_are(task, seed, violate):
    x64, f64 = task.sample(64, seed, violate=violate)
    for n in (1, 7):
        x, f = task.sample(n, seed, violate=violate)
        assert equal(f, take(f64, slice(n))) and torch.equal(x, x64[:n])


@names
def test_seeds_share_no_row(name):
    rows = {tuple(r) for s in (0, 1, 2**40) for r in torch.stack(factors(name, 300, s)[:2], 1).tolist()}
    assert len(rows) == 900


@settings(max_examples=25)
@given(tasks, st.integers(0, 2**32), st.booleans())
def test_mirrored_factors_give_mirrored_images(task, seed, upside_down):
    f = double(task.factors(3, seed))
    circles = isinstance(task, TwoCircles)
    if isinstance(task, Perspective): mirror, axis = f._replace(y1=1 - f.y1, y2=1 - f.y2), 2
    elif isinstance(task, SunShadow): mirror, axis = f._replace(sun_x=1 - f.sun_x, pole_x=1 - f.pole_x, side=-f.side), 3
    elif upside_down and circles: mirror, axis = f._replace(y1=1 - f.y1, y2=1 - f.y2), 2
    else: mirror, axis = f._replace(x1=1 - f.x1, x2=1 - f.x2), 3
    x = task.render(f)
    assert (task.render(mirror) - x.flip(axis)).abs().max() < 1e-9
    a, b = task.sides(mirror)
    assert (a - b).abs().max() < 1e-5 and task.coarse(mirror).all()
    f, mirror = (task.Factors(*(v.float() for v in g)) for g in (f, mirror))   # what float32 loses: (canvas in px)^2 roundings
    assert (task.render(mirror) - task.render(f).flip(axis)).abs().max() < 1e-4*max(task.size/32, 1)**2
    assert (task.render(f) - x).abs().max() < 1e-4*max(task.size/32, 1)**2 < 2/255


def test_perspective_is_its_own_upside_down():
    x, _ = PUBLISHED["perspective"].sample(50, 0)
    assert (x - x.flip(2)).abs().max() < 1e-5


# ---------------------------------------------------------------- reading back

def corner_rows(task):
    "Uniform numbers that dwell on the ends of every range."
    end = st.sampled_from([0., 1e-6, .25, .5, .75, 1 - 1e-6])
    u = st.one_of(end, st.floats(0, 1, exclude_max=True, width=32))
    return st.lists(st.lists(u, min_size=task.n_uniform + 3*len(task.colours), max_size=task.n_uniform + 3*len(task.colours)),
                    min_size=8, max_size=8)


def drawn(task, u):
    "The admissible ones among the factors that these numbers mean, float32."
    u = torch.tensor(u, dtype=torch.float64)
    f = task.draw(u[:, :task.n_uniform], draw_rgb(u[:, task.n_uniform:], task.colours, task.palette))
    return task.Factors(*(v[task.inside(f)].float() for v in f))


@pytest.mark.parametrize("palette", ["random", "fixed"])
@names
def test_admissible_factors_read_back(name, palette):
    task = get_task(name, palette=palette)

    @settings(max_examples=15, derandomize=True)
    @given(corner_rows(task))
    def check(u):
        f = drawn(task, u)
        ft = task.features(to_8bit(task.render(f)))
        ok = ft.readable & (getattr(f, task.length)*task.size >= 2.1)
        off = (task.dependent(ft)[0] - task.dependent(f)[0]).abs()
        assert (off <= 6*ft.error + .02/task.size)[ok].all(), (f, ft)
        assert torch.equal(task.coarse(ft)[ok], task.coarse(f)[ok])
    check()


@names
def test_nearly_everything_large_is_read(name):
    task = PUBLISHED[name]
    f = take(factors(name), slice(300))
    ft = task.features(to_8bit(task.render(f)))
    big = getattr(f, task.length)*task.size >= 2.1
    a, b = task.sides(ft)
    assert ft.readable[big].float().mean() >= .98 and ((b/a - 1).abs() <= .01)[big & ft.readable].float().mean() >= .97


# ---------------------------------------------------------------- breaking the rule

@settings(max_examples=30)
@given(tasks, st.integers(0, 2**32), st.sampled_from(["up", "down"]), st.floats(1/256, 1/24))
def test_up_and_down_move_the_dependent_length_by_the_margin(task, seed, violate, margin):
    f = task.factors(16, seed, violate, margin)
    got, want = task.dependent(f)
    assert (got - want - (margin if violate == "up" else -margin)).abs().max() < 1e-5
    assert task.coarse(f).all()


@names
def test_a_broken_coarse_rule_is_broken_in_every_row(name):
    task, f = PUBLISHED[name], factors(name, 500, violate="coarse")
    assert not task.coarse(f).any()
    if isinstance(task, SunShadow):
        a, b = task.sides(f)
        assert (a - b).abs().max() < 1e-5   # only the side is wrong


@names
def test_circles_stay_tangent_and_squares_in_their_halves(name):
    for violate in (None, "up", "down", "coarse", "free"):
        f = factors(name, 500, violate=violate)
        if name == "two_circles":
            assert (torch.hypot(f.x1 - f.x2, f.y1 - f.y2) - f.r1 - f.r2).abs().max() < 1e-5
            for x, y, r in ((f.x1, f.y1, f.r1), (f.x2, f.y2, f.r2)):
                assert min((x - r).min(), (y - r).min()) > -1e-6 and max((x + r).max(), (y + r).max()) < 1 + 1e-6
        if name == "two_squares":
            assert (f.y1 - f.l1/2).min() > .5 - 1e-6 and (f.y2 + f.l2/2).max() < .5 + 1e-6
            assert (f.y1 + f.l1/2).max() < 1 + 1e-6 and (f.y2 - f.l2/2).min() > -1e-6


@names
def test_free_data_has_no_rule_and_nearly_the_same_marginals(name):
    task, f, g = PUBLISHED[name], factors(name), factors(name, violate="free")
    got, want = task.dependent(g)
    rho = stats.spearmanr(got, want).statistic
    assert abs(rho) < .06, rho
    for k in task.Factors._fields:
        if k == "rgb" or k in ("l1", "h1") and isinstance(task, SunShadow): continue
        if getattr(f, k).std() < 1e-6: continue
        assert stats.ks_2samp(getattr(f, k).numpy(), getattr(g, k).numpy()).statistic < .08, k
    coarse = task.coarse(g).float().mean()
    assert .45 < coarse < .55 if isinstance(task, SunShadow) else .5 < coarse < 1   # the side is free; sizes keep their marginals


@pytest.mark.parametrize("kw,error", [
    (dict(violate="sideways"), ValueError), (dict(margin=0), ValueError), (dict(margin=-.1), ValueError), (dict(margin=1.), ValueError),
    (dict(margin=math.nan), ValueError), (dict(violate="up", margin=.9), ValueError), (dict(n=-1), ValueError), (dict(n=2.), TypeError),
    (dict(n=True), TypeError), (dict(seed=-1), ValueError), (dict(seed=1.5), TypeError), (dict(seed=None), TypeError),
    (dict(seed=2**63), ValueError)])
@names
def test_wrong_arguments_are_refused(name, kw, error):
    with pytest.raises(error): PUBLISHED[name].factors(**{**dict(n=4, seed=0), **kw})


@pytest.mark.parametrize("kw,error,word", [
    (dict(size=15), ValueError, "15"), (dict(size=257), ValueError, "257"), (dict(size=32.), TypeError, "size"),
    (dict(size=True), TypeError, "size"), (dict(palette="sepia"), ValueError, "sepia"), (dict(palette=None), ValueError, "palette")])
@names
def test_wrong_worlds_are_refused(name, kw, error, word):
    with pytest.raises(error, match=word): get_task(name, **kw)


@pytest.mark.parametrize("kw", [dict(heights="high"), dict(heights=None)])
def test_wrong_heights_are_refused(kw):
    with pytest.raises(ValueError, match="heights"): SunShadow(**kw)


@pytest.mark.parametrize("px", [-.1, 4.1, math.nan, math.inf])
def test_wrong_min_px_is_refused(px):
    with pytest.raises(ValueError, match="min_px"): Perspective(min_px=px)


@pytest.mark.parametrize("name", ["", "three_circles", "TwoCircles", None, 3])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(ValueError, match="sun_shadow.*two_squares"): get_task(name)


@names
def test_spec_gives_the_task_back(name):
    for task in (get_task(name, size=64, palette="random"), get_task(name)):
        assert get_task(**json.loads(json.dumps(task.spec()))) == task and hash(get_task(**task.spec())) == hash(task)
    assert TASKS[name].name == name and get_task(TASKS[name], size=48).size == 48


def test_five_worlds(): assert NAMES == ["sun_shadow", "sun_shadow_free", "perspective", "two_circles", "two_squares"]


def test_published_counts(): assert [t.paper_n for t in TASKS.values()] == [4000, 4000, 2000, 2000, 2000]


# ---------------------------------------------------------------- distributions

def distribution(name, n, rng):
    "The published distributions once more, in plain numpy; rejected scenes are drawn anew."
    def u(lo, hi): return rng.uniform(lo, hi, n)
    if name.startswith("sun"):
        lo = np.array([0., .3, .5, .8])[rng.integers(4, size=n)]
        sun_x, h2 = lo + u(0, .2), u(.2, .4)
        high = np.clip(2*h2, .3, .8) if name == "sun_shadow" else u(.3, .8)
        h1, l1 = high - h2, abs(sun_x - .5)
        l2 = l1*h2/np.where(h1 > 0, h1, 1)
        ok = (h1 >= .1) & (l2 <= .5)
        return dict(sun_x=sun_x, h2=h2, h1=h1, l1=l1, l2=l2, sun_y=.1 + high), ok
    if name == "perspective":
        l1, h1 = u(0, .3), u(.2, .6)
        l2 = rng.uniform(l1 + .2, .8)
        return dict(l1=l1, h1=h1, l2=l2, h2=l1*h1/l2), np.full(n, True)
    if name == "two_circles":
        s, x2, y2, k = u(.1, .3), u(.1, .9), u(.1, .9), rng.integers(4, size=n)
        r1, r2 = s/2, s/math.sqrt(2)
        x1, y1 = x2 + (r1 + r2)*np.array([-1, 1, 0, 0])[k], y2 + (r1 + r2)*np.array([0, 0, 1, -1])[k]
        ok = np.all([(v >= r) & (v <= 1 - r) for v, r in ((x1, r1), (y1, r1), (x2, r2), (y2, r2))], 0)
        return dict(r1=r1, r2=r2, x1=x1, y1=y1, x2=x2, y2=y2), ok
    l1 = u(.15, .333)
    l2 = 1.5*l1
    return dict(l1=l1, l2=l2, x1=rng.uniform(l1/2, 1 - l1/2), y1=rng.uniform(.5 + l1/2, 1 - l1/2),
                x2=rng.uniform(l2/2, 1 - l2/2), y2=rng.uniform(l2/2, .5 - l2/2)), np.full(n, True)


@names
def test_every_factor_follows_its_law(name):
    want, ok = distribution(name, 40000, np.random.default_rng(1))
    f = factors(name)
    for k, v in want.items():
        assert stats.ks_2samp(getattr(f, k).double().numpy(), v[ok]).pvalue > 1e-4, k


def test_a_wrong_law_is_seen():
    want, _ = distribution("two_circles", 40000, np.random.default_rng(1))   # as written down, before any scene is refused
    assert stats.ks_2samp(factors("two_circles").r1.double().numpy(), want["r1"]).pvalue < 1e-4


SUPPORT = {"sun_shadow": dict(h2=(.2, .4), sun_x=(0, 1), l1=(0, .5), l2=(0, .5), sun_y=(.5, .9)),
           "sun_shadow_free": dict(h2=(.2, .4), sun_x=(0, 1), h1=(.1, .6), l2=(0, .5), sun_y=(.4, .9)),
           "perspective": dict(l1=(0, .3), h1=(.2, .6), l2=(.2, .8), h2=(0, .36)),
           "two_circles": dict(r1=(.05, .15), r2=(.05*2**.5, .15*2**.5), x1=(0, 1), x2=(.1, .9), y2=(.1, .9)),
           "two_squares": dict(l1=(.15, .333), l2=(.225, .4995), x1=(0, 1), y1=(.5, 1), x2=(0, 1), y2=(0, .5))}


@names
def test_supports_are_filled_and_not_left(name):
    f = factors(name)
    for k, (lo, hi) in SUPPORT[name].items():
        v = getattr(f, k)
        assert v.min() >= lo - 1e-6 and v.max() <= hi + 1e-6, k
        if k not in ("x1", "y1", "x2", "y2", "h1", "h2", "r1", "r2"): assert v.min() < lo + .06 and v.max() > hi - .06, k


def test_linked_heights_leave_two_degrees_of_freedom():
    f = factors("sun_shadow")
    assert torch.allclose(f.h1, f.h2, atol=1e-6) and torch.allclose(f.l1, f.l2, atol=1e-6)
    assert (f.pole_x == .5).all() and (f.foot_y - .1).abs().max() < 1e-7


def test_four_places_of_the_sun_have_equal_shares():
    x = factors("sun_shadow").sun_x
    counts = [((x >= lo) & (x < lo + .2)).sum().item() for lo in (0., .3, .5, .8)]
    assert sum(counts) == 4000 and stats.chisquare(counts).pvalue > 1e-3, counts


def test_four_directions_of_the_small_disc():
    f = factors("two_circles")
    dx, dy = f.x1 - f.x2, f.y1 - f.y2
    counts = [(v > .01).sum().item() for v in (dx, -dx, dy, -dy)]
    assert sum(counts) == 4000 and (torch.minimum(dx.abs(), dy.abs()) < 1e-6).all()
    assert stats.chisquare(counts).pvalue > 1e-3, counts


def test_mean_warm_diameter(): assert abs(2*factors("two_circles").r1.mean() - .180) < .004


def test_acceptance_of_circles():
    f = PUBLISHED["two_circles"]._factors(3, list(range(4000)), 0, 0)
    assert abs(TASKS["two_circles"].inside(f).float().mean() - .58) < .03


@pytest.mark.parametrize("px,share", [(2, .31), (1, .15)])
def test_small_bars(px, share):
    found = (factors("perspective").h2*32 < px).float().mean().item()
    assert abs(found - share) < .005 + 3*math.sqrt(share*(1 - share)/4000)


@pytest.mark.parametrize("name,share", [("sun_shadow", .26), ("sun_shadow_free", .31)])
def test_near_suns_stand_less_than_a_tenth_of_the_canvas_beside_the_pole(name, share):
    for task in (PUBLISHED[name], TASKS[name].with_(size=64)):
        f = task.factors(4000, 5)
        near, off = task.near(f), (f.sun_x - f.pole_x).abs()
        assert near.dtype == torch.bool and near.shape == (4000,) and abs(near.double().mean() - share) < .03
        assert off[near].max() < .1 <= off[~near].min() + 1e-6


def test_near_can_be_asked_of_what_the_ruler_reads():
    task = TASKS["sun_shadow_free"]
    x, f = task.sample(64, 5)
    seen = task.features(x)
    same = (task.near(seen) == task.near(f)) | ((f.l1 - .1).abs() < .01)   # but for those on the border
    assert same[seen.readable].all()


@pytest.mark.parametrize("name", [k for k in NAMES if not k.startswith("sun")])
def test_other_tasks_know_no_near_and_far(name): assert PUBLISHED[name].near(factors(name, 8)) is None


@pytest.mark.parametrize("size,px", [(32, 1.), (32, 2.1), (32, 4.), (64, 8.), (16, 2.)])
def test_min_px_is_kept(size, px):
    task = Perspective(size=size, min_px=px)
    f = task.factors(300, 0)
    assert (f.h2*size).min() >= px - 1e-5 and task.coarse(f).all()
    assert (task.factors(100, 0, "down").h2*size).min() >= px - 1e-5


def to_hsv(rgb):
    "OpenCV's units, not rounded."
    h, s, v = np.array([colorsys.rgb_to_hsv(*c) for c in rgb.double().numpy()]).T
    return h*180, s*255, v*255


@names
def test_colours_are_whole_numbers_in_their_ranges(name):
    task, f = PUBLISHED[name], factors(name)
    for k, colour in enumerate(task.colours):
        rgb = f.rgb[:, k]
        hsv = [np.rint(v) for v in to_hsv(rgb)]
        clear = hsv[1] > 60   # where a hue can be told
        for j, (v, (lo, hi)) in enumerate(zip(hsv, RANDOM[colour])):
            if j == 0 and colour == "grey": continue   # any hue
            assert v.min() >= lo and v.max() <= hi, (colour, j)
            assert v.min() == lo and v.max() == hi or hi - lo > 40 and v.min() < lo + 4 and v.max() > hi - 4, (colour, j)
            assert stats.kstest((v - lo + .5)/(hi - lo + 1), "uniform").pvalue > 1e-4 or hi - lo < 60, (colour, j)
        again = hsv_to_rgb(torch.tensor(np.stack(hsv, -1)))
        if colour != "grey": assert clear.all() and (again - rgb).abs().max() < 1e-5


def test_grey_takes_every_hue():
    hue, s, _ = to_hsv(factors("sun_shadow").rgb[:, 2])
    counts = np.histogram(hue[s > 20], 18, (0, 180))[0]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_palette_as_published():
    assert RANDOM == dict(warm=((0, 30), (100, 255), (200, 255)), cool=((90, 150), (100, 255), (100, 255)),
                           grey=((0, 179), (0, 50), (50, 150)))


def test_fixed_colours_are_the_default_and_lie_in_the_ranges():
    for colour, hsv in FIXED.items(): assert all(lo <= v <= hi for v, (lo, hi) in zip(hsv, RANDOM[colour]))
    for name in NAMES:
        f = TASKS[name].factors(50, 0)
        assert (f.rgb == f.rgb[:1]).all()
        g = PUBLISHED[name].factors(50, 0)
        assert not (g.rgb == g.rgb[:1]).all() and equal(f[:-1], g[:-1])   # the same geometry


@settings(max_examples=200)
@given(st.integers(0, 180), st.integers(0, 255), st.integers(0, 255))
def test_hsv_agrees_with_the_standard_library(h, s, v):
    mine = hsv_to_rgb(torch.tensor([h, s, v], dtype=torch.float64))
    assert np.allclose(mine.numpy(), colorsys.hsv_to_rgb(h % 180/180, s/255, v/255), atol=1e-12)


# ---------------------------------------------------------------- drawing

def brute(task, f, sub=48):
    "Each pixel as the mean of sub x sub points that lie in a shape or don't."
    s = task.size*sub
    at = (torch.arange(s, dtype=torch.float64) + .5)/s
    px, py = at[None, :], at.flip(0)[:, None]
    out = []
    for i in range(len(f.rgb)):
        x = torch.ones(3, task.size, task.size, dtype=torch.float64)
        for k, shape in enumerate(task.shapes(f)):
            v = [p[i].double() for p in shape]
            hit = (px - v[0])**2 + (py - v[1])**2 < v[2]**2 if isinstance(shape, Disc) else (
                (px > v[0]) & (px < v[1]) & (py > v[2]) & (py < v[3]))
            cover = hit.double().view(task.size, sub, task.size, sub).mean((1, 3))
            x += cover*(f.rgb[i, k].double() - 1)[:, None, None]
        out.append(2*x - 1)
    return torch.stack(out)


@names
def test_drawing_agrees_with_brute_force(name):
    task, f = PUBLISHED[name], take(factors(name), slice(6))
    diff = (task.render(f) - brute(task, f)).abs()/2
    assert diff.max() < .025 and diff.mean() < 5e-4


@pytest.mark.parametrize("size", [16, 64, 256])
@names
def test_large_images_shrink_to_small_ones_exactly(name, size):
    f, (small, large) = double(take(factors(name), slice(8))), sorted((size, 32))
    x, y = (PUBLISHED[name].with_(size=s).render(f) for s in (small, large))
    assert (torch.nn.functional.avg_pool2d(y, large//small) - x).abs().max() < 1e-9


@settings(max_examples=60)
@given(st.floats(-.3, 1.3), st.floats(-.3, 1.3), st.floats(0, .7), st.integers(16, 64))
def test_a_disc_covers_its_area(x, y, r, size):
    d = Disc(*(torch.tensor([v], dtype=torch.float64) for v in (x, y, r)))
    c = disc_coverage(d, size)
    assert c.isfinite().all() and c.min() >= 0 and c.max() <= 1
    if r <= min(x, y, 1 - x, 1 - y): assert abs(c.sum().item()/size**2 - math.pi*r*r) < 1e-9
    if x - r > 1 or y - r > 1 or x + r < 0 or y + r < 0: assert c.sum() < 1e-9


@settings(max_examples=60)
@given(*[st.floats(-.3, 1.3)]*4, st.integers(16, 64))
def test_a_rectangle_covers_its_area(x0, x1, y0, y1, size):
    c = rect_coverage(Rect(*(torch.tensor([v], dtype=torch.float64) for v in (x0, x1, y0, y1))), size)
    def inside(lo, hi): return max(min(hi, 1) - max(lo, 0), 0)
    assert c.min() >= 0 and c.max() <= 1 + 1e-12 and abs(c.sum().item()/size**2 - inside(x0, x1)*inside(y0, y1)) < 1e-9


@names
def test_chunks_change_nothing(name):
    task, f = PUBLISHED[name], take(factors(name), slice(37))
    whole = task.render(f)
    for chunk in (1, 32*32*5, 32*32*37): assert torch.equal(task.render(f, chunk), whole)


@names
def test_chunks_bound_what_is_drawn_at_once(name, monkeypatch):
    task, seen = get_task(name, size=64), []
    plain = type(task)._render
    monkeypatch.setattr(type(task), "_render", lambda self, f: seen.append(len(f.rgb)) or plain(self, f))
    task.render(take(factors(name), slice(40)), chunk=64*64*16)
    assert seen == [16, 16, 8]


@names
def test_no_images(name):
    for violate in (None, "up", "coarse", "free"):
        x, f = PUBLISHED[name].sample(0, 0, violate=violate)
        assert x.shape == (0, 3, 32, 32) and len(f.rgb) == 0 and len(PUBLISHED[name].features(x).readable) == 0


@names
def test_ends_of_the_sizes(name):
    for size in (16, 256):
        x, f = PUBLISHED[name].with_(size=size).sample(2, 0)
        assert x.shape[-1] == size and x.isfinite().all() and equal(f, PUBLISHED[name].factors(2, 0))


@names
def test_float64_factors_draw_float64_images(name):
    f = double(take(factors(name), slice(4)))
    x = PUBLISHED[name].render(f)
    assert x.dtype == torch.float64 and (x - PUBLISHED[name].render(take(factors(name), slice(4)))).abs().max() < 1e-4


def test_abutting_shapes_add():
    task = TwoSquares(size=16)
    f = take(task.factors(1, 0), slice(1))
    half = torch.tensor([.5 + .5/16])   # a border in the middle of a pixel, both squares black
    f = f._replace(l1=torch.tensor([.25]), l2=torch.tensor([.25]), x1=torch.tensor([.5]), x2=torch.tensor([.5]),
                   y1=half + .125, y2=half - .125, rgb=torch.zeros(1, 2, 3))
    assert (task.render(f)[0, :, 4:10, 7:9] + 1).abs().max() < 1e-5


# ---------------------------------------------------------------- parity with matplotlib

def moved(f, by):
    "The scene `by` canvas sides to the right."
    return f._replace(**{k: getattr(f, k) + by for k in ("sun_x", "pole_x", "x1", "x2") if k in f._fields},
                      **({k: getattr(f, k) + by for k in ("l1", "l2")} if hasattr(f, "h2") and not hasattr(f, "sun_x") else {}))


def parity(name, n, seed=21):
    "Largest and mean difference from matplotlib, and the smallest over images of the largest after a quarter pixel's shift."
    task, f = PUBLISHED[name], factors(name, n, seed)
    want = by_matplotlib(task, f)
    diff, off = ((task.render(g) - want).abs()/2 for g in (f, moved(f, .25/task.size)))
    return diff.max().item(), diff.mean().item(), off.amax((1, 2, 3)).min().item()


@pytest.mark.parametrize("n", [20, pytest.param(200, marks=pytest.mark.slow)])
@names
def test_matplotlib_draws_the_same(name, n):
    worst, mean, shifted = parity(name, n)
    assert worst < .012 and mean < 5e-4, (worst, mean)
    assert shifted > .05, shifted   # the check would notice a quarter of a pixel in every single image


def test_a_task_can_be_changed_in_one_field():
    assert TwoCircles().with_(size=64) == replace(TwoCircles(), size=64)
    with pytest.raises(TypeError): TwoCircles().with_(colour="red")


# ---------------------------------------------------------------- tasks of a reader's own

SQUARES = {k: TwoSquares.__dict__[k] for k in (*METHODS, "colours", "Factors", "length", "n_uniform", "inside")}


def task(base=TwoSquares, **own):
    "An instance of a class with some attributes of its own."
    return type("Mine", (base,), {"name": "mine", **own})()


class Swapped(NamedTuple):
    "Colours first: not what the ruler expects."
    rgb: torch.Tensor
    l2: torch.Tensor


class Reserved(NamedTuple):
    "A field that the ruler needs for itself."
    l2: torch.Tensor
    error: torch.Tensor
    rgb: torch.Tensor


class Half(NamedTuple):
    "Too few fields for two squares."
    l1: torch.Tensor
    l2: torch.Tensor
    rgb: torch.Tensor


@dataclass(frozen=True)
class Annotated(TwoSquares):
    "A name that dataclass takes for a field."
    name: str = "annotated"


@dataclass(frozen=True)
class Unspoken(TwoSquares):
    "A field that no file can hold."
    name = "unspoken"
    ink: object = torch.float32


def draw(self, u, rgb): return TwoSquares.draw(self, u, rgb)


def shapes(f): return TwoSquares.shapes(TASKS["two_squares"], f)


@pytest.mark.parametrize("size", [16, 32, 100])
@pytest.mark.parametrize("palette", ["random", "fixed"])
@names
def test_the_five_worlds_keep_their_promises(name, palette, size):
    task = get_task(name, palette=palette, size=size)
    assert check_task(task) is task


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_method_is_named(method):
    own = {k: v for k, v in SQUARES.items() if k != method}
    with pytest.raises(ValueError, match=f"Mine: these methods are missing: {method}$"): check_task(task(Task, **own))


def test_all_that_is_missing_is_named_at_once():
    with pytest.raises(ValueError, match=", ".join(METHODS)): check_task(task(Task))


@pytest.mark.parametrize("word,task", [
    ("class variables", Annotated()), ("plain values", Unspoken()), ("`name`", task(name="")), ("`name`", task(name=3)),
    ("`colours`.*pink", task(colours=("warm", "pink"))), ("`colours`", task(colours=())),
    ("last field is rgb.*'rgb', 'l2'", task(Factors=Swapped)), ("last field is rgb", task(Factors=tuple)),
    ("error.*rename", task(Factors=Reserved)),
    ("`length`.*'r2'", task(length="r2")), ("`length`.*'rgb'", task(length="rgb")),
    ("draw fails: IndexError", task(n_uniform=2)),
    ("draw must give SquareFactors, got tuple", task(draw=lambda self, u, rgb: tuple(draw(self, u, rgb)))),
    ("draw fails: TypeError", task(Factors=Half, draw=lambda self, u, rgb: Half(u[:, 0], rgb))),
    ("draw must give.*got float", task(draw=lambda self, u, rgb: draw(self, u, rgb)._replace(l1=.2))),
    ("draw must give.*got.*int64", task(draw=lambda self, u, rgb: draw(self, u, rgb)._replace(x1=torch.zeros(len(u), dtype=torch.long)))),
    ("draw must give.*64, 1", task(draw=lambda self, u, rgb: draw(self, u, rgb)._replace(l1=u[:, :1]))),
    ("draw gives numbers that are not finite", task(draw=lambda self, u, rgb: draw(self, u, rgb)._replace(l1=u[:, 0]/0))),
    ("pass the colours on", task(draw=lambda self, u, rgb: draw(self, u, rgb)._replace(rgb=rgb[:, 0]))),
    ("draw mixes rows", task(draw=lambda self, u, rgb: draw(self, u[torch.argsort(u[:, 0])], rgb))),
    ("inside must give.*bool.*float", task(inside=lambda self, f: f.l2)),
    ("no scene", task(inside=lambda self, f: f.l2 > 2)),
    ("one Rect or Disc for each", task(shapes=lambda self, f: shapes(f)[:1])),
    ("one Rect or Disc", task(shapes=lambda self, f: shapes(f)[0])),
    ("one Rect or Disc", task(shapes=lambda self, f: [tuple(s) for s in shapes(f)])),
    ("shapes must give", task(shapes=lambda self, f: (shapes(f)[0], Disc(f.x2, f.y2, .1)))),
    ("shapes fails: AttributeError", task(shapes=lambda self, f: f.radius)),
    ("overlap", task(shapes=lambda self, f: (shapes(f)[0], shapes(f)[0]))),
    ("sides differ: .* in row 0", task(sides=lambda self, f: (1.4*f.l1, f.l2))),
    ("sides must give a tuple", task(sides=lambda self, f: f.l1)), ("sides must give", task(sides=lambda self, f: (f.l1*1.5, 0.))),
    ("negative", task(sides=lambda self, f: (-1.5*f.l1, -f.l2))),
    ("dependent must give l2", task(dependent=lambda self, f: (1.5*f.l1, f.l2))),
    ("predicts another l2", task(dependent=lambda self, f: (f.l2, f.l1))),
    ("coarse must give.*bool.*float", task(coarse=lambda self, f: f.l2 - f.l1)),
    ("coarse must give.*got bool", task(coarse=lambda self, f: True)),
    ("coarse must give.*64, 2", task(coarse=lambda self, f: torch.stack([f.l2 > f.l1]*2, 1))),
    ("coarse does not hold", task(coarse=lambda self, f: f.l2 > .3)),
    ("with_dependent must set l2", task(with_dependent=lambda self, f, length: f._replace(l1=length))),
    ("with_dependent must set l2", task(with_dependent=lambda self, f, length: None)),
    ("do not notice", task(sides=lambda self, f: (f.l1, f.l1))),
    ("break_coarse fails: NotImplementedError", task(break_coarse=lambda self, f: exec("raise NotImplementedError"))),
    ("break_coarse leaves", task(break_coarse=lambda self, f: f)),
    ("no scene.*'up'", task(inside=lambda self, f: TwoSquares.inside(self, f) & (f.l2 <= 1.5*f.l1 + .01)))])
def test_what_is_wrong_with_a_world_is_said(word, task):
    with pytest.raises(ValueError, match=f"^{type(task).__name__}[:.].*(?:{word})"): check_task(task)


@pytest.mark.parametrize("thing", [TwoSquares, "two_squares", None])
def test_what_is_no_world_is_refused(thing):
    with pytest.raises(TypeError, match="an instance of Task"): check_task(thing)


def test_a_world_is_registered(monkeypatch):
    monkeypatch.setattr("rulediff_nb.tasks.TASKS", dict(TASKS))
    mine = task()
    with pytest.raises(ValueError, match="'mine'.*register"): get_task("mine")
    assert register(mine) is mine and get_task("mine") is not None and get_task(**mine.with_(size=48).spec()) == mine.with_(size=48)
    assert register(mine.with_(palette="random")) == get_task("mine") != mine   # the same class may say again how it is meant
    with pytest.raises(ValueError, match="these methods"): register(task(Task, name="other"))
    with pytest.raises(ValueError, match="unknown task 'other'"): get_task("other")


@pytest.mark.parametrize("name", [*NAMES, "mine"])
def test_a_taken_name_is_refused(name, monkeypatch):
    monkeypatch.setattr("rulediff_nb.tasks.TASKS", dict(TASKS))
    register(task())
    with pytest.raises(ValueError, match=f"'{name}' is taken by"): register(task(name=name))
    assert NAMES == list(TASKS)


def test_a_cell_may_be_run_again(monkeypatch):
    monkeypatch.setattr("rulediff_nb.tasks.TASKS", dict(TASKS))
    first, again = task(__module__="__main__"), task(__module__="__main__")
    register(first), register(again)
    assert type(get_task("mine")) is type(again) is not type(first)
    with pytest.raises(ValueError, match="taken by Mine"): register(task(__module__="__main__", __qualname__="Other"))
