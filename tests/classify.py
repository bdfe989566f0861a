"""What classifiers know: `make classifiers` (python tests/classify.py).

Trains the pixel classifiers and the guidance classifiers (three seeds of each), and writes results/classifiers/: pixels.csv (accuracy on
clean images), levels.csv (accuracy per timestep and margin, the same scenes for all, beside the bound for known ones),
calibration.csv (of the same classifiers, on the mixture of margins they learned) and regress.csv (what regressors know of log(b/a)).
With --weights FOLDER the networks of seed 0 are stored there with their manifests. A line that stands in a table is not made again
(--again makes all), so the command may be stopped at any time.
"""
import argparse
import os
import sys
import time
from pathlib import Path

import joblib
import torch
from torch.optim.swa_utils import update_bn

from rulediff_nb.classifier import (
    PIXEL,
    PUBLISHED_MARGINS,
    calibration_error,
    calibration_floor,
    classifier,
    classifier_steps,
    contrastive,
    each_class,
    fit_pixels,
    graded_factors,
    timestep_of,
    noised_outputs,
    pixel_classifier,
    right,
    scenes_for,
    split,
    bayes_accuracy,
)
from rulediff_nb.grid import csv_text, read_table
from rulediff_nb.metrics import share_interval
from rulediff_nb.store import save_release, write_atomic
from rulediff_nb.tasks import TASKS, get_task
from rulediff_nb.train import provenance

ROOT = Path(__file__).parents[1]
SIGMAS = .02, .05, .1, .2, .4, .8, 1.6, 3.2, 6.4
MARGINS = 1/16, 1/32, 1/64, 1/128, 1/320   # two pixels to a tenth of one
STUDIED = "sun_shadow", "perspective", "two_circles", "two_squares"


def share(hits):
    "A share with its interval."
    low, high = share_interval(int(hits.sum()), len(hits))
    return dict(accuracy=hits.float().mean().item(), accuracy_low=low, accuracy_high=high, images=len(hits))


def pixel_rows(job):
    "A pixel classifier, trained on four fifths of 2000 images of each class and judged by the rest; also with its batch norm settled."
    task, net, seed = get_task(job["task"], palette=job["palette"]), job["net"], job["seed"]
    x, y = contrastive(task, 2000, seed, PUBLISHED_MARGINS.get(task.name, 1/32))
    mine, rest = split(len(x), seed)
    clf, start = pixel_classifier(net, task.size, seed), time.process_time()
    for _ in fit_pixels(clf, x[mine], y[mine], job["epochs"], batch=64, lr=1e-3, seed=seed): pass
    said = job | dict(cpu_seconds=time.process_time() - start) | share(right(clf, x[rest], y[rest]))
    update_bn(x[mine].split(64), clf)   # nothing, where there is no batch norm
    return [said | dict(accuracy_settled=right(clf, x[rest], y[rest]).float().mean().item())]


def trained(job, kind):
    "A guidance classifier or regressor of a job, and the seconds that its training took."
    task, start = get_task(job["task"], palette=job["palette"]), time.process_time()
    changes = dict(classes=0, conditions=1) if kind == "regressor" else {}
    clf = classifier("laptop", task, job["seed"], **changes)
    for _ in classifier_steps(clf, job["seed"], job["steps"]): pass
    return clf, time.process_time() - start


def fitting(task):
    "The margins of the table that the task has room for, and 900 scenes of which the widest can be drawn."
    for i in range(len(MARGINS)):
        try: return MARGINS[i:], scenes_for(task, 900, 99, MARGINS[i])[0]
        except ValueError: continue
    raise ValueError(f"{task.name} has no room for any margin of {MARGINS}")


def level_rows(job):
    "Accuracy at each timestep and margin, on scenes that the classifier has not seen; and its calibration, as lines of another table."
    clf, seconds = trained(job, "classifier")
    task, rows = clf.recipe.task, []
    margins, base = fitting(task)
    y = torch.arange(900) % 3
    for margin in margins:
        three = each_class(task, base, margin)
        for sigma in SIGMAS:
            p = noised_outputs(clf, three[torch.arange(900), y], timestep_of(sigma, clf.abar), job["seed"]).softmax(1)
            said = job | dict(margin_px=margin*task.size, sigma=sigma, cpu_seconds=seconds)
            rows.append(said | share(p.argmax(1) == y) | dict(bound=bayes_accuracy(three, sigma, 98)))
    return rows, clf


def calibration_rows(clf, job):
    "Calibration on fresh scenes of the mixture of margins that the classifier was trained on."
    task = clf.recipe.task
    x, y = contrastive(task, 300, 97, clf.recipe.margins)
    for sigma in SIGMAS:
        p = noised_outputs(clf, x, timestep_of(sigma, clf.abar), job["seed"]).softmax(1)
        yield job | dict(sigma=sigma, calibration=calibration_error(p, y), calibration_floor=calibration_floor(p)) | share(p.argmax(1) == y)


def regress_rows(job):
    "How much of log(b/a) a regressor knows at each timestep, and whether its deviations are as large as it says."
    clf, seconds = trained(job, "regressor")
    task, rows = clf.recipe.task, []
    f, y = graded_factors(task, 900, 99, clf.recipe.margins)
    x = task.render(f)
    for sigma in SIGMAS:
        mean, log_var = noised_outputs(clf, x, timestep_of(sigma, clf.abar), job["seed"]).chunk(2, 1)
        left = (mean - y).square()
        z = left/log_var.exp()
        said = dict(r2=1 - (left.mean()/y.var()).item(), mean_z2=z.mean().item())
        rows.append(job | dict(sigma=sigma, cpu_seconds=seconds, images=len(x)) | said)
    return rows, clf


def store(clf, job, kind, rows, folder):
    "Write a network with its manifest."
    r = clf.recipe
    def name(v): return f"sigma {v['sigma']:g}" + (f", {v['margin_px']:g} px" if "margin_px" in v else "")
    report = {name(v): v["accuracy" if kind == "classifier" else "r2"] for v in rows}
    about = dict(recipe=r.to_dict(), seed=job["seed"], steps=job["steps"], images=job["steps"]*r.batch, cpu_seconds=rows[0]["cpu_seconds"],
                 measure="accuracy" if r.classes else "r2 of log(b/a)", report=report, **provenance(next(clf.parameters()).device))
    save_release(folder, f"{job['task']}-{job['palette']}-{kind}", clf.state_dict(), about)


MAKE = dict(pixels=pixel_rows, timesteps=level_rows, regress=regress_rows)


def plan(tasks, palettes, seeds, epochs, steps):
    "All jobs, as (table, job); of each seed all before any of the next."
    for s in seeds:
        for w in tasks:
            for p in palettes: yield from ((k, dict(task=w, palette=p, seed=s, steps=steps)) for k in ("timesteps", "regress"))
        yield from (("pixels", dict(task=w, palette="random", net=k, seed=s, epochs=epochs)) for w in STUDIED if w in tasks for k in PIXEL)


def done(table, job, rows): return any(all(str(r.get(k)) == str(v) or r.get(k) == v for k, v in job.items()) for r in rows)


def run(table, job, weights):
    "The rows of a job by table, its network stored if asked."
    torch.set_num_threads(1)
    got = MAKE[table](job)
    if table == "pixels": return dict(pixels=got)
    rows, clf = got
    if weights and job["seed"] == 0: store(clf, job, dict(timesteps="classifier", regress="regressor")[table], rows, weights)
    return dict(timesteps=rows, calibration=list(calibration_rows(clf, job))) if table == "timesteps" else dict(regress=rows)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tasks", nargs="+", default=list(TASKS))
    p.add_argument("--palettes", nargs="+", default=["fixed"])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--tables", nargs="+", default=list(MAKE))
    p.add_argument("--epochs", type=int, default=15, help="of the pixel classifiers")
    p.add_argument("--steps", type=int, default=1000, help="of the guidance classifiers")
    p.add_argument("--workers", type=int, default=os.cpu_count())
    p.add_argument("--weights", help="folder for the networks of seed 0")
    p.add_argument("--again", action="store_true")
    p.add_argument("--out", type=Path, default=ROOT/"results"/"classifiers")
    a = p.parse_args()
    files = {k: a.out/f"{k}.csv" for k in (*MAKE, "calibration")}
    rows = {k: [] if a.again or not f.exists() else read_table(f) for k, f in files.items()}
    work = [(t, j) for t, j in plan(a.tasks, a.palettes, a.seeds, a.epochs, a.steps) if t in a.tables and not done(t, j, rows[t])]
    print(f"{len(work)} trainings", flush=True)
    for got in joblib.Parallel(a.workers, return_as="generator_unordered")(joblib.delayed(run)(t, j, a.weights) for t, j in work):
        for table, new in got.items():
            rows[table] += new
            write_atomic(files[table], csv_text(rows[table]).encode())
            print(table, *(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in new[len(new)//2].items()), flush=True)


if __name__ == "__main__": sys.exit(main())
