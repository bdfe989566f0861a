"The bootstrap: all resamples at once against a loop over them."
import torch

from rulediff_nb.core import row_generator
from rulediff_nb.metrics import Measured, bootstrap, statistics

N, DRAWS = 256, 500


def made():
    rng = row_generator(0, 0)
    a, noise, got, want = (torch.from_numpy(rng.random(N)) for _ in range(4))
    ok = noise < .9
    return Measured(a + .1, a + .1 + .1*noise, ok, got, want, ok)


def by_loop(m):
    "The same statistics, one resample after another."
    rng = row_generator(0, 1)
    for _ in range(DRAWS):
        order = torch.from_numpy(rng.integers(N, size=N))
        statistics(Measured(*(v[order] for v in m)), 32)


def bench_bootstrap():
    torch.set_num_threads(1)
    m = made()
    return f"{DRAWS} bootstrap resamples of {N} images: loop -> vectorised", lambda: by_loop(m), lambda: (
        bootstrap(m, lambda v: statistics(v, 32), DRAWS))
