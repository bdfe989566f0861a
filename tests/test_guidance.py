"The studies of guidance and filters: what they choose, compare and count, on lines that are made up; that they keep to their tables."
import math

import pandas as pd
import pytest
import torch

from rulediff_nb import guide
from rulediff_nb.classifier import ShippedClassifier, TrainedClassifier, classifier
from rulediff_nb.filter import FILTERS, POOL, Pool, filtered_rows
from rulediff_nb.guide import (
    CLASSIFIED,
    CONTROLS,
    DECIDING,
    EVERY,
    STUDIED,
    SWEPT_ONLY,
    TRIED,
    WHEN,
    CleanGuidance,
    ClassifierGuidance,
    Labelled,
    Oracle,
    RegressorGuidance,
    Setting,
    ShuffledGuidance,
    best_settings,
    compared,
    half_pixel_accuracy,
)
from rulediff_nb.store import load_tensors
from rulediff_nb.study import Shipped, row_key, run_study
from rulediff_nb.table import KEPT, Study, Work, find_study, results
from rulediff_nb.tasks import get_task

CPU = torch.device("cpu")
TINY = dict(steps=2, n=4, changes=(("channels", (16, 16)), ("attention", (False, False)), ("head_dim", 8)))


def row(method, scale, gap, seed=100, when="all", gradients=24., **more):
    said = dict(task="two_squares", palette="fixed", method=method, scale=scale, when=when, seed=seed, images=8, steps=25, rule_gap=gap)
    return said | dict(gradients=gradients, cpu_seconds=2., marginals=.05, marginals_real_high=.07) | more


SWEPT = [row("none", 0., .3, gradients=0.), row("classifier", 1., .2), row("classifier", 4., .1, when="high"), row("oracle", 1., .05),
         row("shuffled labels", 2., .29), row("classifier-free", 0., .01, gradients=0.), row("classifier-free", 2., .2, gradients=0.),
         row("classifier, 250 steps", 2., .02)]


def test_best_settings_are_those_of_the_sweep():
    got = best_settings(pd.DataFrame(SWEPT), "two_squares")
    assert sorted(got) == sorted([("classifier", 4., "high"), ("oracle", 1., "all"), ("shuffled labels", 4., "high"),
                                  ("classifier-free", 2., "all")])   # not scale 0, which extrapolates nothing; controls as the classifier
    assert not best_settings(pd.DataFrame(SWEPT), "two_circles") and not best_settings(pd.DataFrame(SWEPT), "two_squares", "random")


def test_a_setting_that_guides_no_step_is_never_the_best():
    lines = [*SWEPT, row("classifier", 9., .01, when="last_100", gradients=0.)]
    assert ("classifier", 4., "high") in best_settings(pd.DataFrame(lines), "two_squares")


@pytest.mark.parametrize("beyond", [.2, math.nan])
def test_where_the_best_fails_the_marginals_gate_the_best_that_passes_is_measured_too(beyond):
    rows = [row("none", 0., .3, gradients=0., marginals=.09), row("classifier", 2., .2, marginals=.08),
            row("classifier", 4., .1, marginals=beyond), row("classifier", 1., .25), row("shuffled labels", 2., .29),
            row("oracle", 1., .05, marginals=beyond)]
    both = [("classifier", 4., "all"), ("classifier", 2., "all")]
    got = best_settings(pd.DataFrame(rows), "two_squares")
    assert got == [*both, ("oracle", 1., "all"), *(("shuffled labels", *s[1:]) for s in both)]   # no other oracle was tried


def test_the_order_of_the_stored_lines_does_not_matter():
    swept = results("sweep")
    other = swept.sample(frac=1, random_state=0)
    for task in STUDIED: assert best_settings(swept, task) == best_settings(other, task)


def test_gains_are_shares_of_the_oracle_s_on_the_same_images():
    rows = [row("none", 0., .3, 1), row("classifier", 4., .2, 1, cpu_seconds=3.), row("oracle", 1., .1, 1), row("oracle", 2., .2, 1),
            row("classifier", 4., .2, 2)]
    got = compared(pd.DataFrame(rows, index=[7, 3, 3, 1, 0]))
    assert list(got.relative[:4]) == [1., 1.5, 1., 1.] and math.isnan(got.relative.iloc[4]) and math.isnan(got.of_oracle.iloc[4])
    assert torch.allclose(torch.tensor(got.of_oracle.tolist()[:4]), torch.tensor([0., .5, 1., .5]))
    far = compared(pd.DataFrame(rows[:2]), pd.DataFrame([row("oracle", 1., .1, 1, cpu_seconds=9.), row("oracle", 1., .0, 2)]))
    assert list(far.relative) == [1., 1.5] and abs(far.of_oracle.iloc[1] - .5) < 1e-12


@pytest.mark.parametrize("name", ["sweep", "guidance", "filters"])
def test_stored_columns_that_compare_are_those_of_today(name):
    df = results(name)
    again = find_study(name).finish(df.assign(relative=0., of_oracle=0.))
    assert list(again) == list(df) and df.of_oracle.notna().all()
    for k in ("relative", "of_oracle"): assert again[k].tolist() == pytest.approx(df[k].tolist(), abs=1e-4)


def test_filters_choose_among_the_pool():
    x = torch.arange(16.).view(16, 1, 1, 1).expand(16, 3, 2, 2)
    scorers = {"filter: verdict": lambda x: (x[:, 0, 0, 0] % 3 == 0).float(),
               "filter: ruler, best of": lambda x: -(x[:, 0, 0, 0] - 5).abs()}
    none, verdict, two, four = (filtered_rows(method, scale, scorers.get(method), x, 4) for method, scale in FILTERS)
    assert none[0].tolist() == [0, 1, 2, 3] and none[1] == 4
    assert verdict[0].tolist() == [0, 3, 6, 9] and verdict[1] == 10
    assert two[0].tolist() == [1, 3, 5, 6] and two[1] == 8 and four[0].tolist() == [3, 5, 8, 12] and four[1] == 16
    with pytest.raises(RuntimeError, match="raise POOL"): filtered_rows(*FILTERS[1], scorers["filter: verdict"], x, 8)


@pytest.mark.parametrize("name", ["sweep", "guidance", "filters"])
def test_a_plan_is_its_table(name):
    rows, df = find_study(name).plan(False), results(name)
    lines = 4 if name == "filters" else 1
    stored = list(df[list(rows[0]._fields)].itertuples(index=False, name=None))
    assert {tuple(r) for r in rows} == set(stored) and len(rows)*lines == len(stored)
    assert len({row_key(find_study(name), r) for r in rows}) == len(set(rows)) == len(rows)


def test_seeds_of_the_table_are_not_those_of_the_sweep_nor_of_the_shipped_networks():
    swept, final = ({r.seed for r in find_study(k).plan(False)} for k in ("sweep", "guidance"))
    assert not swept & final and 0 not in final
    assert {(r.images, r.seed) for r in find_study("filters").plan(False)} == {(256, 100), (1024, 1), (1024, 2), (1024, 3)}


def test_every_method_can_be_made():
    others = {"none", "oracle", "classifier-free"}
    assert {m for m, *_ in TRIED} == set(CLASSIFIED) | others and {w for *_, w in TRIED} <= set(WHEN)
    assert set(CONTROLS) | set(CONTROLS.values()) | set(SWEPT_ONLY) <= set(CLASSIFIED) and set(EVERY) <= set(STUDIED)
    assert {r.method for r in find_study("sweep").plan(False) if r.task not in EVERY} == set(DECIDING)


def setting(method, seed=100, images=256): return Setting("two_squares", "fixed", method, 2., "all", seed, images, 25)


@pytest.mark.parametrize("method,network", [
    ("classifier", ShippedClassifier("two_squares")), ("shuffled pixels at x0_hat", ShippedClassifier("two_squares")),
    ("regressor", ShippedClassifier("two_squares", role="regressor")), ("shuffled labels", TrainedClassifier("two_squares", shuffled=True)),
    ("classifier, 250 steps", TrainedClassifier("two_squares", steps=250)),
    ("classifier, 4000 steps, at x0_hat", TrainedClassifier("two_squares", steps=4000)), ("oracle", None), ("none", None)])
def test_what_is_trained_for_a_setting(method, network):
    swept, final = find_study("sweep").needs(setting(method)), find_study("guidance").needs(setting(method, 3, 1024))
    assert swept == (Shipped("two_squares"), *[network]*(network is not None))
    own = () if network is None else (TrainedClassifier("two_squares", seed=3, **{k: getattr(network, k) for k in ("role", "steps", "shuffled")
                                                                                    if hasattr(network, k)}),)
    assert final == (Shipped("two_squares"), *own)
    assert find_study("sweep").needs(setting("classifier-free")) == (Labelled("two_squares"),)


def test_the_guidance_of_a_method():
    task = get_task("two_squares")
    small = dict(channels=(8, 8), attention=(False, False), width=8)
    clf, reg = classifier("laptop", task, **small), classifier("laptop", task, classes=0, conditions=1, **small)
    def made(method, net=clf): return guide._guidance_of(setting(method), task, net)
    assert made("none", None) is made("classifier-free", None) is None
    assert type(made("oracle", None)) is Oracle and type(made("regressor", reg)) is RegressorGuidance
    for method in CLASSIFIED:
        if method == "regressor": continue
        g = made(method)
        assert isinstance(g, ShuffledGuidance) == method.startswith("shuffled pixels")
        if isinstance(g, ShuffledGuidance): assert g.seed == 100
        inner = g.guidance if isinstance(g, ShuffledGuidance) else g
        assert type(inner) is (CleanGuidance if "x0_hat" in method else ClassifierGuidance) and inner.clf is clf
    assert math.isnan(half_pixel_accuracy(reg)) and math.isnan(half_pixel_accuracy(None)) and 0 < half_pixel_accuracy(clf, 90) < 1


def test_a_labelled_denoiser_is_trained_once_and_resumes(tmp_path):
    need = Labelled("two_squares", **TINY)
    assert need.weights(tmp_path) == ""
    steps = need.train(tmp_path, CPU)
    assert next(steps) == 1
    steps.close()   # stopped
    assert need.weights(tmp_path) == "" and list(need.train(tmp_path, CPU)) == [2] and not list(need.train(tmp_path, CPU))
    model = need.load(tmp_path, CPU)
    meta = load_tensors(next(tmp_path.rglob("weights.safetensors")))[1]
    assert model.recipe.classes == 3 and model.recipe.label_drop == .1 and not model.training and meta["images_in_set"] == 12
    assert list(need.train(tmp_path/"other", CPU)) == [1, 2]
    whole = need.load(tmp_path/"other", CPU).state_dict()
    assert all(torch.equal(v, whole[k]) for k, v in model.state_dict().items())   # a stop changes nothing
    keys = {need._replace(**c).key for c in ({}, dict(n=5), dict(seed=1), dict(steps=3), dict(palette="random"), dict(task="two_circles"))}
    assert len(keys) == 6


@pytest.mark.parametrize("need,word", [
    (dict(task="moon"), "unknown task 'moon'"), (dict(palette="blue"), "palette must be"), (dict(steps=0), "steps must be in"),
    (dict(n=0), "n must be in"), (dict(seed=-1), "seed must be in"), (dict(changes=(("wings", 1),)), "wings"),
    (dict(changes=(("classes", 4),)), "multiple values .*'classes'"), (dict(changes=(("patch", 3),)), "size must be a multiple of 12"),
    (dict(changes=(("precision", "fp16"),)), "fp16 does not train on a CPU"), (dict(changes=(("conditions", 1),)), "class labels or conditions"),
    (dict(changes=(("betas", "zero_snr"), ("prediction", "epsilon"), ("sigma_data", 0.))), "epsilon cannot be predicted"),
    (dict(changes=(("channels", (16, 16)), ("attention", (False, False)))), "the last of channels must be at least head_dim")])
def test_a_labelled_denoiser_that_cannot_be_is_refused_before_any_work(need, word, tmp_path):
    need = Labelled(**dict(task="two_squares", **TINY) | need)
    with pytest.raises((ValueError, TypeError), match=word): need.check(CPU)
    study = Study("none", "", lambda quick: [setting("none")], lambda row, work: {}, lambda row: (Labelled("two_squares", **TINY), need))
    with pytest.raises((ValueError, TypeError), match=word): list(run_study(study, tmp_path/"r", workers=1))
    assert not list(tmp_path.glob("trained/*"))
    Labelled("two_squares", **TINY).check(CPU)


@pytest.mark.parametrize("name", ["sweep", "guidance", "filters"])
def test_a_quick_run_has_the_columns_of_the_table(name, tmp_path):
    done = list(run_study(name, tmp_path/"run", quick=True, workers=1))
    assert {d.state for d in done} <= {"measured", "trained"}, [d.error for d in done]
    df, stored = results(name, tmp_path/"run"), results(name)
    assert set(df) == set(stored) and set(KEPT) <= set(df)
    first = find_study(name).plan(True)[0]
    assert not set(find_study(name).plan(True)) & set(find_study(name).plan(False)) and tuple(df[list(first._fields)].iloc[0]) == tuple(first)
    assert (df.nfe >= df.steps).all() and df[["cpu_seconds", "rule_gap", "relative"]].notna().all().all()
    if name == "filters": assert df.method.tolist() == [m for m, _ in FILTERS] and df.nfe.iloc[3] == POOL*df.steps.iloc[3]
    else: assert (df.gradients > 0).tolist() == [m not in ("none", "classifier-free") for m in df.method]


def test_filters_choose_among_the_images_that_guidance_starts_from():
    pool, same = Pool("two_squares", "fixed", 1, 8, 2), Setting("two_squares", "fixed", "none", 0., "all", 1, 8, 2)
    model = (Shipped("two_squares").load(None, CPU),)
    none, *kept = find_study("filters").measure(pool, Work(model, CPU))
    unguided = find_study("sweep").measure(same, Work(model, CPU))
    images = [k for k in unguided if k not in ("cpu_seconds", "nfe", "gradients", "knows")]
    assert len(images) > 60 and all(none[k] == pytest.approx(unguided[k], abs=1e-5, nan_ok=True) for k in images if unguided[k] is not None)
    assert any(k["rule_error"] != none["rule_error"] for k in kept)
