"""What time buys: a run is left at certain steps, its averaged weights are measured, and it goes on (make curves).

Writes results/curves/curves.csv, a line per task, recipe and step. Runs stand in runs/curves, named and made like those of
`rulediff train`; a line that is there is not made again, so the command may be stopped at any time.
"""
import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import joblib
import torch

from rulediff_nb.cli import begin
from rulediff_nb.grid import Job, grid_table, job_recipe, measure_run
from rulediff_nb.store import StoreError, load_tensors, write_atomic
from rulediff_nb.tasks import TASKS
from rulediff_nb.train import provenance, run_weights, train_steps
from rulediff_nb.unet import PRESETS, unet

ROOT = Path(__file__).parents[1]
LAPTOP, STUDY = (150, 500, 1200, 3200), (1000, 3000, 6000, 12000, 20000)
PAPER = (500, 1500, 4200)
NETWORK = "preset", "channels", "layers", "attention", "head_dim", "patch", "epochs"   # of the preset `published`: not taken
AS_STUDIED = {k: v for k, v in asdict(PRESETS["published"]).items() if k not in NETWORK and v != getattr(PRESETS["laptop"], k)}


def plan():
    "Each run as a job, and the steps at which it is measured; the longest last."
    def job(task, palette, marks, **changes): return Job(task, palette, "laptop", tuple(changes.items()), marks[-1]), marks
    ablated = [job("sun_shadow_free", "fixed", LAPTOP, posterior_mean=False)]
    return [*(job(t, "fixed", LAPTOP) for t in TASKS), *ablated, *(job(t, "random", PAPER) for t in ("two_circles", "sun_shadow_free")),
            job("sun_shadow_free", "fixed", STUDY, **AS_STUDIED)]


def label(job):
    "The recipe in a word or two: the changes to the published training are too many for a table."
    return "published training, partial" if dict(job.changes) == AS_STUDIED else job.label


def follow(job, marks, out, images):
    "The lines of one run: what is missing of it is trained."
    torch.set_num_threads(1)
    task = job_recipe(job).task
    x0, folder = task.sample(task.paper_n, job.seed)[0], out/job.key
    for mark in marks:
        done = folder/f"at-{mark}.json"
        if not done.exists(): write_atomic(done, json.dumps(line(job, mark, x0, folder, images), indent=1).encode())
        r = json.loads(done.read_text())
        print(f"{r['task']} {r['palette']} {r['label']}, step {mark}: readable {r['readable']:.3f}, rule_gap {r['rule_gap']:.3f}", flush=True)


def line(job, mark, x0, folder, images):
    "Train to a step, if the run is not there yet, and measure it there."
    model, remarks, seed = begin(unet(job.preset, job_recipe(job).task, job.seed, **dict(job.changes)), job.seed, "")
    path = folder/"checkpoint.safetensors"
    if not path.exists() or load_tensors(path)[1]["step"] < mark:
        for s in train_steps(model, x0, folder, job.steps, seed, remarks=remarks):
            if s.step == mark: break   # the step is stored, and the next call goes on from it to the same bits
    weights, about = run_weights(folder, partial=True)
    if about["step"] != mark: raise StoreError(f"{folder} stands at step {about['step']}, beyond {mark}: remove it to begin anew")
    model.load_state_dict(weights)
    said = dict(job._asdict(), steps=mark, length=job.steps, label=label(job), seen=mark*model.recipe.batch, seconds=about["seconds"])
    return said | measure_run(model.eval(), job, images) | provenance(next(model.parameters()).device)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--images", type=int, default=256, help="images per line")
    p.add_argument("--workers", type=int, default=os.cpu_count())
    p.add_argument("--only", type=int, nargs="+", help="numbers of the runs, from 0; all without it")
    a = p.parse_args()
    runs, out = plan(), ROOT/"runs"/"curves"
    work = (joblib.delayed(follow)(*runs[i], out, a.images) for i in a.only or range(len(runs)))
    for _ in joblib.Parallel(a.workers, return_as="generator_unordered")(work): pass
    lines = [json.loads(f.read_text()) for f in out.glob("*/at-*.json")]
    write_atomic(ROOT/"results"/"curves"/"curves.csv", grid_table(lines).encode())


if __name__ == "__main__": sys.exit(main())
