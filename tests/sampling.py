"""Measure what nfe, eta, clipping and the scheduler do to a shipped model's images: `make sampling` (python tests/sampling.py).

Writes results/sampling/sampling.csv, one line per setting: the report's rows with 95 % intervals, floor and chance, and the paired
difference of rule_gap to 50 network evaluations with eta 1 (the same rows, the same resamples). The file is written whole after every setting, and
a setting that stands in it is not measured again (--again measures all), so the command may be stopped at any time.
"""
import argparse
import csv
import io
import sys
import time
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch

from rulediff_nb.core import range_known
from rulediff_nb.grid import report_columns
from rulediff_nb.metrics import Measured, bootstrap, gap, interval, measure, real_images, rule_report, statistics
from rulediff_nb.sample import ddim, load_pretrained, sample
from rulediff_nb.store import write_atomic

SCHEMA, SEED = 1, 8
CALLS, ETAS = (5, 10, 20, 50, 100), (0., 1., .5)
OTHERS = ("DDPM", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver", "PNDM", "EulerDiscrete",
          "EulerAncestralDiscrete", "LMSDiscrete")
TWICE = "KDPM2Discrete",   # two calls a step, but for the last; Heun's does not fit the schedule in so few
SHARES = ("readable", "coarse", "rule_gap", "rule_error", "error_px", "spread", "memorized")


class Setting(NamedTuple):
    "One line's sampler."
    task:str
    palette:str
    scheduler:str # DDIM: the package's own
    steps:int     # as given to the scheduler
    eta:float
    clip:bool
    n:int


def settings(tasks, n):
    "All settings in the order in which they are measured: the reference of a task first, what takes longest last."
    def s(task, scheduler, steps, eta=0., clip=True, n=n): return Setting(task, "fixed", scheduler, steps, eta, clip, n)
    def grid(w):
        yield s(w, "DDIM", 50, 1.)
        yield from (s(w, "DDIM", c, e) for e in ETAS for c in CALLS if (c, e) != (50, 1.))
        yield from (s(w, "DDIM", c, e, False) for c in (10, 50) for e in (0., 1.))
    first, rest = tasks[0], [v for w in tasks[1:] for v in grid(w)]
    others = [s(first, o, 20) for o in OTHERS] + [s(first, o, 11) for o in TWICE]
    return [*grid(first), *others, s(first, "DDIM", 1000, 1., n=n//2), *rest, s(first, "DDPM", 1000, n=n//2)]


def scheduler(s, recipe):
    "The scheduler of a line, starting at the last timestep."
    if s.scheduler == "DDIM": return ddim(recipe, s.clip)
    return getattr(diffusers, f"{s.scheduler}Scheduler").from_config(recipe.schedule().config, timestep_spacing="trailing")


def paired(m, ref, real, size, draws=1000):
    "rule_gap of some rows less that of the same rows at the reference, with its interval; (0, 0, 0) for the reference."
    def gaps(m, s0, c):
        s = statistics(m, size)
        return gap(s["rule_error"], s["readable"], s0["rule_error"], s0["readable"], c["rule_error"])
    s0, c = statistics(real.floor, size), statistics(real.chance, size)
    def both(m): return dict(gap=gaps(m, s0, c))
    drawn = bootstrap(m, both, draws)["gap"] - bootstrap(ref, both, draws)["gap"]
    return (gaps(m, s0, c) - gaps(ref, s0, c)).item(), *interval(drawn)


def nfe(s, recipe):
    "How often the network is called: twice a step in some schedulers."
    sch = scheduler(s, recipe)
    sch.set_timesteps(s.steps)
    return len(sch.timesteps)


def version(model):
    "What names the weights of a line: a line of earlier weights is measured again."
    return model.manifest["sha256"][:12]


def line(s, x, of, seconds):
    "One line of the file."
    report, task = rule_report(of.task, x, train=of.train), of.task
    out = dict(schema=SCHEMA, **s._asdict(), nfe=nfe(s, of.model.recipe), weights=version(of.model))
    out |= report_columns(report, SHARES)
    c = report.rows["marginals"]
    d = paired(measure(task, x), Measured(*(v[:len(x)] for v in of.ref)), real_images(task, len(x)), task.size)
    out |= dict(marginals=c.value, marginals_real_high=c.more["real_high"]) | dict(zip(("diff", "diff_low", "diff_high"), d))
    return out | dict(seconds=seconds, seed=SEED)


def to_csv(rows):
    "Lines as text."
    out = io.StringIO()
    w = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    w.writeheader()
    for r in rows: w.writerow({k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()})
    return out.getvalue()


def key(r): return tuple(str(r[k]) for k in Setting._fields[:4]) + (float(r["eta"]), str(r["clip"]), int(r["n"]))


def draw(model, s, batch):
    "The images of a setting, and the seconds that they took."
    start = time.perf_counter()
    return sample(model, s.n, s.steps, s.eta, SEED, scheduler(s, model.recipe), batch), time.perf_counter() - start


class Shipped(NamedTuple):
    "A shipped model and what its images are compared with."
    model:torch.nn.Module
    task:object
    train:torch.Tensor
    ref:Measured # its images at the reference
    x:torch.Tensor # these images
    seconds:float # that they took


def shipped(s, batch):
    "The model of a line, with the reference measured."
    model = load_pretrained(s.task, s.palette)
    task = model.recipe.task
    train = task.sample(model.manifest["images_in_set"], model.manifest["set_seed"])[0]
    x, seconds = draw(model, s, batch)
    return Shipped(model, task, train, measure(task, x), x, seconds)


def lines(jobs, batch, done):
    "Measure the lines that are not done, one after the other."
    reference, at = {}, {}
    for s in jobs:
        if s.task not in reference: reference[s.task] = s
        if key(s._asdict()) in done: continue
        if s.task not in at: at[s.task] = shipped(reference[s.task], batch)
        x, seconds = (at[s.task].x, at[s.task].seconds) if s == reference[s.task] else draw(at[s.task].model, s, batch)
        yield line(s, x, at[s.task], seconds)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n", type=int, default=256, help="images per line; a line of 1000 network evaluations gets half of it")
    p.add_argument("--out", type=Path, default=Path("results/sampling"))
    p.add_argument("--tasks", nargs="*", default=["sun_shadow", "two_squares"],
                   help="the first one gets the other schedulers and 1000 network evaluations too")
    p.add_argument("--batch", type=int, default=128, help="images at a time")
    p.add_argument("--again", action="store_true", help="measure every line again, of the same weights too")
    a = p.parse_args()
    file = a.out/"sampling.csv"
    now = {w: version(load_pretrained(w)) for w in a.tasks}
    old = csv.DictReader(io.StringIO(file.read_text())) if file.exists() and not a.again else []
    rows = {key(r): r for r in old if r["weights"] == now.get(r["task"], r["weights"])}   # tasks not asked for stay

    with range_known():
        for row in lines(settings(a.tasks, a.n), a.batch, set(rows)):
            rows[key(row)] = row
            write_atomic(file, to_csv(list(rows.values())).encode())
            sys.stdout.write(f"{row['task']} {row['scheduler']} {row['nfe']} nfe, eta {row['eta']}, clip {row['clip']}: "
                             f"rule_gap {row['rule_gap']:.3f}, {row['seconds']:.0f} s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
