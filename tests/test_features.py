"The ruler: what it reads, what it refuses, and that a row is its own."
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rulediff_nb.core import row_noise, to_8bit
from rulediff_nb.features import REASONS, Oval, oval_slopes, rect_slopes
from rulediff_nb.tasks import TASKS, Disc, Rect, SunShadow, TwoCircles, disc_coverage, get_task, rect_coverage

names = pytest.mark.parametrize("name", TASKS)
palettes = pytest.mark.parametrize("palette", ["random", "fixed"])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read(name, n=32, seed=0, change=lambda x: x, **kw):
    "A task, its factors, and what the ruler says."
    task = get_task(name, **(dict(palette="random") | kw))
    x, f = task.sample(n, seed)
    return task, f, task.features(to_8bit(change(x)))


def geometry(task): return [k for k in task.Factors._fields if k not in ("rgb", "side")]


# what it reads
@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(list(TASKS)), palette=st.sampled_from(["random", "fixed"]), seed=st.integers(0, 2**40),
       size=st.sampled_from([24, 32, 48, 64]), violate=st.sampled_from([None, "up", "down", "free", "coarse"]))
def test_any_scene_reads_back(name, palette, seed, size, violate):
    "What is read is right, to .05 px in every number and six stated errors in the dependent length; what is long enough is read."
    task = get_task(name, palette=palette, size=size)
    x, f = task.sample(6, seed, violate=violate)
    ft = task.features(to_8bit(x))
    r = ft.readable
    for k in geometry(task): assert ((getattr(ft, k) - getattr(f, k))[r].abs()*size < .05).all(), k
    err = (getattr(ft, task.length) - getattr(f, task.length)).abs()
    assert (err[r] <= 6*ft.error[r] + .004/size).all()
    shortest = torch.stack([getattr(f, k) for k in task.least()]).amin(0)
    assert r[shortest*size > 2.1].all(), [REASONS[w] for w in ft.why]


@names
@palettes
def test_colours_and_side(name, palette):
    task, f, ft = read(name, palette=palette)
    r = ft.readable
    assert r.float().mean() > .5
    if hasattr(f, "side"): assert (ft.side == f.side)[r].all()
    if palette == "fixed": assert (ft.rgb - f.rgb)[r].abs().max() < .02
    assert torch.equal(task.coarse(ft)[r], task.coarse(f)[r])


@names
def test_fields(name):
    task, f, ft = read(name, n=3)
    assert ft._fields == (*task.Factors._fields, "readable", "why", "leftover", "error")
    assert [v.shape for v in ft[:len(f)]] == [v.shape for v in f]
    assert ft.readable.dtype == torch.bool and ft.why.dtype == torch.int64
    assert torch.equal(ft.readable, ft.why == 0)


@pytest.mark.parametrize("size", [16, 128])
@names
def test_other_sizes(name, size):
    task, f, ft = read(name, n=8, size=size, palette="fixed")
    ok = getattr(f, task.length)*size > .1
    assert ft.readable[ok].all()
    assert ((getattr(ft, task.length) - getattr(f, task.length))[ok].abs()*size).max() < .02


@names
def test_half_precision_and_double_agree(name):
    task = get_task(name, palette="random")
    x, _ = task.sample(16, 1)
    a, b = task.features(x), task.features(x.double())
    assert getattr(b, task.length).dtype == torch.float64 and task.features(x.half())[0].dtype == torch.float32
    r = a.readable & b.readable
    assert (getattr(a, task.length) - getattr(b, task.length))[r].abs().max()*32 < .01


# a row is its own
@names
def test_rows_do_not_depend_on_the_batch(name):
    task = get_task(name, palette="random")
    x = to_8bit(task.sample(64, 5)[0])
    want = task.features(x)
    for n in (1, 7):
        got = task.features(x[:n])
        assert torch.equal(got.why, want.why[:n])
        r = got.readable
        for k in geometry(task): assert (getattr(got, k) - getattr(want, k)[:n])[r].abs().max() < 1e-4


def test_chunks_change_nothing():
    x = to_8bit(TwoCircles().sample(20, 5)[0])
    assert (TwoCircles().features(x).r1 - TwoCircles().features(x, chunk=7*32**2).r1).abs().max() < 1e-4


@names
def test_a_bad_image_hurts_no_other(name):
    task = get_task(name, palette="random")
    x = to_8bit(task.sample(8, 5)[0])
    hurt = x.clone()
    hurt[3, 0, 2, 2], hurt[4, 1, 2, 2] = math.nan, math.inf
    hurt[4] = hurt[4].clamp(max=1)
    a, b = task.features(x), task.features(hurt)
    assert b.why[3] == 1
    assert torch.equal(a.why[[0, 1, 2, 5, 6, 7]], b.why[[0, 1, 2, 5, 6, 7]])


@names
def test_none(name):
    task = get_task(name, palette="random")
    ft = task.features(torch.zeros(0, 3, 32, 32))
    assert all(len(v) == 0 for v in ft) and ft.rgb.shape == (0, len(task.colours), 3)


def test_mirrored_scene():
    task = SunShadow(palette="fixed")
    x, _ = task.sample(16, 2)
    a, b = task.features(to_8bit(x)), task.features(to_8bit(x).flip(3))
    r = a.readable & b.readable
    assert r.sum() > 12 and (a.side + b.side)[r].abs().max() == 0
    assert (a.l2 - b.l2)[r].abs().max() < 1e-3 and (a.sun_x + b.sun_x - 1)[r].abs().max() < 1e-3


# what it refuses
def flat(v): return lambda x: torch.full_like(x, v)
def erased(rows, cols):
    def change(x):
        x = x.clone()
        x[:, :, rows, cols] = 1
        return x
    return change
def uniform(x): return torch.erf(row_noise(3, range(len(x)), x.shape[1:])/math.sqrt(2))
def gaussian(x): return row_noise(3, range(len(x)), x.shape[1:]).clamp(-1, 1)
def with_nan(x): return x.index_fill(3, torch.tensor(9), math.nan)


ALL, LOW, HIGH = slice(None), slice(0, 16), slice(16, None)
FAULTS = {"white": flat(1.), "black": flat(-1.), "grey": flat(0.), "uniform": uniform, "gaussian": gaussian, "nan": with_nan}


@names
@palettes
@pytest.mark.parametrize("fault", FAULTS)
def test_no_scene(name, palette, fault): assert not read(name, change=FAULTS[fault], palette=palette)[2].readable.any()


@names
@palettes
def test_a_missing_object(name, palette):
    task = get_task(name, palette=palette)
    f = task.factors(64, 4)
    for k in range(len(task.colours)):
        rgb = f.rgb.clone()
        rgb[:, k] = 1
        assert not task.features(to_8bit(task.render(f._replace(rgb=rgb)))).readable.any()


@pytest.mark.parametrize("where", [(ALL, LOW), (ALL, HIGH), (LOW, ALL), (HIGH, ALL)])
@pytest.mark.parametrize("name", ["sun_shadow", "sun_shadow_free"])
def test_half_a_scene(name, where): assert read(name, n=64, change=erased(*where))[2].readable.float().mean() <= .02


@names
@palettes
def test_a_foreign_patch(name, palette):
    def patch(x):
        free = (x > .99).all(1)
        x = x.clone()
        for i, (r, c) in zip(range(len(x)), [(1, 1), (1, 27), (12, 1), (12, 27), (6, 14)]*20):
            if free[i, r - 1:r + 5, c - 1:c + 5].all(): x[i, :, r:r + 4, c:c + 4] = torch.tensor([.8, -.6, .7])[:, None, None]
        return x
    task = get_task(name, palette=palette)
    x, _ = task.sample(64, 6)
    y = patch(x)
    hit = (x != y).flatten(1).any(1)
    assert hit.sum() > 10 and not task.features(to_8bit(y)).readable[hit].any()


@pytest.mark.parametrize("name", ["perspective", "two_circles", "two_squares"])
def test_swapped_colours_break_the_coarse_rule(name):
    task = get_task(name, palette="fixed")
    f = task.factors(32, 4)
    ft = task.features(to_8bit(task.render(f._replace(rgb=f.rgb.flip(1)))))
    assert ft.readable.float().mean() > .9 and not task.coarse(ft)[ft.readable].any()


def test_below_two_pixels_nothing_is_made_up():
    task, f, ft = read("perspective", n=400, seed=3)
    assert not ft.readable[f.h2*32 < 1.99].any()
    assert (ft.why[f.h2*32 < 1.9] >= 2).all()


# soft, noisy, tinted
@names
@pytest.mark.parametrize("change", [lambda x: x - .04, lambda x: (x + .02*row_noise(1, range(len(x)), x.shape[1:])).clamp(-1, 1)],
                         ids=["tinted", "noisy"])
def test_what_models_do_is_read(name, change):
    task, f, ft = read(name, n=64, change=change, palette="fixed")
    ok = getattr(f, task.length)*32 > 2.1
    assert ft.readable[ok].float().mean() > .95
    assert (getattr(ft, task.length) - getattr(f, task.length))[ok & ft.readable].abs().median()*32 < .03


# slopes and gradients
def one(*v): return [torch.tensor([a], dtype=torch.float64) for a in v]


def clear(v): return .02 < v*16 % 1 < .98  # away from the pixels' borders, where slopes jump


edge = st.floats(.05, .95).filter(clear)


@settings(max_examples=30, deadline=None)
@given(st.lists(edge, min_size=4, max_size=4))
def test_rect_slopes(v):
    assume(min(abs(v[0] - v[1]), abs(v[2] - v[3])) > .005)
    check_slopes(Rect(*one(min(v[:2]), max(v[:2]), min(v[2:]), max(v[2:]))), rect_coverage, rect_slopes)


@settings(max_examples=30, deadline=None)
@given(st.floats(.0, 1.), st.floats(.0, 1.), st.floats(.05, .5), st.floats(.8, 1.2))
def test_oval_slopes(x, y, r, k):
    assume(all(map(clear, (x - r, x + r, y - k*r, y + k*r))))
    check_slopes(Oval(*one(x, y, r, k*r)), lambda v, size: oval_slopes(v, size)[0], oval_slopes)


@given(st.floats(.0, 1.), st.floats(.0, 1.), st.floats(.01, .5))
def test_a_round_oval_is_a_disc(x, y, r):
    assert torch.allclose(oval_slopes(Oval(*one(x, y, r, r)), 16)[0], disc_coverage(Disc(*one(x, y, r)), 16), atol=1e-9)


def check_slopes(shape, cover, slopes, eps=1e-6):
    c, s = slopes(shape, 16)
    assert torch.allclose(c, cover(shape, 16), atol=1e-12)
    for k in range(len(shape)):
        moved = [type(shape)(*(v + by*(i == k) for i, v in enumerate(shape))) for by in (eps, -eps)]
        assert ((cover(moved[0], 16) - cover(moved[1], 16))/(2*eps) - s[:, k]).abs().max() < 2e-3


@names
def test_gradient(name):
    task = get_task(name, palette="random")
    x, _ = task.sample(8, 2)
    off = task.features(x)
    ft = task.features(x.requires_grad_())
    assert torch.equal(getattr(ft, task.length), getattr(off, task.length)) and torch.equal(ft.why, off.why)
    i = int(ft.readable.nonzero()[0])
    getattr(ft, task.length)[i].backward()
    grad = x.grad.flatten(1).abs().sum(1)
    assert grad.isfinite().all() and grad[i] > 0 and (grad[torch.arange(8) != i] == 0).all()


def test_no_gradient_where_none_is_asked_for():
    x = TwoCircles().sample(2, 0)[0].requires_grad_()
    with torch.no_grad(): assert not TwoCircles().features(x).r1.requires_grad


# bad input
@pytest.mark.parametrize("x", [torch.zeros(2, 3, 64, 64), torch.zeros(2, 1, 32, 32), torch.zeros(3, 32, 32), 255*torch.rand(9, 3, 32, 32)],
                         ids=["size", "channels", "one image", "0..255"])
def test_bad_images(x):
    with pytest.raises(ValueError): TwoCircles().features(x)


def test_a_guess_about_the_range_warns():
    with pytest.warns(UserWarning, match=r"2\*x - 1"): f = TwoCircles().features(torch.rand(9, 3, 32, 32)*.9 + .05)
    assert not f.readable.any()


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [[0.]], None], ids=["bytes", "list", "none"])
def test_no_images(x):
    with pytest.raises(TypeError): TwoCircles().features(x)


def test_threads_are_left_alone():
    before = torch.get_num_threads()
    TwoCircles().features(torch.zeros(1, 3, 32, 32))
    assert torch.get_num_threads() == before
