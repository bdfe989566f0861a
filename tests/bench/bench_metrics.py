"Many samples at once: the bootstrap against a loop over resamples, distances against a loop over scipy."
import torch
from scipy import stats

from rulediff_nb.core import row_generator
from rulediff_nb.gates import ks_distance
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


def bench_distance():
    torch.set_num_threads(1)
    x, y = torch.from_numpy(row_generator(0, 2).random((2, 200, N)))
    what = f"Kolmogorov-Smirnov distance of 200 pairs of {N}: scipy.stats.ks_2samp one by one -> ks_distance"
    return what, lambda: [stats.ks_2samp(a, b, method="asymp").statistic for a, b in zip(x.numpy(), y.numpy())], lambda: ks_distance(x, y)
