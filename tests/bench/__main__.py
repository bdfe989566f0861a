"""Ratios, not seconds: `python -m tests.bench [word …]` (make bench) runs every `bench_*` function of the files bench_*.py here.

A benchmark returns (or yields) (what, baseline, candidate): two callables without arguments. Printed: how many times faster the
candidate is than the baseline, the median over interleaved runs, with the range. A fourth value says how many times the candidate does
the baseline's work, so that a millisecond is not timed alone and cold. A `figure_*` function yields lines of text instead:
what has no alternative to be compared with, such as a peak of memory.
"""
import importlib.util
import os
import platform
import statistics
import sys
import time
from pathlib import Path

RUNS, BUDGET = 9, 20.  # runs at most, seconds per benchmark at most


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def ratios(baseline, candidate):
    "Baseline's time over the candidate's, run by run in turns, after one of each to warm up."
    seconds(baseline), seconds(candidate)
    out, end = [], time.monotonic() + BUDGET
    while len(out) < RUNS and (len(out) < 3 or time.monotonic() < end): out.append(seconds(baseline)/seconds(candidate))
    return out


def benches(folder):
    "Every `bench_*` and `figure_*` function, file by file."
    for path in sorted(folder.glob("bench_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        mod = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mod)
        yield from ((path.stem, f) for name, f in vars(mod).items() if name.startswith(("bench_", "figure_")) and callable(f))


def main(words, folder=Path(__file__).parent):
    sys.stdout.write(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}\n")
    count = 0
    for stem, f in benches(folder):
        if words and not any(w in f"{stem}.{f.__name__}" for w in words): continue
        if f.__name__.startswith("figure_"):
            for line in f():
                sys.stdout.write(f"{line}\n")
                count += 1
            continue
        found = f()
        for what, baseline, candidate, *times in [found] if isinstance(found, tuple) else found:
            r, count = [v*(times[0] if times else 1) for v in ratios(baseline, candidate)], count + 1
            sys.stdout.write(f"{statistics.median(r):8.2f}x  ({min(r):.2f} to {max(r):.2f}, {len(r)} runs)  {what}\n")
    if not count: sys.stdout.write("no benchmarks\n")


if __name__ == "__main__": main(sys.argv[1:])
