"Contrastive sets are fair, classifiers learn from them, resume, travel and refuse what they were not made for; their studies are the stored ones."
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import rulediff_nb.features  # noqa: F401 (gives the tasks their ruler)
from rulediff_nb.schedule import timestep_of
from rulediff_nb.classifier import (
    CLASSES,
    CLASSIFIER_WEIGHTS,
    MARGINS,
    ON,
    PIXEL,
    PUBLISHED_MARGINS,
    SIGMAS,
    ClassifierRow,
    ClassifierRun,
    RuleClassifier,
    ShippedClassifier,
    TrainedClassifier,
    as_class,
    bayes_accuracy,
    calibration_error,
    calibration_floor,
    classifier,
    classifier_recipe,
    classifier_steps,
    contrastive,
    contrastive_factors,
    each_class,
    fit_classifier,
    fit_pixels,
    graded_factors,
    load_classifier,
    margins_for,
    noised_outputs,
    pixel_classifier,
    release_classifier,
    right,
    scenes_for,
    split,
    supervised_contrast,
)
from rulediff_nb.core import row_generator
from rulediff_nb.schedule import best_accuracy, noise_schedule, snr
from rulediff_nb.store import StoreError, load_manifest, save_release
from rulediff_nb.study import run_study
from rulediff_nb.table import KEPT, Study, Work, find_study, results
from rulediff_nb.tasks import TASKS, get_task
from rulediff_nb.train import train_steps
from rulediff_nb.unet import unet

SMALL = dict(channels=(8, 8), attention=(False, False), width=8, batch=8)
CPU = torch.device("cpu")
PUBLISHED = {name: t.with_(palette="random") for name, t in TASKS.items()}
tasks = pytest.mark.parametrize("task", TASKS)


def parts(task, f, classes): return [task.Factors(*(v.view(classes, -1)[k] for v in f)) for k in range(classes)]


@tasks
def test_classes_differ_in_the_rule_alone(task):
    "By the factors: the dependent length is off by the margin, all other factors have one distribution, the coarse rule breaks in its class alone."
    task = PUBLISHED[task]
    for margin in margins_for(task):
        f, y = contrastive_factors(task, 200, 3, margin, classes=4)
        assert y.tolist() == [k for k in range(4) for _ in range(200)]
        for violate, g in zip(CLASSES, parts(task, f, 4)):
            off = torch.sub(*task.dependent(g))
            want = dict(down=-margin, up=margin).get(violate, 0.)
            if violate != "coarse":
                assert (off - want).abs().max() < 1e-5 and task.coarse(g).all() and task.inside(g).all()
            else: assert not task.coarse(g).any()


@tasks
def test_classes_have_one_distribution_of_everything_else(task):
    "Scenes of the classes, put back on the rule, come from one distribution: no factor separates the classes (Kolmogorov-Smirnov, n=1500 each)."
    task, margin, n = PUBLISHED[task], margins_for(task)[0], 1500
    down, on, up = parts(task, contrastive_factors(task, n, 4, margin)[0], 3)
    for a, m in ((down, margin), (up, -margin)):
        back = task.with_dependent(a, getattr(a, task.length) + m)
        for u, v in zip(back, on):
            u, v = (w.reshape(n, -1)[:, 0].sort().values.contiguous() for w in (u, v))
            at = torch.cat([u, v])
            assert (torch.searchsorted(u, at, right=True) - torch.searchsorted(v, at, right=True)).abs().max()/n < 1.95*math.sqrt(2/n)


@tasks
def test_the_ruler_reads_what_the_labels_say(task):
    task, margin = TASKS[task].with_(palette="fixed"), margins_for(task)[0]
    x, y = contrastive(task, 60, 0, margin)
    f = task.features(x)
    off = torch.sub(*task.dependent(f))
    ok = f.readable & off.isfinite()
    assert ok.float().mean() > .9 and ((off[ok]/margin).round() == y[ok] - 1).float().mean() > .98


def test_scenes_depend_on_the_seed_and_margin_sets_share_none():
    a, b, c = (contrastive_factors("two_squares", 20, s, (1/32, 1/64))[0] for s in (0, 0, 1))
    assert all(torch.equal(u, v) for u, v in zip(a, b)) and not torch.equal(a[0], c[0])
    assert len(set(a.l1.tolist())) == 120   # no scene is used twice


def test_published_margin_of_perspective():
    f, y = contrastive_factors("perspective", 400, 0, PUBLISHED_MARGINS["perspective"])
    n = (f.l2*f.h2 - f.l1*f.h1)*1024
    assert (n[y == ON].abs() < 1e-3).all() and (n[y == 0] < -14.99).all() and (n[y == 2] > 14.99).all()
    assert abs(n[y == 2].mean() - (15 + 5*math.sqrt(2/math.pi))) < 1   # mean of |z| is sqrt(2/pi)


def test_graded_scenes_lie_between_the_margins():
    task = PUBLISHED["two_circles"]
    f, y = graded_factors(task, 500, 0, (1/64, 1/128))
    off = torch.sub(*task.dependent(f))
    a, b = task.sides(f)
    assert y.shape == (1000, 1) and torch.allclose(y[:, 0], (b/a).log())
    for part, m in zip(off.split(500), (1/64, 1/128)): assert part.abs().max() <= m + 1e-6 and part.std() > .5*m and abs(part.mean()) < .1*m


@pytest.mark.parametrize("kw,error,said", [
    (dict(margin=0.), ValueError, r"\(0,1\)"), (dict(margin=-.1), ValueError, r"\(0,1\)"), (dict(margin=math.nan), ValueError, r"\(0,1\)"),
    (dict(margin=[]), ValueError, r"\(0,1\)"), (dict(margin=.4), ValueError, "too few scenes"), (dict(classes=2), ValueError, "3 or 4"),
    (dict(n=0), ValueError, "n must be"), (dict(n=2.5), TypeError, "n must be"), (dict(seed=-1), ValueError, "seed"),
    (dict(task="sun"), ValueError, "sun")])
def test_contrastive_refuses(kw, error, said):
    with pytest.raises(error, match=said): contrastive(**dict(task="two_squares", n=4, seed=0) | kw)


@pytest.mark.parametrize("net", PIXEL)
@pytest.mark.parametrize("size", [16, 32])
def test_pixel_classifiers(net, size):
    a, b, c = pixel_classifier(net, size, 0), pixel_classifier(net, size, 0), pixel_classifier(net, size, 1, classes=4)
    x = torch.rand(5, 3, size, size)
    assert a(x).shape == (5, 3) and c(x).shape == (5, 4)
    assert all(torch.equal(u, v) for u, v in zip(a.parameters(), b.parameters()))
    w = [next(n.parameters()) for n in (a, c)]
    assert not torch.equal(*w)


def test_eight_layers():
    "Seven convolutions on the way and a linear layer; two more go around."
    net = pixel_classifier("resnet8")
    assert sum(isinstance(m, torch.nn.Linear) or getattr(m, "kernel_size", 0) == (3, 3) for m in net.modules()) == 8


def test_pixel_classifier_refuses():
    with pytest.raises(ValueError, match="small_conv"): pixel_classifier("vgg")


def test_pixel_training_learns_and_repeats():
    x, y = contrastive(TASKS["two_squares"].with_(palette="fixed", size=16), 40, 0, 1/16)
    nets = [pixel_classifier("mlp", 16) for _ in range(2)]
    losses = [list(fit_pixels(n, x, y, 20, 16, 1e-3)) for n in nets]
    assert losses[0] == losses[1] and losses[0][-1] < .7*losses[0][0] and right(nets[0], x, y).float().mean() > .6
    state = torch.get_rng_state()
    list(fit_pixels(nets[0], x, y, 1))
    assert torch.equal(state, torch.get_rng_state()) and not nets[0].training
    with pytest.raises(ValueError, match="labels"): next(fit_pixels(nets[0], x, y[:-1], 1))


def test_split_cuts_once():
    a, b = split(101, 3)
    assert len(a) == 81 and sorted(a.tolist() + b.tolist()) == list(range(101)) and not torch.equal(a, split(101, 4)[0])


@pytest.mark.parametrize("y", [torch.arange(12) % 3, torch.zeros(12, dtype=torch.long), torch.arange(12)])
def test_supervised_contrast_against_loops(y):
    g = torch.Generator().manual_seed(0)
    f, tau = torch.randn(12, 5, generator=g), .5
    u = F.normalize(f.double(), dim=1)
    each = []
    for i in range(12):
        s = [math.exp(float(u[i]@u[j])/tau) for j in range(12)]
        each.append(-math.log(sum(v for j, v in enumerate(s) if y[j] == y[i])/sum(s)))
    assert abs(supervised_contrast(f, y, tau).item() - sum(each)/12) < 1e-6
    assert supervised_contrast(3*f, y, tau) == pytest.approx(supervised_contrast(f, y, tau).item(), abs=1e-6)   # directions alone count


def test_guidance_classifier_takes_the_timestep_and_has_the_tasks_margins():
    clf = classifier("laptop", "two_circles", **SMALL)
    assert clf.recipe.margins == margins_for("two_circles") and clf.recipe.task.name == "two_circles"
    x = torch.randn(3, 3, 32, 32)
    assert clf(x, 10).shape == (3, 3) and not torch.allclose(clf(x, 10), clf(x, 900))
    assert torch.allclose(clf(x, 10)[1], clf(x, torch.tensor([500, 10, 10]))[1], atol=1e-5)


@pytest.mark.parametrize("kw,said", [(dict(classes=2), "3 or 4"), (dict(classes=0), "3 or 4"), (dict(classes=0, conditions=2), "3 or 4")])
def test_classifier_refuses(kw, said):
    with pytest.raises(ValueError, match=said): classifier("laptop", "two_squares", **SMALL, **kw)
    with pytest.raises(ValueError, match="laptop"): classifier("huge", "two_squares")


@pytest.mark.parametrize("kw", [{}, dict(classes=0, conditions=1)])
def test_training_repeats_and_lowers_the_loss(kw):
    logs = []
    for _ in range(2):
        clf = classifier("laptop", TASKS["two_squares"].with_(size=16, palette="fixed"), 1, **SMALL, lr=2e-3, margins=(1/16,), **kw)
        logs.append([s.loss for s in classifier_steps(clf, 1, 120, 100)])
    assert logs[0] == logs[1] and sum(logs[0][-30:]) < sum(logs[0][:30]) and not clf.training


def test_fit_classifier_is_its_generator():
    kw = dict(seed=2, steps=4, n=20, margins=(1/16,), **SMALL)
    a = fit_classifier("two_squares", **kw)
    b = classifier("laptop", "two_squares", 2, margins=(1/16,), **SMALL)
    list(classifier_steps(b, 2, 4, 20))
    assert all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values()))


def test_a_killed_training_resumes_to_the_bits(tmp_path):
    task = get_task("two_squares")
    x, y = contrastive(task, 20, 0, 1/16)
    def fresh(): return classifier("laptop", task, 0, margins=(1/16,), **SMALL)
    whole, cut = fresh(), fresh()
    list(train_steps(whole, x, tmp_path/"whole", 8, y=y, run_type=ClassifierRun))
    for s in train_steps(cut, x, tmp_path/"cut", 8, y=y, run_type=ClassifierRun):
        if s.step == 3: break
    list(train_steps(cut := fresh(), x, tmp_path/"cut", 8, y=y, run_type=ClassifierRun))
    assert all(torch.equal(u, v) for u, v in zip(whole.state_dict().values(), cut.state_dict().values()))


def test_saved_as_a_folder(tmp_path):
    clf = classifier("laptop", "two_squares", **SMALL).eval()
    clf.save_pretrained(tmp_path)
    again, x = RuleClassifier.from_pretrained(tmp_path), torch.randn(2, 3, 32, 32)
    assert again.recipe == clf.recipe and torch.equal(again(x, 5), clf(x, 5)) and not list(tmp_path.glob("*.bin"))


def released(folder, **changes):
    clf = classifier("laptop", TASKS["two_squares"].with_(palette="fixed"), **SMALL)
    save_release(folder, "two_squares-fixed-classifier", clf.state_dict(), dict(recipe=clf.recipe.to_dict() | changes))
    return clf


def test_load_classifier(tmp_path):
    clf = released(tmp_path)
    got, x = load_classifier("two_squares", folder=tmp_path), torch.randn(2, 3, 32, 32)
    assert torch.allclose(got(x, 5), clf.eval()(x, 5), atol=1e-2) and not got.training and got.manifest["sha256"]
    with pytest.raises(StoreError, match="two_squares-random-classifier"): load_classifier("two_squares", "random", folder=tmp_path)
    with pytest.raises(ValueError, match="circle"): load_classifier("circle", folder=tmp_path)
    file = tmp_path/"two_squares-fixed-classifier.safetensors"
    b = bytearray(file.read_bytes())
    b[-1] ^= 1
    file.write_bytes(b)
    with pytest.raises(StoreError): load_classifier("two_squares", folder=tmp_path)


def test_load_classifier_refuses_another_task_or_network(tmp_path):
    released(tmp_path, task=get_task("two_circles").spec())
    with pytest.raises(StoreError, match="two_circles-fixed"): load_classifier("two_squares", folder=tmp_path)
    released(tmp_path, width=16)
    with pytest.raises(StoreError, match="does not fit"): load_classifier("two_squares", folder=tmp_path)


@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_timestep_of_is_the_nearest(betas):
    abar = noise_schedule(betas=betas).alphas_cumprod
    for sigma in (.02, .3, 2., 20.):
        t = timestep_of(sigma, abar)
        off = (math.log(sigma) + .5*snr(abar).log()).abs()
        assert off[t] <= off[max(t - 1, 0):t + 2].min()
    for bad in (0., -1., math.nan):
        with pytest.raises(ValueError, match="above 0"): timestep_of(bad, abar)


def test_noised_outputs_do_not_depend_on_the_batch():
    clf, x = classifier("laptop", "two_squares", **SMALL).eval(), torch.rand(300, 3, 32, 32)
    a, b = noised_outputs(clf, x, 100, 1), noised_outputs(clf, x[:10], 100, 1)
    assert torch.allclose(a[:10], b, atol=1e-5) and not torch.allclose(b, noised_outputs(clf, x[:10], 100, 2))


def test_bayes_accuracy_is_the_formula_for_two():
    "Of two scenes the normal distribution of best_accuracy; of three alike a third."
    xa, xb = (PUBLISHED["two_squares"].sample(4000, 0, violate=v, margin=1/64)[0] for v in (None, "up"))
    for sigma in (.3, 1., 3.):
        want = best_accuracy(xa, xb, torch.tensor([1/(1 + sigma**2)])).mean().item()
        assert abs(bayes_accuracy(torch.stack([xa, xb], 1), sigma) - want) < 4*math.sqrt(.25/4000)
    assert abs(bayes_accuracy(torch.stack([xa]*3, 1), 1.) - 1/3) < .03


def test_calibration_error():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(20000, 1, generator=g)*.5 + .5
    y = (torch.rand(20000, generator=g) > p[:, 0]).long()       # class 0 with the probability that is said
    assert calibration_error(torch.cat([p, 1 - p], 1), y) < .02
    sure = torch.cat([torch.full_like(p, .99), torch.full_like(p, .01)], 1)
    assert abs(calibration_error(sure, y) - (.99 - (y == 0).float().mean().item())) < 1e-3
    with pytest.raises(ValueError, match="bins"): calibration_error(p[:5], y[:5])
    q = torch.cat([p, 1 - p], 1)[:900]
    assert .005 < calibration_floor(q) < .04 and calibration_error(sure, y) > 5*calibration_floor(sure)


def test_scenes_for_are_on_the_rule_and_have_their_margin():
    task = PUBLISHED["perspective"]
    f, m = scenes_for(task, 50, 0, PUBLISHED_MARGINS["perspective"])
    assert (torch.sub(*task.dependent(f)).abs() < 1e-6).all() and m.shape == (50,) and m.unique().numel() == 50


def test_the_classifier_fits_its_model():
    "Its schedule is that of the preset it guides."
    for preset in ("laptop", "published"):
        a = classifier(preset, "two_squares", **(SMALL if preset == "laptop" else dict(channels=(32,), attention=(False,), layers=1))).abar
        assert torch.equal(a, unet("laptop", "two_squares").abar if preset == "laptop" else noise_schedule().alphas_cumprod)


def test_the_published_size_trains():
    "As wide as the study's (about 20 million parameters); a step of it, on few images."
    clf = classifier("published", "two_squares", batch=6)
    assert 15e6 < sum(p.numel() for p in clf.parameters()) < 30e6
    steps = list(classifier_steps(clf, 0, 1, n=2))
    assert len(steps) == 1 and steps[0].images == 6 and math.isfinite(steps[0].loss)


def test_each_class_draws_a_scene_as_its_classes_are_drawn_alone():
    task = TASKS["two_squares"].with_(palette="fixed")
    f, m = scenes_for(task, 3, 0, 1/16)
    x = each_class(task, f, m, 4)
    assert x.shape == (3, 4, 3, 32, 32) and torch.equal(x[:, :3], each_class(task, f, 1/16))
    for k, violate in enumerate(CLASSES): assert torch.equal(x[:, k], task.render(as_class(task, f, violate, m)))


def test_an_untrained_recipe_is_that_of_its_network():
    assert classifier("laptop", "two_circles", **SMALL).recipe == classifier_recipe("laptop", "two_circles", **SMALL)


@pytest.mark.parametrize("need,word", [
    (dict(task="moon"), "unknown task 'moon'"), (dict(palette="blue"), "palette must be"), (dict(role="judge"), "role must be"),
    (dict(task=get_task("two_squares")), "the training.task is of type TwoSquares, which JSON cannot hold"),
    (dict(preset="none"), "unknown preset 'none'"), (dict(steps=0), "steps must be in"), (dict(seed=-1), "seed must be in"),
    (dict(seed=1.5), "seed must be a whole number"), (dict(n=0), "n must be in"), (dict(changes=(("wings", 2),)), "wings"),
    (dict(changes=(("margins", (.5,)),)), "a margin of 0.5 leaves too few"), (dict(changes=(("margins", ("a",)),)), "margins must be in"),
    (dict(changes=(("patch", 3),)), "no network can work with .*patch=3"), (dict(changes=(("precision", "fp16"),)), "fp16 does not train on a CPU"),
    (dict(changes=(("optimizer", "magic"),)), "optimizer must be one of"), (dict(changes=(("lr", math.nan),)), "lr must be a number"),
    (dict(changes=(("classes", 5),)), "classes must be 3 or 4"), (dict(changes=(("attention", (True, False, False)),)), "channels must be at least"),
    (dict(changes=(("channels", (48, 24)), ("attention", (True, False)))), "the last of channels must be at least head_dim")])
def test_a_training_that_cannot_be_is_refused_before_any_work(need, word, tmp_path):
    need = TrainedClassifier(**dict(task="two_squares", steps=2, n=2) | need)
    with pytest.raises((ValueError, TypeError), match=word): need.check(torch.device("cpu"))
    with pytest.raises((ValueError, TypeError), match=word):   # a study looks at all trainings before the first
        study = Study("none", "", lambda quick: [ClassifierRow("two_squares", "fixed", s, 2, 12) for s in (0, 1)], lambda row, work: {},
                      lambda row: (TrainedClassifier("two_squares", steps=2, n=2), need)[row.seed:row.seed + 1])
        list(run_study(study, tmp_path/"r", workers=1))
    assert not list(tmp_path.glob("trained/*"))


@pytest.mark.parametrize("more", [dict(), dict(role="regressor"), dict(shuffled=True), dict(n=1, role="regressor"),
                                  dict(changes=(("channels", (8,)*5), ("attention", (False,)*5)))])
def test_a_training_that_can_be_passes(more): TrainedClassifier(**dict(task="two_squares", steps=2, n=2) | more).check(torch.device("cpu"))


TINY = TrainedClassifier("two_squares", steps=8, n=4, changes=(*SMALL.items(), ("margins", (1/16,))))


def trained(need, folder):
    "A need, trained and loaded."
    list(need.train(folder, CPU))
    return need.load(folder, CPU)


def same(a, b): return all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("role", ["classifier", "regressor"])
def test_a_need_is_the_training_of_the_lesson(role, tmp_path):
    "The same bits as `classifier_steps`, in whose place it stands; a second call has nothing to do."
    need = TINY._replace(role=role)
    assert not need.weights(tmp_path) and list(need.train(tmp_path, CPU)) == list(range(1, 9))
    mark, got = need.weights(tmp_path), need.load(tmp_path, CPU)
    assert len(mark) == 12 and list(need.train(tmp_path, CPU)) == [] and need.weights(tmp_path) == mark
    assert not got.training and got.manifest["steps"] == 8 and got.manifest["cpu_seconds"] > 0
    more = dict(classes=0, conditions=1) if role == "regressor" else {}
    by_hand = classifier("laptop", get_task("two_squares", palette="fixed"), 0, **more, **dict(need.changes))
    list(classifier_steps(by_hand, 0, 8, 4))
    assert same(got, by_hand)


def test_a_need_survives_an_interruption_and_a_kill(tmp_path):
    "Stopped after step 3, killed in step 6, resumed at 4: the same bits as in one go."
    whole = trained(TINY, tmp_path/"whole")
    for k in TINY.train(tmp_path/"cut", CPU):
        if k == 3: break
    assert not TINY.weights(tmp_path/"cut")
    code = "import os, sys, torch\nfrom rulediff_nb.classifier import TrainedClassifier\n"
    code += f"for k in {TINY!r}.train(sys.argv[1], torch.device('cpu')):\n    if k == 6: os._exit(9)"
    r = subprocess.run([sys.executable, "-c", code, str(tmp_path/"cut")], env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert r.returncode == 9, r.stderr[-2000:]
    assert not TINY.weights(tmp_path/"cut") and list(TINY.train(tmp_path/"cut", CPU)) == [4, 5, 6, 7, 8]
    cut = TINY.load(tmp_path/"cut", CPU)
    assert same(whole, cut) and cut.manifest["cpu_seconds"] > 0


def test_labels_and_sets_of_needs():
    "The set of `contrastive` and `graded_factors`; shuffled labels are the same labels in the order of stream 5060."
    task = get_task("two_squares", palette="fixed")
    x, y = contrastive(task, 4, 3, (1/16,))
    need = TINY._replace(seed=3)
    assert all(torch.equal(u, v) for u, v in zip(need.images(), (x, y)))
    same_x, mixed = need._replace(shuffled=True).images()
    order = torch.from_numpy(row_generator(3, 0, stream=5060).permutation(len(y)))
    assert torch.equal(x, same_x) and torch.equal(mixed, y[order]) and not torch.equal(mixed, y)
    f, target = graded_factors(task, 4, 3, (1/16,))
    got, told = need._replace(role="regressor").images()
    assert torch.equal(got, task.render(f)) and torch.equal(told, target)


def test_keys_of_needs_differ():
    others = dict(task="two_circles", palette="random", role="regressor", seed=1, steps=9, shuffled=True, n=5, preset="published", changes=())
    needs = [TINY, *(TINY._replace(**{k: v}) for k, v in others.items())]
    assert set(others) == set(TINY._fields) and len({n.key for n in needs}) == len(needs)
    assert TINY._replace(changes=TINY.changes + (("lr", 2e-3),)).key != TINY.key
    with pytest.raises(ValueError, match="regressor"): TINY._replace(role="scorer").recipe()


def test_a_need_loads_its_own_training_alone(tmp_path):
    need, other = TINY._replace(steps=1), TINY._replace(steps=1, shuffled=True)
    for n in (need, other): list(n.train(tmp_path, CPU))
    mine, foreign = (tmp_path/n.key/"trained.safetensors" for n in (need, other))
    blob = mine.read_bytes()
    mine.write_bytes(foreign.read_bytes())
    with pytest.raises(StoreError, match="another training.*shuffled.*True.*expected.*False"): need.load(tmp_path, CPU)
    mine.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(StoreError, match="damaged"): need.load(tmp_path, CPU)
    mine.unlink()
    with pytest.raises(StoreError, match="no file"): need.load(tmp_path, CPU)


def test_a_shipped_need_is_what_is_loaded():
    need = ShippedClassifier("two_circles", role="regressor")
    sha = load_manifest(CLASSIFIER_WEIGHTS, "two_circles-fixed-regressor")["sha256"]
    assert need.weights() == sha[:12] and sha[:12] in need.key and list(need.train(None, CPU)) == []
    assert same(need.load(None, CPU), load_classifier("two_circles", role="regressor"))
    with pytest.raises(StoreError, match="random"): ShippedClassifier("two_circles", "random").weights()


def test_a_released_need_is_loaded_as_those_of_the_package(tmp_path):
    need = TrainedClassifier("two_squares", steps=1, n=1)
    said = release_classifier(need, tmp_path, tmp_path/"out", images=12)
    got, half = load_classifier("two_squares", folder=tmp_path/"out"), {k: v.half().float() for k, v in need.load(tmp_path, CPU).state_dict().items()}
    assert all(torch.equal(v, half[k]) for k, v in got.state_dict().items()) and said["measure"] == "accuracy"
    assert set(said["report"]) == {f"sigma {s:g}, {32*m:g} px" for s in SIGMAS for m in MARGINS}
    shipped = load_manifest(CLASSIFIER_WEIGHTS, "two_squares-fixed-classifier")
    assert set(said) == set(shipped) and set(said["recipe"]) == set(shipped["recipe"]) and set(said["report"]) == set(shipped["report"])
    with pytest.raises(ValueError, match="control"): release_classifier(need._replace(shuffled=True), tmp_path, tmp_path)


STUDIES = "pixels", "accuracy", "calibration", "regression"


@pytest.mark.parametrize("name", STUDIES)
def test_a_plan_is_the_stored_rows(name):
    "Every stored line belongs to a row of the plan, every row has lines, and no row is planned twice."
    plan, df = find_study(name).plan(False), results(name)
    stored = list(df[list(plan[0]._fields)].drop_duplicates().itertuples(index=False, name=None))
    assert sorted(map(tuple, plan)) == sorted(stored) and len(set(plan)) == len(plan)


@pytest.mark.parametrize("name", STUDIES)
def test_a_quick_row_has_the_columns_of_the_table(name, tmp_path):
    study = find_study(name)
    (row,) = study.plan(True)
    nets = tuple(trained(n, tmp_path) for n in study.needs(row))
    lines = study.measure(row, Work(nets, CPU))
    lines = [lines] if isinstance(lines, dict) else list(lines)
    want = set(results(name)) - set(KEPT) - set(row._fields)
    assert lines and all(set(v) == want for v in lines) and set((*study.keys, *study.shown)) <= want | set(row._fields)
    assert len(lines) == (1 if name == "pixels" else 9*5 if name == "accuracy" else 9)


def test_accuracy_and_calibration_share_their_training():
    a, b, c = (find_study(k).plan(False)[4] for k in ("accuracy", "calibration", "regression"))
    needs = [find_study(k).needs(r) for k, r in (("accuracy", a), ("calibration", b), ("regression", c))]
    assert needs[0] == needs[1] == (TrainedClassifier(a.task, a.palette, "classifier", a.seed),)
    assert needs[2] == (TrainedClassifier(c.task, c.palette, "regressor", c.seed),)


def test_stored_lines_are_of_the_shipped_networks():
    "Lines measured again with the package's weights of seed 0, which were rounded to half precision: at most 5 images of 900 differ."
    study, net = find_study("accuracy"), load_classifier("two_squares")
    row = next(r for r in study.plan(False) if (r.task, r.seed) == ("two_squares", 0))
    df = results("accuracy").query("task == 'two_squares' and seed == 0")
    for line in itertools.islice(study.measure(row, Work((net,), CPU)), 6, 9):   # bounds of 1 and below
        (then,) = df[(df.margin_px == line["margin_px"]) & (df.sigma == line["sigma"])].to_dict("records")
        assert abs(line["accuracy"] - then["accuracy"]) <= 5/900 + 1e-6 and line["bound"] == pytest.approx(then["bound"], abs=1e-6)
