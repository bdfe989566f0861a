"Bumps: drawing and reading against what is known, latents and learning times in made-up cases, and the mistakes that people make."
import math
from types import SimpleNamespace

import pytest
import torch
from rulediff_nb import bumps
from rulediff_nb.bumps import (
    BUMP_RECIPE,
    KINDS,
    PUBLISHED_BUMPS,
    BumpFactors,
    Bumps,
    bump_net,
    by_condition,
    by_image,
    embed,
    far_off,
    gap_set,
    grid_set,
    inside_gap,
    latents,
    learning_time,
    order,
    phases,
    places_between,
    places_on,
    read_bumps,
    spots,
    stripe_set,
)
from rulediff_nb.metrics import rule_report
from rulediff_nb.table import find_study
from rulediff_nb.tasks import TASKS, WORLDS, get_task
from rulediff_nb.train import fit
from rulediff_nb.unet import recipe, unet

torch.set_num_threads(1)
WORLD = Bumps()
SMALL = dict(channels=(16, 32))


def to_8bit(x): return ((x + 1)*127.5).round()/127.5 - 1


@pytest.fixture(scope="module")
def net(): return bump_net(WORLD, 0, **SMALL).eval()


def test_a_bump_is_a_gaussian_at_its_place():
    x = WORLD.render(WORLD.at(torch.tensor([10.5, 3.]), torch.tensor([20.5, 30.])))
    ink = (1 - x[:, 0])/2
    assert x.shape == (2, 3, 32, 32) and torch.equal(x[:, 0], x[:, 2]) and ink[0].max() == ink[0, 31 - 20, 10] == 1
    assert ink[0, 31 - 20, 12] == pytest.approx(math.exp(-4/(2*2))) and ink[1, 31 - 30, 3] == pytest.approx(math.exp(-(.25 + .25)/4))


@pytest.mark.parametrize("size,sd", [(32, math.sqrt(2)), (64, 3.), (24, 1.)])
def test_the_reader_is_exact(size, sd):
    world = Bumps(size=size, sd=sd)
    x, f = world.sample(500, 1)
    r = world.features(to_8bit(x))
    assert r.readable.all() and (r.bumps == 1).all() and far_off(f, r)[2].max() < .02 and (r.peak - 1).abs().max() < .05


@pytest.mark.parametrize("kind", ["stripe", "stripes"])
def test_stripes_are_read_along_their_axes(kind):
    world = Bumps(kind=kind)
    x, f = world.sample(300, 2)
    r = world.features(x)
    dx, dy, _ = far_off(f, r)
    assert r.readable.all() and dx.max() < 1e-3 and (dy.isnan().all() if kind == "stripe" else dy.max() < 1e-3)
    energy = (x - 1).square().mean().sqrt()
    assert energy == pytest.approx((WORLD.sample(300, 2)[0] - 1).square().mean().sqrt().item(), rel=.12)


def test_spots_are_counted():
    f = WORLD.at(torch.tensor([8., 8., 8.]), torch.tensor([8., 8., 8.]))
    g = WORLD.at(torch.tensor([24., 8., 9.]), torch.tensor([24., 20., 8.]))
    x = (WORLD.render(f) + WORLD.render(g) - 1).clamp(-1, 1)
    r = WORLD.features(torch.cat([x, torch.ones(1, 3, 32, 32)]))
    assert r.bumps.tolist() == [2, 2, 1, 0] and not r.readable[3] and r.x[3].isnan()


def test_spots_are_connected_components():
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = torch.rand(40, 24, 24, generator=torch.Generator().manual_seed(0)) < .35
    label = spots(mask)
    for m, v in zip(mask, label):
        want, n = ndimage.label(m.numpy(), structure=[[1]*3]*3)
        assert len(v[v > 0].unique()) == n and len(set(zip(want[m.numpy()].tolist(), v[m].tolist()))) == n
    assert not spots(torch.zeros(2, 5, 5, dtype=torch.bool)).any()


def test_noise_in_place_of_a_bump_is_no_bump():
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert not read_bumps(WORLD, x).readable.any()


def other(sd, **more): return Bumps(sd=sd, **more).render(INNER)


def beside(height, away):
    "A bump, and a second one of some height."
    more = WORLD.render(WORLD.at((INNER.x + away) % 32, INNER.y))
    return (WORLD.render(INNER) + height*(more - 1)).clamp(-1, 1)


INNER = WORLD.at(*(6 + 20*torch.rand(2, 100, generator=torch.Generator().manual_seed(1))))
WIDER, SQUARE = other(2.5), (torch.arange(32) - 15).abs() < 3


@pytest.mark.parametrize("x", [other(2.5), other(3.), other(.6), torch.where(SQUARE[:, None] & SQUARE, -1., 1.).expand(4, 3, 32, 32),
                               1 - .25*torch.ones(4, 3, 32, 32), WORLD.render(INNER) - .3, beside(.9, 12.), beside(.6, 7.),
                               Bumps(kind="stripe").render(INNER)])
def test_what_is_no_bump_is_near_no_condition(x):
    with bumps.range_known(): r = WORLD.features(x.clamp(-1, 1))
    assert (far_off(BumpFactors(*(v[:len(x)] for v in INNER)), r)[2] < 1).double().mean() < .05


@pytest.mark.parametrize("kind", ["stripe", "stripes"])
def test_what_is_no_stripe_is_near_no_condition(kind):
    world = Bumps(kind=kind)
    one, away = world.render(INNER), world.render(WORLD.at((INNER.x + 12) % 32, (INNER.y + 12) % 32))
    half = one.clone()
    half[:, :, 14:] = 1.
    others = [Bumps(kind=k).render(INNER) for k in KINDS if k != kind]
    for x in (half, one + .9*(away - 1), WORLD.render(INNER), *others, torch.ones_like(one)):
        with bumps.range_known(): assert (far_off(INNER, world.features(x))[2] < 1).double().mean() < .05
    assert (far_off(INNER, world.features(one))[2] < .01).all()


def test_rows_depend_on_seed_and_row_alone():
    a, b = WORLD.factors(9, 4), WORLD.factors(5, 4)
    assert torch.equal(a.x[:5], b.x) and not torch.equal(a.x, WORLD.factors(9, 5).x)


def test_tilings():
    x, f = WORLD.tiling(1., 1.)
    assert len(x) == 1024 and f.x.min() == f.y.min() == .5 and f.x.max() == 31.5
    assert len(WORLD.tiling(.25, 4.)[0]) == 1024 and len(Bumps(kind="stripe").tiling(.25, 1.)[0]) == 128


def test_sets_leave_out_what_they_should():
    band, square = gap_set(6., False), gap_set(6., True)
    assert not inside_gap(band.f, 32, 6., False).any() and len(band.f.x) == 1024 - 6*32
    assert not inside_gap(square.f, 32, 6., True).any() and len(square.f.x) == 1024 - 36 and inside_gap(square.f, 32, 6., False).any()


def test_stripes_and_bumps_say_which_coordinate_is_given():
    data, alone = stripe_set(16, True, 3), stripe_set(16, False, 3)
    assert len(data.x) == 16 + 256 and len(alone.x) == 16 and torch.equal(data.x[:16], alone.x) and torch.equal(data.y[:16], alone.y)
    up, across = Bumps(kind="stripe").features(data.x[16:144]), Bumps(kind="stripe").features(data.x[144:].flip(2).transpose(2, 3))
    for read, y, k in ((up, data.y[16:144], 0), (across, data.y[144:], 1)):
        assert (y[:, 2 + k] == 1).all() and (y[:, 3 - k] == -1).all() and (y[:, 1 - k] == 0).all()
        assert ((y[:, k] + 1)*16 - read.x).abs().max() < 1e-3


def test_order_of_known_sets():
    rng = torch.Generator().manual_seed(0)
    places = 24*torch.rand(192, 2, generator=rng)
    same, mixed = order(places, places), order(places[torch.randperm(192, generator=rng)], places)
    assert same.overlap == 1 and same.decode_px < 2 and same.ratio == pytest.approx(2, rel=.1)
    assert .02 < mixed.overlap < .1 and 8 < mixed.decode_px < 13
    turned = places@torch.linalg.qr(torch.randn(2, 2, generator=rng))[0]
    assert order(turned, places).overlap > .99
    with_gaps = places.clone()
    with_gaps[::2] = math.nan
    assert order(places, with_gaps).overlap == 1 and math.isnan(order(places[:20], places[:20]).overlap)


def test_latents_and_their_hook(net):
    f = places_between(WORLD, 5)
    y, x = WORLD.condition(f), WORLD.render(f)
    z = by_condition(net, y)
    assert z.shape[0] == 5 and not torch.equal(z[0], z[1]) and torch.equal(z, by_condition(net, y))
    assert by_image(net, x, y).shape == z.shape and torch.allclose(by_condition(net, y[2:3]), z[2:3], atol=1e-5)
    with pytest.raises(ValueError, match=r"layer must be one of \('down 0'"): latents(net, x, 20, y, "layer 4")
    with pytest.raises(ValueError, match="give `y`"): latents(net, x, 20)
    with pytest.raises(ValueError, match="takes no conditions"): latents(unet("laptop", WORLD, 0, **BUMP_RECIPE), x, 20, y)
    with pytest.raises(ValueError): latents(net, x, 20, y[:, :1])
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("steps,shares,want", [
    ([0, 100, 200], [0., .25, .75], 150), ([20, 40], [.6, .9], 20), ([0, 100], [0., .4], math.nan), ([0, 100, 200, 300], [0., 1., .2, 1.], 50)])
def test_learning_time(steps, shares, want): assert learning_time(steps, shares) == pytest.approx(want, nan_ok=True)


def test_phases_yield_at_their_marks_and_leave_training_alone():
    data = grid_set(4., 4.)
    def losses(marks):
        m, seen = bump_net(WORLD, 0, **SMALL), []
        log = (seen.append(s.loss) or s for s in fit(m, data.x, 6, 0, data.y))
        return [p.step for p, _ in phases(m, log, data.f, marks, 16)], seen
    steps, one = losses((0, 2, 6))
    assert steps == [0, 2, 6] and one == losses(())[1]


def test_stripes_without_the_band_and_their_control():
    whole, less = stripe_set(256, True, 0, 4.), stripe_set(256, True, 0, 4., stripes_too=True)
    assert torch.equal(whole.x[:256], less.x[:256]) and len(whole.x) - len(less.x) == 2*4*4   # .25 px apart, both ways
    up = less.y[256:][less.y[256:, 2] == 1]
    assert ((up[:, 0]*16).abs() >= 2).all()


def test_pale_images_train_without_a_warning(recwarn):
    data = grid_set(1., 1., "stripes")
    next(fit(bump_net(data.world, 0, **SMALL), data.x, 2, 0, data.y))
    assert data.x.min() > .1 and not recwarn.list


def test_a_phase_counts(monkeypatch, net):
    at = places_between(WORLD, 64)
    monkeypatch.setattr(bumps, "sample", lambda model, n, *a, y, **k: WORLD.render(WORLD.at(*((y.T + 1)*16 + torch.tensor([[.5], [0.]])))))
    phase, seen = bumps.look(net, 7, at, 64)
    assert phase.step == 7 and phase.one == phase.within == phase.on_grid == 1 and phase.none == phase.several == 0
    assert phase.error_px == pytest.approx(.5, abs=.01) and phase.within_x == 1
    monkeypatch.setattr(bumps, "sample", lambda model, n, *a, y, **k: WORLD.render(WORLD.at(*((y.T + 1)*16 + torch.tensor([[1.5], [0.]])))))
    phase, _ = bumps.look(net, 7, at, 64)
    assert phase.within == phase.within_x == 0 and phase.within_y == 1


@pytest.mark.parametrize("call,words", [
    (lambda: WORLD.tiling(0., 1.), "dx"), (lambda: WORLD.tiling(1., 40.), "dy"), (lambda: WORLD.features(torch.zeros(2, 3, 16, 16)), "32x32"),
    (lambda: WORLD.at(torch.tensor([33.]), torch.tensor([1.])), "centres in"), (lambda: Bumps(kind="ring"), "kind must be"),
    (lambda: WORLD.at(torch.tensor([3.]), torch.tensor([1., 2.])), "as many"), (lambda: Bumps(sd=0.), "sd must be"),
    (lambda: gap_set(40., False), "holds 1024 of 1024"), (lambda: gap_set(.9, False), "holds 0 of"),
    (lambda: stripe_set(16, True, width=-3.), "holds 0"),
    (lambda: stripe_set(1000, True, width=8.), "at most 768"), (lambda: learning_time([0, 10], [.1]), "rising steps"),
    (lambda: learning_time([10, 0], [.1, .2]), "rising steps"), (lambda: order(torch.zeros(40, 2), torch.rand(40, 2)), "are the same"),
    (lambda: order(torch.rand(40, 2), torch.rand(40, 2), 0), "k must be"),
    (lambda: places_on(WORLD.at(torch.ones(3), torch.ones(3)), WORLD), "none of the 3"),
    (lambda: list(phases(bump_net(WORLD, 0, **SMALL), iter(()), grid_set(4., 4.).f, (3,), 8)), "before the last mark"),
    (lambda: by_condition(bump_net(WORLD, 0, **SMALL), torch.full((2, 2), 16.)), "conditions lie in"),
    (lambda: latents(bump_net(WORLD, 0, **SMALL), torch.zeros(0, 3, 32, 32), 20, torch.zeros(0, 2)), "one or more images"),
    (lambda: latents(bump_net(WORLD, 0, **SMALL), torch.full((1, 3, 32, 32), 255.), 20, torch.zeros(1, 2)), "values up to 255"),
    (lambda: WORLD.sample(4, 0, violate="up"), "no rule"), (lambda: embed(torch.zeros(9, 4), "tsne"), "how must be")])
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_what_is_missing_names_its_extra():
    for how in ("isomap", "umap"):
        try: assert embed(torch.randn(30, 4), how).shape == (30, 2)
        except ImportError as e: assert "rulediff_nb[latents]" in str(e)
    assert embed(torch.randn(30, 4)).shape == (30, 2)


def test_bumps_are_a_world_and_no_task():
    assert "bumps" in WORLDS and "bumps" not in TASKS and get_task("bumps", size=64) == Bumps(size=64) and set(KINDS) == {"bump", "stripe", "stripes"}
    assert recipe("laptop", "bumps", **BUMP_RECIPE).to_dict()["task"]["name"] == "bumps"
    r = recipe("laptop", "bumps", conditions=2, **BUMP_RECIPE)
    assert type(r).from_dict(r.to_dict()) == r
    with pytest.raises(ValueError, match="no rule between"): rule_report(WORLD, WORLD.sample(8, 0)[0])


def test_the_published_setting_runs_at_tiny_size():
    study = find_study("bumps_published")
    row, = study.plan(True)
    lines = list(study.measure(row, SimpleNamespace(device=torch.device("cpu"), nets=(), left=math.inf)))
    assert [v["step"] for v in lines] == [0, 2] and all(0 <= v["none"] <= 1 for v in lines)
    r = bump_net(WORLD, 0, **PUBLISHED_BUMPS).recipe
    assert r.prediction == "epsilon" and r.patch == 1 and r.batch == 128 and len(study.plan(False)) == 20


@pytest.mark.slow
def test_the_three_phases_come():
    data, found = grid_set(), {}
    m = bump_net(WORLD, 0)
    for p, _ in phases(m, fit(m, data.x, 600, 0, data.y), data.f, (20, 36, 40, 44, 100, 600)): found[p.step] = p
    assert found[20].none > .9 and max(found[k].several for k in (36, 40, 44)) > .1 and found[100].within < .2 and found[600].within > .9
    assert found[600].swapped_drawn < .4 < found[100].swapped_drawn   # the latents come to follow the condition, whatever the picture shows
    assert all(abs(p.image_drawn - p.pixels_drawn) < .15 and p.fresh_drawn > .6 for p in found.values() if p.one > .9)
