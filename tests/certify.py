"""Measure the ruler's certificate: `make certificate` (python tests/certify.py [--n 200] [--out results/certificate]).

Writes certificate.csv (how well known scenes are read under every condition), refusals.csv (what becomes of every fault at every amount)
and brief.npz (images of two networks that were trained for 600 steps only). Each file is written whole or not at all.
"""
import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch

from rulediff_nb.certificate import certify, conditions, refusals, to_csv
from rulediff_nb.core import progress, to_bytes
from rulediff_nb.sample import sample
from rulediff_nb.store import write_atomic
from rulediff_nb.tasks import TASKS
from rulediff_nb.train import train
from rulediff_nb.unet import unet

ALL_TASKS = [t.with_(palette=p) for t in TASKS.values() for p in ("random", "fixed")]


def certificate(n):
    "All lines of the certificate; canvases of 128 pixels get a quarter of the images."
    jobs = [(t, c) for t in ALL_TASKS for c in conditions() if t.palette == "random" or c.kind != "corner colours"]   # no corners there
    return [certify(t, c, n//4 if c.kind == "size" and c.amount == 128 else n) for t, c in progress(jobs, len(jobs), "certificate")]


def all_refusals(n): return [r for t in progress(ALL_TASKS, len(ALL_TASKS), "refusals") for r in refusals(t, n, every=True)]


def brief(n=96, steps=600):
    "Images of networks (laptop with AdamW and all levels of the linear schedule alike) that have hardly learned anything."
    out, file = {}, io.BytesIO()
    how = dict(attention=(False, True, True), optimizer="adamw", lr=2e-3, betas="linear", stratified=False, noise_std=0.,
               posterior_mean=False)
    for name in ("two_circles", "sun_shadow_free"):
        task = TASKS[name]
        model = train(unet("laptop", task, **how), task.sample(task.paper_n, 0)[0], steps)
        x = sample(model, n, steps=40, eta=1., seed=5)
        out[name] = to_bytes(x)
    np.savez_compressed(file, **out)
    return file.getvalue()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n", type=int, default=200, help="images per line; a line on faults gets three tenths of it")
    p.add_argument("--out", type=Path, default=Path("results/certificate"))
    p.add_argument("--only", choices=("certificate", "refusals", "brief"), help="one file")
    a = p.parse_args()
    made = {"certificate": ("certificate.csv", lambda: to_csv(certificate(a.n)).encode()),
            "refusals": ("refusals.csv", lambda: to_csv(all_refusals(3*a.n//10)).encode()), "brief": ("brief.npz", brief)}
    for name, (file, make) in made.items():
        if a.only in (None, name): sys.stdout.write(f"{write_atomic(a.out/file, make())}\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
