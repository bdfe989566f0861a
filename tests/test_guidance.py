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
    DENOISERS,
    EVERY,
    IMAGES,
    REPEATED,
    SEEDS,
    STUDIED,
    SWEPT_ONLY,
    TRIED,
    WHEN,
    CleanGuidance,
    ClassifierGuidance,
    Labelled,
    Oracle,
    OtherGuidance,
    RegressorGuidance,
    Setting,
    ShuffledGuidance,
    best_settings,
    compared,
    denoiser_of,
    half_pixel_accuracy,
    over_denoisers,
    same_recipe,
    training_of,
)
from rulediff_nb.sample import WEIGHTS, load_pretrained
from rulediff_nb.store import load_manifest, load_tensors
from rulediff_nb.study import Denoiser, Shipped, outdated, row_key, run_study
from rulediff_nb.table import KEPT, Study, Work, find_study, results
from rulediff_nb.tasks import get_task

CPU = torch.device("cpu")
TINY = dict(steps=2, n=4, changes=(("channels", (16, 16)), ("attention", (False, False)), ("head_dim", 8)))


def row(method, scale, gap, seed=100, when="all", gradients=24., **more):
    said = dict(task="two_squares", palette="fixed", method=method, scale=scale, when=when, seed=seed, images=8, steps=25, denoiser=0)
    return said | dict(rule_gap=gap, gradients=gradients, cpu_seconds=2., marginals=.05, marginals_bound=.07) | more


def current(name):
    "A table whose lines are of today's plan; else the test says why it says nothing."
    if said := outdated(name): pytest.skip(said)
    return results(name)


def steers(method): return [m for m, of in CONTROLS.items() if of == method]


SWEPT = [row("none", 0., .3, gradients=0.), row("classifier", 1., .2), row("classifier", 4., .1, when="high"), row("oracle", 1., .05),
         row("shuffled labels", 2., .29), row("classifier-free", 0., .01, gradients=0.), row("classifier-free", 2., .2, gradients=0.),
         row("classifier, 250 steps", 2., .02)]


def test_best_settings_are_those_of_the_sweep():
    got = best_settings(pd.DataFrame(SWEPT), "two_squares")
    assert sorted(got) == sorted([("classifier", 4., "high"), ("oracle", 1., "all"), ("classifier-free", 2., "all"),
                                  *((m, 4., "high") for m in steers("classifier"))])   # not scale 0, which extrapolates nothing
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
    assert got[:3] == [*both, ("oracle", 1., "all")]   # no other oracle was tried
    assert set(got[3:]) == {(m, *s[1:]) for s in both for m in steers("classifier")}


def test_each_line_is_held_against_its_own_bound():
    rows = [row("none", 0., .3, gradients=0.), row("oracle", 1., .1, marginals=.08), row("oracle", 2., .2, marginals=.08, marginals_bound=.09)]
    assert best_settings(pd.DataFrame(rows), "two_squares") == [("oracle", 1., "all"), ("oracle", 2., "all")]
    rows[1]["marginals_bound"] = .09
    assert best_settings(pd.DataFrame(rows), "two_squares") == [("oracle", 1., "all")]


@pytest.mark.parametrize("own,said,both", [(math.nan, "joint", True), ("joint", "joint", False), ("joint", "joint memorized", True),
                                           ("joint", math.nan, False), (math.nan, math.nan, False)])
def test_a_flag_that_no_guidance_does_not_have_is_not_eligible(own, said, both):
    rows = [row("none", 0., .3, gradients=0., flags=own), row("oracle", 1., .1, flags=said), row("oracle", 2., .2, flags=own)]
    assert best_settings(pd.DataFrame(rows), "two_squares") == [("oracle", 1., "all"), ("oracle", 2., "all")][:1 + both]


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
    other = compared(pd.DataFrame([rows[0], rows[1] | dict(denoiser=1)]))
    assert math.isnan(other.relative.iloc[1]), "another denoiser draws other images"


def test_new_flags_are_those_that_no_guidance_does_not_have_from_the_same_noise():
    rows = [row("none", 0., .3, 1, flags="joint"), row("none", 0., .3, 2, flags=math.nan), row("oracle", 1., .1, 1, flags="marginals joint"),
            row("oracle", 1., .1, 2, flags="marginals joint"), row("oracle", 1., .1, 1, flags=math.nan), row("oracle", 1., .1, 3, flags="joint")]
    got = compared(pd.DataFrame(rows)).new_flags
    assert list(got[:5]) == ["", "", "marginals", "joint marginals", ""] and pd.isna(got.iloc[5])


def nine(method, gaps, **more):
    return [row(method, 1., gap, seed, denoiser=k, **{a: b[3*k + s] for a, b in more.items()})
            for k in DENOISERS for s, seed in enumerate(SEEDS) for gap in [gaps[3*k + s]]]


def test_denoisers_are_compared_mean_with_mean_and_worst_with_worst():
    zero = dict(diff=[0.]*9, diff_low=[0.]*9, diff_high=[0.]*9, same=[True]*9, new_flags=[""]*9)
    some = dict(diff=[-.1]*9, diff_low=[-.2]*7 + [.01, -.1], diff_high=[-.05]*7 + [.03, .1], same=[False]*8 + [True],
                new_flags=["joint", math.nan, *[""]*7])
    lines = [*nine("none", [.2, .3, .4]*3, **zero), *nine("oracle", [.1]*8 + [.5], **some)]
    alone = [k | dict(method="regressor") for k in lines if k["method"] == "oracle" and not k["denoiser"]]
    filtered = [row("filter", 4., .1, 1, new_flags="")]   # chosen among others: no pairs
    df = over_denoisers(pd.DataFrame([*lines, *alone, *filtered])).set_index("method")
    got = df.loc["oracle"]
    assert (got.points, got.denoisers, got.below, got.above, got.same, got.flagged) == (9, 3, 7, 1, 1, 1)
    assert got["mean"] == pytest.approx(1.3/9) and (got.best, got.worst) == (.1, .5) and got["diff"] == pytest.approx(-.1)
    assert got.mean_gain == pytest.approx(.3 - 1.3/9) and got.worst_gain == pytest.approx(.4 - .5), "not the worst against a mean"
    assert (df.loc["regressor"].points, df.loc["regressor"].denoisers) == (3, 1) and df.loc["regressor"].worst_gain == pytest.approx(.3)
    assert df.loc["filter"].none_mean == pytest.approx(.2) and math.isnan(df.loc["filter"].below), "the same points, and no pairs"


def test_the_deciding_methods_have_three_denoisers(monkeypatch):
    tried = [(m, s, g, f) for m in dict.fromkeys(m for m, *_ in TRIED[1:]) for s, g, f in ((8., .1, "joint"), (2., .2, ""))]
    swept = [row(m, s, g, task=t, flags=f, gradients=24.*(m != "none")) for t in STUDIED for m, s, g, f in [("none", 0., .3, ""), *tried]]
    monkeypatch.setattr(guide, "results", lambda name: pd.DataFrame(swept))
    plan = guide._final(False)
    assert len(set(plan)) == len(plan) and {r.images for r in plan} == {IMAGES} and len(REPEATED) <= 8
    for task in EVERY:
        for seed in SEEDS:
            for k in DENOISERS[1:]:
                here = {r.method: r.scale for r in plan if (r.task, r.seed, r.denoiser) == (task, seed, k)}
                assert here == {m: 2.*(m != "none") for m in REPEATED}, "one setting each, the eligible one"
                shipped = {(r.method, r.scale) for r in plan if (r.task, r.seed, r.denoiser) == (task, seed, 0)}
                assert set(here.items()) < shipped and {m for m, _ in shipped} == {m for m, *_ in TRIED} - set(SWEPT_ONLY)
    assert all(r.denoiser == 0 and r.method in DECIDING for r in plan if r.task not in EVERY)


def test_other_denoisers_are_trained_as_the_shipped_one():
    for task in EVERY:
        m, need = load_manifest(WEIGHTS, f"{task}-fixed"), same_recipe(task, "fixed", 2)
        assert need.recipe().to_dict() == m["recipe"] and (need.steps, need.n, need.seed) == (m["steps"], m["images_in_set"], 2)
        assert need.key != same_recipe(task, "fixed", 1).key


def test_a_recipe_that_is_no_preset_is_kept(monkeypatch):
    m = load_manifest(WEIGHTS, "two_circles-fixed")
    monkeypatch.setattr(guide, "load_manifest", lambda *a: m | dict(steps=7, recipe=m["recipe"] | dict(lr=.001, channels=[64, 64, 48])))
    need = same_recipe("two_circles", "fixed", 1)
    assert need.steps == 7 and need.recipe().lr == .001 and list(need.recipe().channels) == [64, 64, 48] and need.key


def test_the_denoiser_of_a_row_and_what_it_was_trained_on():
    task, full = get_task("two_squares"), setting("none", images=256)
    assert denoiser_of(full) == Shipped("two_squares") and training_of(full, task) is None
    need = denoiser_of(full._replace(denoiser=2))
    assert need == same_recipe("two_squares", "fixed", 2)
    factors = training_of(full._replace(denoiser=2), task)
    assert torch.equal(task.render(factors), need.images()), "the report's memorized is about the set that it was trained on"
    small = denoiser_of(full._replace(denoiser=1, images=16))
    assert isinstance(small, Denoiser) and small.steps == 2 and small.seed == 1 and training_of(full._replace(images=16), task).shape[0] == 64


def test_rows_are_paired_with_the_unguided_images_of_their_own_denoiser_and_noise(monkeypatch):
    model, bare = load_pretrained("two_squares"), setting("none", 1, 16)._replace(scale=0., steps=2)
    guide._unguided.cache_clear()
    drawn = []
    monkeypatch.setattr(guide, "sample", lambda m, n, steps, seed=0, **kw: (drawn.append(seed), task.sample(n, seed)[0])[1])
    task = model.recipe.task
    off = task.sample(16, 1, violate="up", margin=1/16)[0]
    guided_row = bare._replace(method="oracle", scale=2.)
    got = guide._paired(guided_row, model, off)
    assert got["diff_low"] > 0 and not got["same"], "worse than the rule-abiding images of seed 1"
    again = guide._paired(guided_row._replace(when="below_1"), load_pretrained("two_squares"), task.sample(16, 1)[0])
    assert again["diff"] == 0 and drawn == [1], "drawn once, for every network of the same weights"
    guide._paired(guided_row._replace(seed=2), model, off)
    with torch.no_grad(): next(model.parameters()).add_(1.)
    guide._paired(guided_row, model, off)
    assert drawn == [1, 2, 1], "other noise and other weights are drawn anew"
    assert guide._paired(bare, model, off)["diff"] == 0 and len(drawn) == 3   # a row without guidance is its own partner
    guide._unguided.cache_clear()


@pytest.mark.parametrize("name", ["sweep", "guidance", "filters"])
def test_stored_columns_that_compare_are_those_of_today(name):
    df = current(name)
    again = find_study(name).finish(df.assign(relative=0., of_oracle=0., new_flags=""))
    assert list(again) == list(df) and df.of_oracle.notna().all() and again.new_flags.tolist() == df.new_flags.fillna("").tolist()
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
    rows, df = find_study(name).plan(False), current(name)
    lines = 4 if name == "filters" else 1
    stored = list(df[list(rows[0]._fields)].itertuples(index=False, name=None))
    assert {tuple(r) for r in rows} == set(stored) and len(rows)*lines == len(stored)
    assert len({row_key(find_study(name), r) for r in rows}) == len(set(rows)) == len(rows)


def test_seeds_of_the_table_are_not_those_of_the_sweep_nor_of_the_shipped_networks():
    swept, final = ({r.seed for r in find_study(k).plan(False)} for k in ("sweep", "guidance"))
    assert not swept & final and 0 not in final
    pools = find_study("filters").plan(False)
    assert {(r.images, r.seed) for r in pools} == {(256, 100), *((IMAGES, s) for s in SEEDS)}
    assert {(r.task, r.denoiser) for r in pools} == {(t, 0) for t in STUDIED} | {(t, k) for t in EVERY for k in DENOISERS}


def test_every_method_can_be_made():
    others = {"none", "oracle", "classifier-free"}
    assert set(REPEATED) <= {m for m, *_ in TRIED} == set(CLASSIFIED) | others and {w for *_, w in TRIED} <= set(WHEN)
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
        assert isinstance(g, OtherGuidance) == method.startswith("other image")
        if isinstance(g, ShuffledGuidance): assert g.seed == 100
        inner = g.guidance if isinstance(g, ShuffledGuidance | OtherGuidance) else g
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
    assert set(KEPT) | {"denoiser", "flags", "new_flags", "marginals_bound", "lost", "missed"} <= set(df)
    assert name == "filters" or {"diff", "diff_low", "diff_high", "same"} <= set(df)
    assert set(df) == set(stored) or outdated(name)
    first = find_study(name).plan(True)[0]
    assert not set(find_study(name).plan(True)) & set(find_study(name).plan(False)) and tuple(df[list(first._fields)].iloc[0]) == tuple(first)
    assert (df.nfe >= df.steps).all() and df[["cpu_seconds", "rule_gap", "relative"]].notna().all().all()
    if name == "filters": assert df.method.tolist() == [m for m, _ in FILTERS] and df.nfe.iloc[3] == POOL*df.steps.iloc[3]
    if name == "guidance": assert set(df.denoiser) == {0, 1} and (df[df.method == "none"]["diff"] == 0).all()
    if name != "filters": assert (df.gradients > 0).tolist() == [m not in ("none", "classifier-free") for m in df.method]


def test_filters_choose_among_the_images_that_guidance_starts_from():
    pool, same = Pool("two_squares", "fixed", 1, 8, 2), Setting("two_squares", "fixed", "none", 0., "all", 1, 8, 2)
    model = (Shipped("two_squares").load(None, CPU),)
    none, *kept = find_study("filters").measure(pool, Work(model, CPU))
    unguided = find_study("sweep").measure(same, Work(model, CPU))
    images = [k for k in none if k in unguided and k not in ("cpu_seconds", "nfe", "gradients", "knows", "flags", "marginals_factor")]
    assert len(images) > 60 and none["flags"] == unguided["flags"]
    assert all(none[k] == pytest.approx(unguided[k], abs=1e-5, nan_ok=True) for k in images if unguided[k] is not None)
    assert any(k["rule_error"] != none["rule_error"] for k in kept)
