"Filters keep exactly what passes their scorer, and count what it cost."
import math

import pytest
import torch

from rulediff_nb.classifier import classifier, pixel_classifier
from rulediff_nb.filter import best_of, by_classifier, by_ruler, by_verdict, keep
from rulediff_nb.guide import ClassifierGuidance, CleanGuidance, Guidance, ShuffledGuidance, classifier_free, counting, guided
from rulediff_nb.sample import sample
from rulediff_nb.tasks import TASKS
from rulediff_nb.unet import unet

TASK = TASKS["two_squares"].with_(palette="fixed")


def net(): return unet("laptop", TASK, channels=(16, 16), attention=(False, False), head_dim=8).eval()
def brightness(x): return x.mean((1, 2, 3))


def test_keep_is_a_filter_over_the_samplers_own_rows():
    m = net()
    rows = sample(m, 24, 3, 0., 5, precision="fp32")   # as `keep` does, eight at a time
    least = brightness(rows).median().item()
    k, want = keep(m, brightness, least, 8, 3, 0., 5), (brightness(rows) >= least).nonzero()[:8, 0]
    assert torch.allclose(k.x, rows[want], atol=1e-4) and (brightness(k.x) >= least).all()
    assert k.drawn == want[-1] + 1 and k.nfe == 3*k.drawn/8
    assert torch.allclose(keep(m, brightness, least, 3, 3, 0., 5).x, k.x[:3], atol=1e-4)   # fewer are the first of many


def test_keep_takes_all_if_all_pass():
    m = net()
    k = keep(m, lambda x: torch.zeros(len(x)), -1., 5, 3, 1., 2)
    assert torch.equal(k.x, sample(m, 5, 3, 1., 2)) and k.drawn == 5 and k.nfe == 3


def test_new_images_are_drawn_each_time():
    seen = []
    keep(net(), lambda x: (seen.append(x), torch.arange(len(x)) == 0)[1].float(), 1., 4, 2, 0., 1)
    flat = torch.cat(seen).flatten(1)
    assert len(seen) == 4 and torch.cdist(flat, flat).add(1e9*torch.eye(len(flat))).min() > .01


@pytest.mark.parametrize("score", [0., math.nan, -math.inf])
def test_a_scorer_that_passes_nothing_ends_with_a_count(score):
    with pytest.raises(RuntimeError, match="0 of 8 images"): keep(net(), lambda x: torch.full((len(x),), score), .5, 4, 2, limit=2)


def test_best_of_takes_the_best_of_each_group():
    m = net()
    b, rows = best_of(m, brightness, 3, 6, 3, 0., 5), sample(m, 18, 3, 0., 5)
    want = rows[brightness(rows).view(6, 3).argmax(1) + 3*torch.arange(6)]
    assert torch.equal(b.x, want) and b.drawn == 18 and b.nfe == 9
    assert torch.equal(best_of(m, brightness, 1, 6, 3, 0., 5).x, sample(m, 6, 3, 0., 5))


def test_every_denoiser_inside_is_counted():
    m = unet("laptop", TASK, channels=(16, 16), attention=(False, False), head_dim=8, classes=3).eval()
    assert best_of(classifier_free(m), brightness, 2, 3, 3).nfe == 2*3*2       # two predictions at each step
    clf = classifier("laptop", TASK, channels=(8, 8), attention=(False, False), width=8).eval()
    assert best_of(guided(net(), clf), brightness, 2, 3, 3).nfe == 2*3         # the classifier is no denoiser
    assert best_of(guided(net(), CleanGuidance(clf)), brightness, 2, 3, 3).nfe in (2*6, 2*5)   # evaluated again for x0_hat, but in pure noise


def test_what_counts_is_chosen_and_counts_no_longer_than_the_context():
    m, clf = net(), classifier("laptop", TASK, channels=(8, 8), attention=(False, False), width=8).eval()
    g = guided(m, ShuffledGuidance(ClassifierGuidance(clf)))
    with counting(g) as nfe, counting(g, type(g.guidance)) as gradients, counting(g, Guidance) as both: sample(g, 4, 5)
    assert nfe[0] == 20 and gradients[0] in (16, 20) and both[0] == 2*gradients[0]   # none in pure noise; one guidance inside the other
    sample(g, 4, 5)
    assert nfe[0] == 20 and not any(v._forward_hooks for v in g.modules())


def test_a_guidance_classifier_is_no_scorer():
    c = classifier("laptop", TASK, channels=(8, 8), attention=(False, False), width=8)
    for f in (by_classifier, by_verdict, lambda c: keep(net(), c, 0.), lambda c: best_of(net(), c)):
        with pytest.raises(TypeError, match="noise level"): f(c)


def test_a_model_must_be_one():
    with pytest.raises(TypeError, match="recipe"): keep(torch.nn.Linear(2, 2), brightness, 0.)


@pytest.mark.parametrize("scorer,said", [(pixel_classifier("small_conv"), "by_classifier"), (lambda x: 3., "float"),
                                        (by_verdict(pixel_classifier("mlp"), 7), r"\[0,3\)"),
                                        (by_classifier(pixel_classifier("mlp"), -1), r"\[0,3\)")])
def test_a_scorer_must_give_a_score_per_image(scorer, said):
    for f in (lambda: keep(net(), scorer, 0., 2, 2), lambda: best_of(net(), scorer, 2, 2, 2)):
        with pytest.raises(ValueError, match=said): f()


@pytest.mark.parametrize("limit", [0., math.nan, math.inf])
def test_a_limit_is_a_number(limit):
    with pytest.raises(ValueError, match="limit"): keep(net(), brightness, 0., 2, 2, limit=limit)


def test_no_more_is_drawn_than_the_limit():
    with pytest.raises(RuntimeError, match="0 of 12 images"): keep(net(), lambda x: torch.zeros(len(x)), 1., 8, 2, limit=1.5)


def test_images_that_are_none_are_not_kept():
    m = net()
    with torch.no_grad(): next(m.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError): keep(m, by_verdict(pixel_classifier("small_conv"), 0), 1., 2, 2)


def test_a_score_that_is_no_number_is_not_the_best():
    b = best_of(net(), lambda x: torch.tensor([math.nan, 1.]*2), 2, 2, 2, 0., 1)
    assert torch.equal(b.x, sample(net(), 4, 2, 0., 1)[1::2])


@pytest.mark.parametrize("scorer,error,said", [
    (by_ruler("two_circles"), ValueError, "two_circles"), (by_ruler(TASK.with_(palette="random")), ValueError, "random"),
    (3, TypeError, "int")])
def test_a_scorer_of_another_task_is_refused(scorer, error, said):
    with pytest.raises(error, match=said): keep(net(), scorer, -1.)
    with pytest.raises(error, match=said): best_of(net(), scorer)


def test_the_verdict_is_the_study_s_filter():
    clf, x = pixel_classifier("resnet8"), TASK.sample(40, 0)[0]
    clf.train()
    p = by_classifier(clf)(x)
    assert not clf.training and torch.equal(by_verdict(clf)(x), (clf(x).argmax(1) == 1).float()) and (by_verdict(clf)(x)[p > .5] == 1).all()


def test_the_rulers_scores():
    on, off, flip = (TASK.sample(8, 0, violate=v, margin=1/16)[0] for v in (None, "up", "coarse"))
    scorer = by_ruler(TASK)
    assert (scorer(on) > -.01).all() and (scorer(off) < -.02).all() and (scorer(flip) == -math.inf).all()
    assert (scorer(torch.ones(2, 3, 32, 32)) == -math.inf).all()


def test_the_classifiers_scores():
    net, x = pixel_classifier("small_conv").eval(), TASK.sample(5, 0)[0]
    p = by_classifier(net, 2)(x)
    assert torch.allclose(p, net(x).softmax(1)[:, 2]) and not p.requires_grad


@pytest.mark.parametrize("kw,error", [(dict(n=0), ValueError), (dict(n=1.5), TypeError), (dict(steps=0), ValueError),
                                      (dict(eta=2.), ValueError)])
def test_what_cannot_be_is_refused(kw, error):
    with pytest.raises(error): keep(net(), brightness, -9., **kw)
    with pytest.raises(error): best_of(net(), brightness, **kw)
