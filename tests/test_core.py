"Rows of noise that belong to their seed, checks of what a caller hands over, figures, sliders under test, exercises."
import io
import math
import re
import sys
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from rulediff_nb import core
from rulediff_nb.core import (
    COLOURS,
    Exercise,
    Panel,
    check_images,
    check_int,
    default_device,
    explore,
    from_bytes,
    mosaic,
    plot_errors,
    plot_panels,
    plot_report,
    plot_rule,
    progress,
    range_known,
    read_grid,
    row_generator,
    row_noise,
    row_uniform,
    save_images,
    show,
    to_8bit,
    to_bytes,
    to_numpy,
)
from tree import modules

torch.set_num_threads(1)
big = st.integers(0, 2**63 - 1)


def first(*key): return row_generator(*key).integers(2**63, size=4).tolist()


# ---------------------------------------------------------------- seeds

@given(big, big, st.integers(0, 100), st.integers(0, 400))
def test_every_part_of_the_key_counts(seed, row, stream, attempt):
    here = first(seed, row, stream, attempt)
    assert here == first(seed, row, stream, attempt)
    others = [first(seed ^ 1, row, stream, attempt), first(seed, row ^ 1, stream, attempt), first(seed, row, stream + 1, attempt),
              first(seed, row, stream, attempt + 1), first(row, seed, stream, attempt) if row != seed else []]
    assert here not in others


def test_streams_seeds_and_rows_share_no_number():
    drawn = [v for seed in (0, 1, 2) for row in range(20) for stream in (0, 1, 20, 21) for attempt in (0, 1)
             for v in row_generator(seed, row, stream, attempt).integers(2**63, size=50).tolist()]
    assert len(set(drawn)) == len(drawn)


def test_neighbouring_seeds_share_no_row():
    a, b = (row_noise(s, range(200), (8,)) for s in (0, 1))
    assert torch.cdist(a, b).min() > .1 and not set(a[:, 0].tolist()) & set(b[:, 0].tolist())


def test_a_long_row_stays_out_of_the_next_stream():
    long = row_generator(3, 5, 0).integers(2**63, size=200_000)
    for key in ((3, 5, 1), (3, 6, 0), (3, 5, 0, 1)): assert not np.isin(row_generator(*key).integers(2**63, size=1000), long).any()


@pytest.mark.parametrize("seed", [np.int64(7), np.int32(7), np.uint8(7), np.uint64(7)])
def test_numpy_seeds_are_taken(seed): assert first(seed, 0) == first(7, 0) and type(check_int(seed, "seed")) is int


@pytest.mark.parametrize("seed,error", [(True, TypeError), (np.bool_(True), TypeError), (1., TypeError), (np.float64(1), TypeError),
                                        ("1", TypeError), (None, TypeError), (torch.tensor(1), TypeError), (-1, ValueError),
                                        (2**63, ValueError), (np.int64(-1), ValueError)])
def test_other_seeds_are_refused(seed, error):
    for f in (lambda: row_generator(seed, 0), lambda: row_noise(seed, [0], (2,)), lambda: row_uniform(seed, [0], 2)):
        with pytest.raises(error, match="seed"): f()


def test_check_int_names_its_bounds():
    with pytest.raises(ValueError, match=r"steps must be in \[1, 9\], got 10"): check_int(10, "steps", 1, 9)
    assert check_int(1, "steps", 1, 9) == 1 and check_int(9, "steps", 1, 9) == 9


@given(big, st.lists(st.integers(0, 2**40), min_size=1, max_size=6))
def test_a_row_of_noise_does_not_know_its_neighbours(seed, rows):
    x, u = row_noise(seed, rows, (3, 4)), row_uniform(seed, rows, 5)
    for i, r in enumerate(rows):
        assert torch.equal(x[i], row_noise(seed, [r], (3, 4))[0]) and torch.equal(u[i], row_uniform(seed, [r], 5)[0])
    assert x.dtype == torch.float32 and u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()


def test_noise_is_normal_and_uniform_numbers_are_uniform():
    assert stats.kstest(row_noise(0, range(400), (50,)).flatten().numpy(), "norm").pvalue > 1e-3
    u = row_uniform(0, range(400), 50)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(u[:, 0].numpy(), "uniform").pvalue > 1e-3   # across rows too


def test_no_rows():
    assert row_noise(0, [], (3, 4, 4)).shape == (0, 3, 4, 4) and row_uniform(0, range(0), 3).shape == (0, 3)


def test_the_global_generators_are_left_alone():
    torch.manual_seed(5), np.random.seed(5)  # noqa: NPY002
    state, old = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    row_noise(0, range(4), (3,)), row_uniform(0, range(4), 3)
    assert torch.equal(state, torch.get_rng_state()) and (old == np.random.get_state()[1]).all()  # noqa: NPY002


# ---------------------------------------------------------------- images

@pytest.fixture(autouse=True)
def no_figures_left():
    plt.close("all")
    yield
    plt.close("all")


def images(n=9, s=16): return row_noise(1, range(n), (3, s, s)).tanh()


@pytest.mark.parametrize("bad,error,word", [
    (images().numpy(), TypeError, "ndarray"), (None, TypeError, "NoneType"), ([1], TypeError, "list"),
    (images()[0], ValueError, "shape"), (images()[:, :1], ValueError, "shape"), (images()[:, :, :8], ValueError, "shape"),
    (images().permute(0, 2, 3, 1), ValueError, "shape"), ((images()*127.5 + 127.5).byte(), TypeError, "x/127.5 - 1"),
    (images() > 0, TypeError, "floating"), (images().long(), TypeError, "floating"), (images()*127.5 + 127.5, ValueError, "x/127.5 - 1"),
    (images()*3, ValueError, r"\[-1,1\]"), (images() - 1, ValueError, r"\[-1,1\]")])
def test_wrong_images_are_refused(bad, error, word):
    with pytest.raises(error, match=word): check_images(bad)


def test_wrong_size_is_refused():
    with pytest.raises(ValueError, match="32x32.*16x16"): check_images(images(), 32)


@pytest.mark.parametrize("x", [images(), images().double(), images().half(), images().bfloat16(), images()[:0], 1.2*images(),
                               torch.full((9, 3, 16, 16), -1.), torch.ones(9, 3, 16, 16), torch.zeros(9, 3, 16, 16)])
def test_right_images_pass(x): assert check_images(x) is x


@pytest.mark.parametrize("n", [1, 3, 8, 64])
@pytest.mark.parametrize("door", [check_images, to_bytes, show])
def test_what_looks_like_0_to_1_warns_and_passes(n, door):
    "However many: a briefly trained model's samples may be as pale as that."
    pale = (images(n) + 1)/2
    with pytest.warns(UserWarning, match=rf"these {n} lie in .* in 0..1 do: .* 2\*x - 1; if they are only pale"): door(pale)
    with warnings.catch_warnings(action="error", category=UserWarning):
        door(images(n))
        with range_known(): door(pale)


def test_what_a_briefly_trained_model_drew_passes():
    "Their darkest pixel was 0.0481."
    x = torch.linspace(.0481, 1, 8*3*16*16).view(8, 3, 16, 16)
    with pytest.warns(UserWarning, match="0.0481"): assert check_images(x) is x
    with pytest.warns(UserWarning): assert to_bytes(x).min() == round(.0481*127.5 + 127.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_to_the_ruler(value):
    x = images()
    x[3, 1, 2, 2] = value
    assert check_images(x) is x


@given(st.floats(-3, 3, width=32))
def test_8_bits(v):
    x = torch.full((1, 3, 2, 2), v)
    y = to_8bit(x)
    assert torch.equal(to_8bit(y), y) and y.dtype == x.dtype and y.abs().max() <= 1
    assert (y - x.clamp(-1, 1)).abs().max() <= 1/255 + 1e-6


def test_8_bits_are_those_of_a_stored_image():
    level = torch.arange(256.)
    assert torch.equal(((to_8bit(level/127.5 - 1) + 1)*127.5).round(), level) and len(to_8bit(torch.linspace(-1, 1, 9999)).unique()) == 256


def test_bytes_are_those_of_a_file():
    x = torch.linspace(-1, 1, 256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert to_bytes(x)[0, :, :, 0].flatten().tolist() == list(range(256))
    beyond = to_bytes(1.2*x)[0, :, :, 0].flatten()
    assert (np.diff(beyond.astype(int)) >= 0).all() and beyond[0] == 0 and beyond[-1] == 255
    assert (to_bytes(torch.full_like(x, math.nan)) == 128).all()


@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.sampled_from([1, 4, 32]))
def test_bytes_there_and_back(key, n, size):
    a = np.random.default_rng(key).integers(256, size=(n, size, size, 3), dtype=np.uint8)
    x = from_bytes(a)
    assert x.dtype == torch.float32 and x.shape == (n, 3, size, size)
    assert torch.equal(x, torch.from_numpy(a).permute(0, 3, 1, 2)/127.5 - 1) and torch.equal(to_8bit(x), x)
    assert np.array_equal(((x + 1)*127.5).round().permute(0, 2, 3, 1).numpy(), a)


@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_a_file_holds_what_to_8bit_says(key, dtype):
    x = 2*torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(key)) - 1
    x[0, 0, 0, 0] = -1.
    assert torch.equal(from_bytes(to_bytes(x.to(dtype))), to_8bit(x.to(dtype).float()))


def test_from_bytes_copies_what_cannot_be_written():
    a = np.zeros((1, 16, 16, 3), np.uint8)
    a.flags.writeable = False
    with warnings.catch_warnings(action="error"): from_bytes(a).add_(1)
    assert not a.any()


@pytest.mark.parametrize("bad,error,word", [
    (np.zeros((1, 16, 16, 3)), TypeError, "float64"), (torch.zeros(1, 16, 16, 3, dtype=torch.uint8), TypeError, "uint8 array, got torch"),
    ([[0]], TypeError, "list"), (np.zeros((16, 16, 3), np.uint8), ValueError, "shape"),
    (np.zeros((1, 3, 16, 16), np.uint8), ValueError, "shape"), (np.zeros((1, 16, 16, 4), np.uint8), ValueError, "shape"),
    (np.zeros((1, 16, 17, 3), np.uint8), ValueError, "shape")])
def test_what_is_no_batch_of_files_is_refused(bad, error, word):
    with pytest.raises(error, match=word): from_bytes(bad)


@pytest.mark.parametrize("bad,error", [(images().numpy(), TypeError), (images()[0], ValueError), (images()*127.5 + 127.5, ValueError)])
def test_what_is_no_batch_of_images_is_not_stored(bad, error):
    with pytest.raises(error, match="images must "): to_bytes(bad)


def test_a_device_that_is_there(): torch.zeros(1, device=default_device())


# ---------------------------------------------------------------- figures

@pytest.mark.parametrize("n,cols,shape", [(0, 8, (1, 1)), (1, 8, (1, 1)), (8, 8, (1, 8)), (9, 8, (2, 8)), (5, 2, (3, 2))])
def test_show(n, cols, shape):
    fig = show(images(n), cols=cols, titles=[f"t{i}" for i in range(min(n, 3))])
    assert isinstance(fig, Figure) and len(fig.axes) == shape[0]*shape[1] and not plt.get_fignums()
    assert sum(len(ax.images) for ax in fig.axes) == n
    assert [ax.get_title() for ax in fig.axes][:min(n, 3)] == [f"t{i}" for i in range(min(n, 3))]


def drawn(fig):
    fig.savefig(file := io.BytesIO(), dpi=100)
    return np.array(Image.open(file).convert("RGB")).min(2)


def test_a_white_canvas_ends_somewhere():
    "Each image has a frame; a place without an image has none."
    def dark_columns(n): return int((drawn(show(torch.ones(n, 3, 16, 16), cols=4)) < 240).any(0).sum())
    assert dark_columns(1) >= 2 and dark_columns(2) >= 2*dark_columns(1) and dark_columns(4) > dark_columns(2)
    five = drawn(show(torch.ones(5, 3, 16, 16), cols=4))
    assert (five[110:, 5:95] < 240).any() and not (five[110:, 105:] < 240).any()


def test_show_draws_what_it_is_given():
    x = images(1)
    drawn = show(x).axes[0].images[0].get_array()
    assert np.allclose(drawn, (x[0].permute(1, 2, 0).numpy() + 1)/2)


def test_show_takes_what_networks_give():
    for x in (1.3*images(2), images(2).half(), images(2).requires_grad_(), images(2).bfloat16()): assert isinstance(show(x), Figure)


@pytest.mark.parametrize("bad", [0, -1, 2., True])
def test_show_refuses_columns(bad):
    with pytest.raises((TypeError, ValueError), match="cols"): show(images(2), cols=bad)


@pytest.mark.parametrize("a,b,said", [
    ([], [], "0 of 0"), ([math.nan]*3, [1., 2, 3], "0 of 3"), ([.1, .2, math.inf], [.1, math.nan, .3], "1 of 3"),
    ([0., 0], [0., 0], "2 of 2")])
def test_plot_rule_counts_what_it_leaves_out(a, b, said):
    fig = plot_rule(torch.tensor(a), torch.tensor(b), floor=(torch.tensor([.1, .2]), torch.tensor([.1, .2])))
    texts = [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
    assert texts == ["real, 2 of 2", f"model, {said}"] and not plt.get_fignums()
    assert plot_rule(torch.tensor(a), torch.tensor(b), title="x").axes[0].get_title() == "x"


def test_plot_rule_draws_into_given_axes():
    fig, ax = plt.subplots()
    plt.close(fig)
    assert plot_rule(torch.rand(5), torch.rand(5), ax=ax, colour="guided", label="guided") is fig and len(ax.collections) == 1
    with pytest.raises(KeyError): plot_rule(torch.rand(5), torch.rand(5), colour="pink")


def test_a_known_range_is_known_only_inside():
    pale = images(16).abs().clamp(min=.05)
    with warnings.catch_warnings(action="error"), range_known(): assert check_images(pale) is pale
    with range_known(), pytest.raises(ValueError, match="0..255"): check_images(pale*255)
    with pytest.warns(UserWarning, match="these 16"): check_images(pale)


def curve(px, name="model", colour="model"):
    fig, ax = plt.subplots()
    plt.close(fig)
    plot_errors([(torch.tensor(px), name, colour)], ax)
    return ax, *(v.tolist() for v in ax.lines[0].get_data())


@pytest.mark.parametrize("px,ends,said", [
    ([.5, 2., math.nan, math.nan], .5, "2 of 4 read"), ([math.nan]*3, 0., "0 of 3 read"), ([], 0., "0 of 0 read"), ([1.]*5, 1., "5 of 5 read")])
def test_the_curve_of_errors_ends_at_the_readable_share(px, ends, said):
    ax, x, y = curve(px)
    assert y[-1] == ends and x[-1] >= 32 and ax.get_legend().get_texts()[0].get_text() == f"model, {said}"
    assert y == sorted(y) and all(low <= v <= high for v in y for low, high in [ax.get_ylim()])


@given(st.lists(st.floats(.01, 90), min_size=1, max_size=20), st.floats(.01, 90))
def test_the_curve_of_errors_is_the_share_at_most_so_large(px, at):
    _, x, y = curve(px)
    assert y[np.searchsorted(x, np.float32(at), side="right") - 1] == pytest.approx((np.float32(px) <= np.float32(at)).mean())


def test_chance_is_dotted_and_large_errors_stay_inside():
    ax, x, _ = curve([200.], colour="chance")
    assert ax.lines[0].get_drawstyle() == "steps-post" and ax.lines[0].get_linestyle() == ":" and ax.get_xlim()[1] >= 200 and x[-1] == 200
    assert curve([2.])[0].lines[0].get_linestyle() == "-" and curve([0.])[1][1] == pytest.approx(1e-3)


def test_plot_report():
    a, nan = torch.rand(9), torch.full((9,), math.nan)
    fig = plot_report((nan, nan), (a, a), [(nan, "model", "guided"), (a, "real", "real")], "two lines\nof title", colour="guided")
    assert isinstance(fig, Figure) and len(fig.axes) == 2 and not plt.get_fignums() and fig.get_suptitle() == "two lines\nof title"
    assert fig.axes[1].lines[0].get_color() == COLOURS["guided"] and len(fig.axes[1].lines) == 2


# ---------------------------------------------------------------- files

def stored(path):
    "What a file or folder holds, read without the package where that is possible."
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as f: return f["images"]
    if path.suffix == ".png": return read_grid(path)
    return np.stack([np.array(Image.open(p)) for p in sorted(path.iterdir())])


@pytest.mark.parametrize("name", ["new/grid.png", "new/each", "new/array.npz", "GRID.PNG"])
@pytest.mark.parametrize("n", [1, 3, 8, 20])
def test_what_is_saved_is_what_to_bytes_says(name, n, tmp_path):
    x = 1.2*images(n)
    x[0, 0, 0, 0] = math.nan
    path = save_images(x, str(tmp_path/name))
    assert path == tmp_path/name and np.array_equal(stored(path.rename(path.with_suffix(path.suffix.lower()))), to_bytes(x))
    left = [p.name for p in path.parent.iterdir()]
    assert len(left) == 1, left   # nothing temporary


@pytest.mark.parametrize("name", ["each", "array.npz"])
def test_the_command_line_reads_what_is_saved(name, tmp_path):
    from rulediff_nb.images import read_images
    x = images(12)
    assert torch.equal(read_images(save_images(x, tmp_path/name)).x, to_8bit(x))


@pytest.mark.parametrize("cols,shape", [(1, (7*17 - 1, 16)), (3, (3*17 - 1, 3*17 - 1)), (8, (16, 7*17 - 1))])
def test_one_picture_has_lines_between_the_images(cols, shape, tmp_path):
    x = torch.ones(7, 3, 16, 16)
    with Image.open(save_images(x, tmp_path/"x.png", cols)) as f: a = np.array(f)
    assert a.shape == (*shape, 3) and (a == 255).all(2).sum() == 7*256 and a.min() < 60
    assert np.array_equal(read_grid(tmp_path/"x.png"), to_bytes(x))


@pytest.mark.parametrize("said", [None, "7 images", "7 images of 16 pixels, 4 in a row", "1 images of 99 pixels, 1 in a row"])
def test_a_picture_that_is_no_grid_is_refused(said, tmp_path):
    from PIL import PngImagePlugin
    info = PngImagePlugin.PngInfo()
    if said: info.add_text("rulediff_nb", said)
    Image.new("RGB", (16, 16)).save(tmp_path/"x.png", pnginfo=info)
    with pytest.raises(ValueError, match="x.png is"): read_grid(tmp_path/"x.png")


@pytest.mark.parametrize("said", ["0 images of 16 pixels, 4 in a row", "4 images of 16 pixels, 0 in a row", "4 images of 0 pixels, 2 in a row"])
def test_a_grid_of_nothing_is_refused(said, tmp_path):
    from PIL import PngImagePlugin
    (info := PngImagePlugin.PngInfo()).add_text("rulediff_nb", said)
    Image.new("RGB", (16, 16)).save(tmp_path/"x.png", pnginfo=info)
    with pytest.raises(ValueError, match=f"x.png says that it holds '{said}', wanted 1 or more of each"): read_grid(tmp_path/"x.png")


def test_a_damaged_picture_is_named_wherever_it_ends(tmp_path):
    blob = save_images(torch.linspace(-1, 1, 4*3*256).view(4, 3, 16, 16), tmp_path/"whole.png").read_bytes()
    for end in range(len(blob) - 24):   # what comes after the pixels are checksums and an end
        (tmp_path/"x.png").write_bytes(blob[:end])
        with pytest.raises((ValueError, OSError), match="x.png"): read_grid(tmp_path/"x.png")
    with pytest.raises(FileNotFoundError, match="none.png"): read_grid(tmp_path/"none.png")


def test_folders_of_many_images_sort(tmp_path):
    x = torch.linspace(-1, 1, 10_001).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    names = sorted(p.name for p in save_images(x, tmp_path/"many").iterdir())
    assert names[0] == "00000.png" and names[-1] == "10000.png" and len(names) == 10_001
    assert sorted(p.name for p in save_images(x[:2], tmp_path/"two").iterdir()) == ["0000.png", "0001.png"]


def test_saving_again_replaces_and_never_mixes(tmp_path):
    for name in ("x.png", "x.npz", "x"):
        for x in (images(4), -images(4), images(9)): assert np.array_equal(stored(save_images(x, tmp_path/name)), to_bytes(x))
    with pytest.raises(ValueError, match="x holds 0004.png"): save_images(images(4), tmp_path/"x")
    (tmp_path/"x"/"mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="x holds mine.txt"): save_images(images(9), tmp_path/"x")
    assert len(list((tmp_path/"x").iterdir())) == 10 and sorted(p.name for p in tmp_path.iterdir()) == ["x", "x.npz", "x.png"]


@pytest.mark.parametrize("name", ["x.jpg", "x.gif", "x.txt", "run.v2"])
def test_other_endings_are_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=rf"\.png or \.npz.*folder.*got {name}"): save_images(images(2), tmp_path/name)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no images"): save_images(images(0), tmp_path/"x.npz")
    with pytest.raises(TypeError, match="ndarray"): save_images(to_bytes(images(2)), tmp_path/"x.npz")
    with pytest.raises(ValueError, match="cols"): save_images(images(2), tmp_path/"x.png", 0)
    (tmp_path/"plain").write_text("a file")
    with pytest.raises(ValueError, match="plain is a file"): save_images(images(2), tmp_path/"plain")
    assert [p.name for p in tmp_path.iterdir()] == ["plain"] and (tmp_path/"plain").read_text() == "a file"


@pytest.mark.parametrize("name", ["x.png", "x.npz", "x"])
def test_a_save_that_fails_leaves_what_was_there(name, tmp_path, monkeypatch):
    before = to_bytes(images(4))
    save_images(images(4), tmp_path/name)

    def fails(*args, **kw): raise OSError("disk full")
    monkeypatch.setattr(Image.Image, "save", fails), monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(OSError, match="disk full"): save_images(-images(4), tmp_path/name)
    monkeypatch.undo()
    assert np.array_equal(stored(tmp_path/name), before) and [p.name for p in tmp_path.iterdir()] == [name]


# ---------------------------------------------------------------- more figures

@pytest.mark.parametrize("n", [0, 1, 3, 5, 20])
def test_plot_panels(n):
    sides = torch.full((n,), math.nan), torch.full((n,), math.nan)
    p = Panel("w", images(n), sides, (torch.rand(4), torch.rand(4)))
    fig = plot_panels([p, p])
    assert isinstance(fig, Figure) and len(fig.axes) == 4 and not plt.get_fignums()


@pytest.mark.parametrize("models,lines", [(1, 1), (5, 1), (7, 2), (10, 2), (11, 3)])
def test_many_panels_stand_in_lines_of_five(models, lines):
    sides = torch.rand(4), torch.rand(4)
    fig = plot_panels([Panel(str(k), images(2), sides, sides) for k in range(models)])
    titles = [a.get_title() for a in fig.axes if a.get_title()]
    low = [a for a in fig.axes if a.get_xlabel()]
    assert titles == [str(k) for k in range(models)] and len(low) == models and len(fig.axes) == 2*models
    assert fig.get_size_inches()[1] == pytest.approx(5.4*lines)


@pytest.mark.parametrize("n", [1, 3, 4, 6, 16])
def test_mosaic_shows_every_image(n):
    "A white image per cell: as many white pixels as the images have."
    m = mosaic(torch.ones(n, 3, 16, 16))
    assert (m == 1).all(0).sum() == n*256


def test_to_numpy():
    x = torch.rand(3, requires_grad=True)
    assert isinstance(to_numpy(x), np.ndarray) and (to_numpy([1, 2]) == [1, 2]).all()


def test_colours_differ(): assert len(set(COLOURS.values())) == len(COLOURS)


# ---------------------------------------------------------------- sliders, bars, exercises

def test_under_test_every_value_is_called(monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    seen = []
    explore(lambda a, b: seen.append((a, b)), a=[1, 2, 3], b=(True, False))
    assert seen == [(1, True), (2, True), (3, True), (1, True), (1, False)]


def test_under_test_a_broken_value_is_noticed(monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    with pytest.raises(ZeroDivisionError): explore(lambda a: 1/a, a=[1, 2, 0])


@pytest.mark.parametrize("values", [{}, dict(a="abc"), dict(a=[]), dict(a=[1], b=()), dict(a="")])
def test_explore_refuses(values, monkeypatch):
    for on in ("", "1"):
        monkeypatch.setenv("IN_TEST", on)
        with pytest.raises(ValueError): explore(lambda **kw: None, **values)


def test_sliders_start_at_the_first_value_and_call_back(monkeypatch):
    import IPython.display
    import ipywidgets
    monkeypatch.delenv("IN_TEST", raising=False)
    shown, seen = [], []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    explore(lambda scale, k: seen.append((scale, k)), scale=[2., 0., 4.], k=["x", "y"])
    box = [v for v in shown if isinstance(v, ipywidgets.VBox)][0]
    sliders = [c for c in box.children if isinstance(c, ipywidgets.SelectionSlider)]
    assert seen == [(2., "x")] and [s.description for s in sliders] == ["scale", "k"]
    assert [label for label, _ in sliders[0].options] == ["2.0", "0.0", "4.0"]
    sliders[0].index = 2
    assert seen[-1] == (4., "x")


@pytest.mark.parametrize("in_test", ["", "1"])
def test_progress_hands_every_item_on(in_test, monkeypatch, capsys):
    monkeypatch.setenv("IN_TEST", in_test)
    assert list(progress(iter(range(5)), 5, "go", note=str)) == list(range(5)) and not list(progress([]))
    out, err = capsys.readouterr()
    assert not out and (not err or not in_test)


def bar(monkeypatch, capsys, steps, *args, **kw):
    "What a bar writes for a terminal."
    monkeypatch.delenv("IN_TEST", raising=False), monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress(steps, *args, **kw)) == list(range(4))
    return capsys.readouterr().err


def test_a_bar_waits_for_its_delay(monkeypatch, capsys):
    def slow(): yield from (time.sleep(.6*(i == 2)) or i for i in range(4))
    assert "go" in bar(monkeypatch, capsys, range(4), 4, "go") and "go" in bar(monkeypatch, capsys, slow(), 4, "go", delay=.5)
    assert not bar(monkeypatch, capsys, range(4), 4, "go", delay=60.).strip()


def test_a_resumed_bar_counts_on(monkeypatch, capsys):
    assert "96/100" in bar(monkeypatch, capsys, range(4), 100, "go", initial=96) and "0/100" in bar(monkeypatch, capsys, range(4), 100, "go")


def test_progress_can_be_left(monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    done = []

    def steps():
        try: yield from range(5)
        finally: done.append(True)
    for s in (p := progress(steps())):
        if s == 2: break
    p.close()
    assert s == 2


def even(x): assert x % 2 == 0, "must be even"


@pytest.mark.parametrize("check,decoys", [(even, []), (even, [1, 2]), (lambda x: None, [1]), (lambda x: x > 0, [-1])])
def test_a_toothless_check_is_refused(check, decoys):
    with pytest.raises(ValueError, match="twice"): Exercise("twice", check, decoys)


def stub(): raise NotImplementedError


def test_exercise():
    e = Exercise("twice", lambda f: even(f()), [lambda: 1, lambda: 3])
    assert e(None) == e(stub) == "twice: not attempted yet" and e(lambda: 4) == "twice: passed"
    with pytest.raises(AssertionError, match="must be even"): e(lambda: 5)
    with pytest.raises(ZeroDivisionError): e(lambda: 1/0)


def test_a_decoy_that_crashes_is_no_decoy():
    with pytest.raises(ZeroDivisionError): Exercise("twice", lambda f: even(f()), [lambda: 1/0])


def test_names_exported_exist(): assert all(hasattr(core, k) for k in core.__all__)


def test_plot_rule_marks_what_lies_beyond_the_frame():
    a, b = torch.linspace(.1, 1, 50), torch.linspace(.1, 1, 50)
    b[:3] = 9.
    ax = plot_rule(a, b).axes[0]
    inside, beyond = (c.get_offsets() for c in ax.collections)
    assert len(inside) == 47 and len(beyond) == 3 and ax.get_ylim()[1] < 2 and (beyond[:, 1] < ax.get_ylim()[1]).all()


def test_new_streams_stay_out_of_the_samplers():
    "Step k of the sampler takes stream 21 + k; measures that were stored before that was seen keep theirs."
    old = {30, 31, 32, 40, 41, 43, 70}
    used = {int(k) for f in modules().values() for k in re.findall(r"stream=(\d+)", f.read_text())}
    assert used and all(k < 21 or k > 21 + 1000 or k in old for k in used), sorted(used)
