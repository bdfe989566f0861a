"""What guidance and filters do to the rule: `make guidance` (python tests/guidance.py).

Two stages. `sweep` measures scales and courses at 256 images of one noise seed, with the shipped classifiers, and writes
results/guidance/sweep.csv; `table` takes the best setting of each method from it and measures it at 1024 images of three other seeds,
each with classifiers trained on that seed, and writes results/guidance/table.csv. All at 25 ancestral steps, which were as good as 50
in two tasks (results/sampling). A line that stands in its file is not measured again, so the command may be stopped at any time. What
has to be trained is trained once and kept in runs/guidance.
"""
import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import joblib
import torch

from rulediff_nb.classifier import (
    ClassifierRun,
    RuleClassifier,
    classifier,
    contrastive,
    each_class,
    fit_pixels,
    graded_factors,
    timestep_of,
    load_classifier,
    margins_for,
    noised_outputs,
    pixel_classifier,
    scenes_for,
)
from rulediff_nb.core import range_known, row_generator
from rulediff_nb.filter import best_rows, by_ruler, by_verdict, counting, passing_rows
from rulediff_nb.grid import csv_text, read_table, report_columns
from rulediff_nb.guide import (
    ShuffledGuidance,
    CleanGuidance,
    Oracle,
    RegressorGuidance,
    ClassifierGuidance,
    classifier_free,
    guided,
    interval_scale,
    last_scale,
    rising_scale,
)
from rulediff_nb.metrics import rule_report
from rulediff_nb.sample import WEIGHTS, load_pretrained, sample
from rulediff_nb.store import StoreError, load_release, write_atomic
from rulediff_nb.tasks import TASKS, get_task
from rulediff_nb.train import run_weights, train_steps
from rulediff_nb.unet import unet

ROOT = Path(__file__).parents[1]
RUNS, OUT = ROOT/"runs"/"guidance", ROOT/"results"/"guidance"
STEPS, ETA = 25, 1.
SWEEP, TABLE = (256, (100,)), (1024, (1, 2, 3))   # images, seeds of their noise
COLUMNS = ("readable", "coarse", "rule_error", "rule_gap", "error_px", "within_5", "bias", "spread", "slope", "rho", "r2_rule", "marginals",
           "memorized")
FULL = "sun_shadow_free", "two_circles"   # tasks of which every method is measured; of the others those that decide
DECIDE = "none", "classifier", "classifier at x0_hat", "oracle", "filter: verdict", "filter: ruler, best of"
CONTROLS = {f"shuffled {what}{at}": f"classifier{at}" for at in ("", " at x0_hat") for what in ("labels", "pixels")}
SWEPT_ONLY = "classifier, 250 steps", "classifier, 4000 steps, at x0_hat"   # to compare trainings
POOL = 4   # unguided images drawn for each one asked for: filters choose among them


class Setting(NamedTuple):
    "One line: what guides or scorers, how strongly, and where."
    method:str        # what guides, or what filters
    scale:float       # of the guidance; of a filter: the least score, or candidates per image
    when:str = "all"  # a key of `COURSES`


COURSES = {   # by name: a scale and a recipe -> a scale per level
    "all": lambda s, r: s, "rising": lambda s, r: rising_scale(s, 3.), "rising_late": lambda s, r: rising_scale(s, 3., 2),
    "last_100": lambda s, r: last_scale(s, 100), "high": lambda s, r: interval_scale(s, 1., 100., r),
    "middle": lambda s, r: interval_scale(s, .2, 1., r), "below_1": lambda s, r: interval_scale(s, 0., 1., r)}
GUIDES = [
    *(Setting("classifier", v) for v in (.5, 1., 2., 4., 8., 16.)),
    *(Setting("classifier", v, w) for w in ("below_1", "middle", "high") for v in (2., 8.)),
    *(Setting("classifier", v, w) for w in ("rising", "rising_late") for v in (1., 3.)),
    *(Setting("classifier", v, "last_100") for v in (10., 1e4)),
    *(Setting("classifier at x0_hat", v, w) for v, w in ((1., "below_1"), (4., "below_1"), (16., "below_1"), (64., "below_1"), (4., "all"),
                                                          (16., "all"))),
    *(Setting("regressor", v, w) for v, w in ((.5, "all"), (2., "all"), (8., "all"), (32., "all"), (8., "below_1"))),
    *(Setting("oracle", v, w) for w in ("all", "below_1") for v in (.3, 1., 2.)),
    *(Setting("classifier-free", v) for v in (0., 1., 2., 4., 7.)),
    *(Setting("classifier, 250 steps", v) for v in (2., 8.)), *(Setting("classifier, 4000 steps", v) for v in (2., 8., 16.)),
    *(Setting("classifier, 4000 steps, at x0_hat", v, "below_1") for v in (4., 16.)),
    *(Setting("shuffled labels", v) for v in (2., 8.)), Setting("shuffled labels at x0_hat", 16., "below_1"),
    Setting("shuffled pixels at x0_hat", 16., "below_1"),
    *(Setting("shuffled pixels", v) for v in (2., 8.))]
PULLS = {   # by method: the network it needs, and what pulls
    "classifier": ("classifier", lambda clf, seed: ClassifierGuidance(clf)), "classifier at x0_hat": ("classifier", lambda clf, seed: CleanGuidance(clf)),
    "classifier, 250 steps": ("classifier 250", lambda clf, seed: ClassifierGuidance(clf)),
    "classifier, 4000 steps": ("classifier 4000", lambda clf, seed: ClassifierGuidance(clf)),
    "classifier, 4000 steps, at x0_hat": ("classifier 4000", lambda clf, seed: CleanGuidance(clf)),
    "regressor": ("regressor", lambda clf, seed: RegressorGuidance(clf)), "shuffled labels": ("shuffled", lambda clf, seed: ClassifierGuidance(clf)),
    "shuffled labels at x0_hat": ("shuffled", lambda clf, seed: CleanGuidance(clf)),
    "shuffled pixels": ("classifier", lambda clf, seed: ShuffledGuidance(ClassifierGuidance(clf), seed)),
    "shuffled pixels at x0_hat": ("classifier", lambda clf, seed: ShuffledGuidance(CleanGuidance(clf), seed))}
FILTERS = [Setting("none", 0.), Setting("filter: verdict", 1.), *(Setting("filter: ruler, best of", float(k)) for k in (2, 4))]


def kept(model, folder, x0, steps, seed, y, **kw):
    "Train, or read what an earlier call trained."
    path = RUNS/folder
    try: done = run_weights(path)[0]
    except (StoreError, FileNotFoundError):
        for _ in train_steps(model, x0, path, steps, seed, y=y, **kw): pass
        done = run_weights(path)[0]
    model.load_state_dict(done)
    return model.eval()


def trained_classifier(task, seed, kind):
    "Guidance classifier, regressor, or classifier of labels that mean nothing; of a table's seed, else the shipped one."
    what, _, steps = kind.partition(" ")
    if seed not in TABLE[1]:
        if kind in ("classifier", "regressor"): return load_classifier(task.name, task.palette, kind)
        seed = 0
    clf = classifier("laptop", task, seed, **(dict(classes=0, conditions=1) if what == "regressor" else {}))
    if what == "regressor":
        f, y = graded_factors(task, 1000, seed, clf.recipe.margins)
        x = task.render(f)
    else: x, y = contrastive(task, 1000, seed, clf.recipe.margins)
    if what == "shuffled": y = y[torch.from_numpy(row_generator(seed, 0, stream=5060).permutation(len(y)))]
    folder = f"{task.name}-{task.palette}-{kind.replace(' ', '-')}-{seed}"
    return kept(clf, folder, x, int(steps or 1000), seed, y, kind=ClassifierRun)


def knows(pull):
    "Accuracy of the classifier that pulls on scenes half a pixel off, at a noise (sigma .2) under which the classes can be told apart."
    clf = next((m for m in pull.modules() if isinstance(m, RuleClassifier) and m.recipe.classes), None)
    if not clf: return math.nan
    task, y = clf.recipe.task, torch.arange(900) % 3
    base, _ = scenes_for(task, 900, 99, 1/64)
    three = each_class(task, base, 1/64)
    said = noised_outputs(clf, three[torch.arange(900), y], timestep_of(.2, clf.abar), 0).argmax(1)
    return (said == y).float().mean().item()


def near_misses(task, n, seed):
    "Scenes on the rule and off it by a pixel, or less where that has no room, and their classes."
    return contrastive(task, n, seed, max(m for m in margins_for(task) if m <= 1/32))


def labelled_set(task):
    "What the classifier-free model learns."
    return near_misses(task, 1500, 0)


def conditional(task):
    "A model that is told the class (a tenth of the labels hidden), as many steps trained as the shipped one, on `labelled_set`."
    x, y = labelled_set(task)
    return kept(unet("laptop", task, 0, classes=3, label_drop=.1), f"{task.name}-{task.palette}-labelled", x, 3200, 0, y)


def pixel_judge(task, seed):
    "The study's scorer: a small conv net that saw clean images."
    x, y = near_misses(task, 2000, seed)
    net = pixel_classifier("small_conv", task.size, seed)
    for _ in fit_pixels(net, x, y, 15, 64, 1e-3, seed): pass
    return by_verdict(net)


def pull_of(method, task, seed):
    "What pulls."
    if method == "oracle": return Oracle(task)
    kind, make = PULLS[method]
    return make(trained_classifier(task, seed, kind), seed)


def train(name, palette, kind, seed):
    "Train what a method needs, if it is not there yet."
    torch.set_num_threads(1)
    task = get_task(name, palette=palette)
    _ = conditional(task) if kind == "labelled" else trained_classifier(task, seed, kind)
    return f"{name} {kind} {seed}"


def timed(f):
    "What a call gives and the processor's seconds that it took."
    start = time.process_time()
    got = f()
    return got, time.process_time() - start


def guided_images(s, model, pull, n, seed):
    "One setting's images, and what they cost; without a pull it is classifier-free."
    if pull: drawn_by = guided(model, pull, COURSES[s.when](s.scale, model.recipe))
    else: drawn_by = classifier_free(conditional(model.recipe.task), scale=s.scale)
    with counting(drawn_by) as nfe, counting(drawn_by, type(pull)) as gradients: x = sample(drawn_by, n, STEPS, ETA, seed)
    return x, dict(nfe=nfe[0]/n, gradients=gradients[0]/n)


def chosen(s, x, scorers, n):
    "Which rows of the pool a filter keeps, and how many it had to look at."
    if s.method == "none": return torch.arange(n), n
    if s.method == "filter: verdict":
        rows = passing_rows(scorers[s.method](x), s.scale)[:n]
        if len(rows) < n: raise RuntimeError(f"only {len(rows)} of {len(x)} images pass, {n} are needed: raise POOL")
        return rows, rows[-1].item() + 1
    return best_rows(scorers[s.method](x[:n*int(s.scale)]), int(s.scale)), n*int(s.scale)


def guided_line(model, s, n, seed):
    "The line of one setting of guidance."
    pull = None if s.method == "classifier-free" else pull_of(s.method, model.recipe.task, seed)
    guided_images(s, model, pull, 2, seed)   # warms up
    (x, cost), seconds = timed(lambda: guided_images(s, model, pull, n, seed))
    yield s, x, cost | dict(cpu_seconds=seconds, knows=knows(pull) if pull else math.nan)


def pool_lines(model, n, seed):
    "The lines without guidance: all images, and what filters choose among them."
    task = model.recipe.task
    scorers = {"filter: verdict": pixel_judge(task, seed), "filter: ruler, best of": by_ruler(task)}
    sample(model, 2, STEPS, ETA, seed)
    x, seconds = timed(lambda: sample(model, POOL*n, STEPS, ETA, seed))
    for s in FILTERS:
        (rows, drawn), judging = timed(lambda: chosen(s, x, scorers, n))  # noqa: B023 (called at once)
        yield s, x[rows], dict(nfe=STEPS*drawn/n, gradients=0., cpu_seconds=judging + seconds*drawn/len(x), knows=math.nan)


def lines(name, palette, s, n, seed):
    "One or more lines of a table: of a setting, or (None) of the unguided images and their filters."
    torch.set_num_threads(1)
    model = load_pretrained(name, palette)
    task, out = model.recipe.task, []
    if s and s.method == "classifier-free": train = labelled_set(task)[0]
    else: train = task.sample(model.manifest["images_in_set"], model.manifest["set_seed"])[0]
    for one, x, cost in guided_line(model, s, n, seed) if s else pool_lines(model, n, seed):
        with range_known(): report = rule_report(task, x, train=train)
        said = dict(task=name, palette=palette, **one._asdict(), seed=seed, images=n, steps=STEPS, **cost)
        out.append(said | dict(weights=model.manifest["sha256"][:12]) | report_columns(report, COLUMNS)
                   | dict(marginals_real_high=report.rows["marginals"].more["real_high"]))
    return out


def is_number(v): return isinstance(v, float) and math.isfinite(v)   # what could not be measured is empty in a table


def best(rows, task, palette):
    """Of each method of guidance the setting with the lowest rule_gap in the sweep; the controls take those of what they control.

    Where that one's marginals is beyond what real images and no guidance reach, also the setting with the lowest rule_gap within.
    Of the classifier-free model scales above 1, since up to 1 nothing is pushed.
    """
    here = [r for r in rows if (r["task"], r["palette"]) == (task, palette)]
    reach = [r["marginals_real_high"] for r in here] + [r["marginals"] for r in here if r["method"] == "none"]
    limit = max(filter(is_number, reach), default=0.)
    mine = [r for r in here if r["gradients"] + (r["method"] == "classifier-free")]
    for method in dict.fromkeys(r["method"] for r in mine if r["method"] not in SWEPT_ONLY):
        like = CONTROLS.get(method, method)
        pushed = [r for r in mine if r["method"] == like and (like != "classifier-free" or r["scale"] > 1)]
        ranked = sorted(pushed, key=lambda r: r["rule_gap"])
        within = [r for r in ranked if is_number(r["marginals"]) and r["marginals"] <= limit]
        yield from dict.fromkeys(Setting(method, r["scale"], r["when"]) for r in ranked[:1] + within[:1])


def key(task, palette, s, n, seed): return task, palette, *(s or FILTERS[-1]), n, seed


def compared(rows):
    "Rows with what needs others of the same images: time beside no guidance, and the share of the oracle's gain in rule_gap."
    def like(r, method):
        same = [v for v in rows if v["method"] == method and all(v[k] == r[k] for k in ("task", "palette", "seed", "images"))]
        return min(same, key=lambda v: v["rule_gap"], default=None)
    for r in rows:
        none, oracle = like(r, "none"), like(r, "oracle")
        gain = (none["rule_gap"] - r["rule_gap"])/(none["rule_gap"] - oracle["rule_gap"]) if none and oracle else math.nan
        yield r | dict(relative=r["cpu_seconds"]/none["cpu_seconds"] if none else math.nan, of_oracle=gain)


def shipped(name, palette):
    "The mark of the weights that stand in the package now."
    return load_release(WEIGHTS, f"{name}-{palette}")[1]["sha256"][:12]


def current(rows):
    "Rows of the weights and steps of now; those of others are measured again."
    marks = {(r["task"], r["palette"]): shipped(r["task"], r["palette"]) for r in rows}
    return [r for r in rows if (marks[r["task"], r["palette"]], STEPS) == (r["weights"], r["steps"])]


def measure(jobs, file, workers):
    "Measure the lines that are not in the file yet."
    rows = current(read_table(file)) if file.exists() else []
    there = {key(r["task"], r["palette"], (r["method"], r["scale"], r["when"]), r["images"], r["seed"]) for r in rows}
    todo = [j for j in jobs if key(*j) not in there]
    networks = {(w, p, "labelled", 0) if s.method == "classifier-free" else (w, p, PULLS[s.method][0], seed)
                for w, p, s, _, seed in todo if s and s.method in (*PULLS, "classifier-free")}
    print(f"{file.name}: {len(todo)} of {len(jobs)} jobs to do, with {len(networks)} networks", flush=True)
    for said in joblib.Parallel(workers, return_as="generator_unordered")(joblib.delayed(train)(*v) for v in sorted(networks)):
        print(said, flush=True)
    for new in joblib.Parallel(workers, return_as="generator_unordered")(joblib.delayed(lines)(*j) for j in todo):
        rows += new
        write_atomic(file, csv_text(list(compared(rows))).encode())
        for r in new:
            print(*(r[k] for k in ("task", "method", "scale", "when", "seed")), f"readable {r['readable']:.3f}, rule_gap {r['rule_gap']:.3f}, "
                  f"spread {r['spread']:.3f}, {r['cpu_seconds']:.0f} s", flush=True)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tasks", nargs="+", default=list(TASKS))
    p.add_argument("--palette", default="fixed")
    p.add_argument("--stages", nargs="+", default=["sweep", "table"], choices=["sweep", "table"])
    p.add_argument("--methods", nargs="+", help="only these; without it all in full tasks, and what decides in the others")
    p.add_argument("--seeds", nargs="+", type=int, default=TABLE[1], help="of the table")
    p.add_argument("--workers", type=int, default=os.cpu_count())
    a = p.parse_args()
    for w in a.tasks: get_task(w)
    def wanted(w, s): return s.method in a.methods if a.methods else w in FULL or s.method in DECIDE
    pools = [None] if not a.methods or {s.method for s in FILTERS} & set(a.methods) else []
    tried = [(w, a.palette, s, SWEEP[0], k) for w in a.tasks for k in SWEEP[1] for s in (*pools, *GUIDES) if s is None or wanted(w, s)]
    if "sweep" in a.stages: measure(tried, OUT/"sweep.csv", a.workers)
    if "table" not in a.stages: return
    rows = read_table(OUT/"sweep.csv")
    full = [(w, a.palette, s, TABLE[0], k) for k in a.seeds for w in a.tasks for s in (*pools, *best(rows, w, a.palette))
            if s is None or wanted(w, s)]
    measure(full, OUT/"table.csv", a.workers)


if __name__ == "__main__": sys.exit(main())
