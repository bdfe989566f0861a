"""The recipe study: what each choice gives at equal time (make recipes).

The base is what the preset `laptop` was when most of it was measured: targets of drawn images, slightly more noise. Each recipe changes
one thing of it; the last two change only what lies between the base and the preset, so the very last is the preset.

Writes results/recipes/recipes.csv. Runs stand in runs/recipes: a study that was stopped goes on where it stood.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import torch

from rulediff_nb.grid import grid_table, jobs, pace, run_grid, stored_rows
from rulediff_nb.store import write_atomic
from rulediff_nb.unet import unet

ROOT = Path(__file__).parents[1]
COST = "batch", "optimizer", "attention", "patch", "channels", "layers", "precision", "ema", "posterior_mean"
TASKS = "two_circles", "sun_shadow_free"
BASE = dict(posterior_mean=False, noise_mean=.7)
CHANGES = [BASE | c for c in [
    {},
    dict(noise_std=0.), dict(stratified=False), dict(noise_mean=-1.2, noise_std=1.2), dict(noise_mean=0.), dict(noise_mean=1.2),
    dict(betas="linear"), dict(betas="zero_snr"), dict(noise_std=0., min_snr=5.),
    dict(prediction="epsilon", sigma_data=0.), dict(prediction="sample", sigma_data=0.), dict(sigma_data=0.),
    dict(optimizer="adamw", lr=2e-3), dict(optimizer="adamw", lr=1e-3), dict(lr=2e-3), dict(lr=1e-2), dict(decay=False),
    dict(ema=0.), dict(batch=16), dict(batch=64),
    dict(attention=(False, False, True)), dict(attention=(False, False, False)),
    dict(patch=1), dict(patch=4), dict(channels=(48, 48, 96)), dict(channels=(96, 96, 144)), dict(layers=2), dict(precision="fp32")]]
CHANGES += [dict(posterior_mean=False), dict(posterior_mean=True)]


def paces(changes, rounds=3):
    "Processor seconds per step of each recipe, the median of rounds in which all take turns."
    seen = [[pace(unet("laptop", TASKS[0], **c), 6) for c in changes] for _ in range(rounds)]
    return [sorted(p)[rounds//2] for p in zip(*seen)]


def cost(change):
    "What of a change decides how long a step takes: recipes that share it share their pace."
    return json.dumps({k: v for k, v in change.items() if k in COST and (k, v) not in (("optimizer", "muon"), ("posterior_mean", False))})


def known_paces(changes, path):
    "The paces of this study's folder, measured once: a study that goes on keeps its lengths."
    old = json.loads(path.read_text()) if path.exists() else {}
    new = {cost(c): c for c in changes if cost(c) not in old}
    if new: write_atomic(path, json.dumps(old | dict(zip(new, paces(new.values()))), indent=1).encode())
    old = json.loads(path.read_text())
    return [old[cost(c)] for c in changes]


def study(seconds, seeds, palette, changes, path):
    "Jobs of equal processor time, all recipes with the first seed before any with the second."
    steps = [max(round(seconds/p), 1) for p in known_paces(changes, path)]
    return [j for s in seeds for c, k in zip(changes, steps) for j in jobs(TASKS, [palette], changes=[c], steps=[k], seeds=[s])]


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--seconds", type=float, default=120., help="processor seconds per run, on one thread")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    p.add_argument("--palette", default="random")
    p.add_argument("--workers", type=int, default=os.cpu_count())
    p.add_argument("--images", type=int, default=128, help="images per report")
    p.add_argument("--only", type=int, nargs="+", help="numbers of the changes, from 0; all without it")
    a = p.parse_args()
    torch.set_num_threads(1)
    folder = ROOT/"runs"/"recipes"
    folder.mkdir(parents=True, exist_ok=True)
    plan = study(a.seconds, a.seeds, a.palette, [CHANGES[i] for i in a.only or range(len(CHANGES))], folder/f"pace-{a.palette}.json")
    print(f"{len(plan)} runs of about {a.seconds:.0f} s", flush=True)
    for row in run_grid(plan, folder, a.workers, images=a.images):
        said = row.get("error") or f"mse_100 {row['mse_100']:.5f}, readable {row['readable']:.3f}, rule_gap {row['rule_gap']:.3f}"
        print(row["task"], row["label"], row["seed"], said, flush=True)
    write_atomic(ROOT/"results"/"recipes"/"recipes.csv", grid_table(stored_rows(folder)).encode())


if __name__ == "__main__": sys.exit(main())
