"A reader's own images: what becomes of each file, what is noted, refused and written, and which task they look like."
import csv
import functools
import io
import math
import os
import re
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import RULEDIFF, fails, run, shell
from PIL import Image, ImageCms, PngImagePlugin

from rulediff_nb import cli, images
from rulediff_nb.core import from_bytes, to_bytes
from rulediff_nb.features import REASONS
from rulediff_nb.images import NOTES, SCHEMA, Fit, fits, load_images, read_images, refused, shown, suggestion
from rulediff_nb.metrics import ROWS
from rulediff_nb.sample import load_pretrained, sample
from rulediff_nb.tasks import TASKS, get_task

REPORT = "report", "--task", "two_squares", "--images"   # then the images
TASK = get_task("two_squares", palette="fixed", size=16)
PIXELS = to_bytes(TASKS["two_squares"].sample(8, 0)[0])


@pytest.fixture
def pngs(tmp_path):
    (tmp_path/"png").mkdir()
    for i, p in enumerate(PIXELS): Image.fromarray(p).save(tmp_path/"png"/f"{i}.png")
    return tmp_path/"png"


@pytest.mark.parametrize("args", [["--task", "two_squares"], ["--images", "PNG"]])
def test_report_wants_both(args, pngs, capsys):
    assert "--images" in fails(capsys, "report", *[pngs if a == "PNG" else a for a in args])


def test_report_on_a_folder(pngs, tmp_path, capsys):
    (pngs/"notes.txt").write_text("no image")
    status, out, _ = run(capsys, *REPORT, pngs, "--out", tmp_path/"r.csv")
    assert status == 0 and "8 images" in out and "not measured" in out
    rows = list(csv.DictReader((tmp_path/"r.csv").open()))
    assert list(rows[0])[:5] == ["schema", "task", "palette", "images", "n"] and rows[0]["palette"] == "fixed"
    assert [r["images"] for r in rows] == ["floor", "images", "chance"] and float(rows[1]["readable"]) == 1
    for r in rows:
        for k in images.SHOWN: assert not r[k] or math.isfinite(float(r[k]))
    assert float(rows[1]["error_px"]) < .05


def test_what_is_loaded_is_what_was_drawn(pngs, tmp_path):
    want = from_bytes(PIXELS)
    assert torch.equal(load_images(pngs), want)
    for shape in (PIXELS, PIXELS.transpose(0, 3, 1, 2)):
        np.savez(tmp_path/"x.npz", images=shape)
        assert torch.equal(load_images(tmp_path/"x.npz"), want)


def test_report_on_an_npz(tmp_path, capsys):
    np.savez_compressed(tmp_path/"x.npz", PIXELS)
    status, out, _ = run(capsys, *REPORT, tmp_path/"x.npz")
    assert status == 0 and "8 images" in out


def test_report_at_another_size_and_palette(tmp_path, capsys):
    np.savez(tmp_path/"x.npz", to_bytes(TASK.sample(4, 0)[0]))
    status, out, _ = run(capsys, *REPORT, tmp_path/"x.npz", "--palette", "fixed")
    assert status == 0 and "size=16" in out and "palette=fixed" in out


def test_images_are_measured_once(pngs, tmp_path, capsys, monkeypatch):
    cls, seen = type(TASKS["two_squares"]), []
    features = cls.features
    monkeypatch.setattr(cls, "features", lambda self, x: seen.append(len(x)) or features(self, x))
    assert run(capsys, *REPORT, pngs, "--per-image", tmp_path/"i.csv")[0] == 0
    assert seen.count(8) == 1   # the floor has other images, and more of them


ONE = Image.fromarray(PIXELS[0])


def see_through(image, alpha):
    "The image with one alpha everywhere."
    out = image.convert("RGBA")
    out.putalpha(alpha)
    return out


def deep_png(path, colours=3):
    "A PNG of 16 bits per channel, which Pillow can read and not write."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + bytes(32*2*colours) for _ in range(32))
    head = struct.pack(">IIBBBBB", 32, 32, 16, {1: 0, 3: 2, 4: 6}[colours], 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def blank(*size, mode="RGB"): return Image.new(mode, size)


def bound(path):
    "A socket, which leaves its name behind."
    with socket.socket(socket.AF_UNIX) as s:
        try: s.bind(str(path))
        except OSError: os.mkfifo(path)   # the path is too long for a socket


BAD = {  # what stands in the file, its name, a word of the reason
    "grey": (ONE.convert("L").save, "z.png", "greyscale (mode L): the ruler tells objects apart by their colours"),
    "grey alpha": (ONE.convert("LA").save, "z.png", "greyscale (mode LA)"), "bits": (ONE.convert("1").save, "z.png", "greyscale (mode 1)"),
    "grey jpeg": (ONE.convert("L").save, "z.jpg", "greyscale"),
    "deep grey": (Image.new("I;16", (32, 32)).save, "z.png", "16 or more bits"), "deep": (deep_png, "z.png", "16 or more bits"),
    "deep alpha": (functools.partial(deep_png, colours=4), "z.png", "16 or more bits"),
    "floats": (blank(32, 32, mode="F").save, "z.tiff", "bits"),
    "cmyk": (ONE.convert("CMYK").save, "z.tif", "mode CMYK, wanted RGB"), "cmyk jpeg": (ONE.convert("CMYK").save, "z.jpg", "mode CMYK"),
    "lab": (blank(32, 32, mode="LAB").save, "z.tif", "mode LAB"),
    "gif": (lambda p: ONE.save(p, save_all=True, append_images=[ONE.rotate(90)]), "z.gif", "animated or has several pages (2 frames)"),
    "apng": (lambda p: ONE.save(p, save_all=True, append_images=[ONE.rotate(90)]), "z.png", "animated"),
    "webp": (lambda p: ONE.save(p, save_all=True, append_images=[ONE.rotate(90)]), "z.webp", "animated"),
    "pages": (lambda p: ONE.save(p, save_all=True, append_images=[ONE]), "z.tif", "2 frames"),
    "size": (blank(16, 16).save, "z.png", "is 16x16, most of the others are 32x32"),
    "oblong": (blank(32, 16).save, "0.png", "is 32x16, wanted a square"),
    "small": (blank(15, 15).save, "z.png", "is 15x15: a task has 16 to 256 pixels a side"),
    "huge": (blank(257, 257).save, "z.PNG", "is 257x257"),
    "empty": (lambda p: p.write_bytes(b""), "z.png", "is not an image"),
    "text": (lambda p: p.write_text("hello"), "z.webp", "is not an image"),
    "cut": (lambda p: (ONE.save(p), p.write_bytes(p.read_bytes()[:90])), "z.png", "is not a whole image"),
    "cut jpeg": (lambda p: (ONE.save(p), p.write_bytes(p.read_bytes()[:-300])), "z.jpg", "is not a whole image"),
    "eps": (lambda p: ONE.save(p, format="eps"), "z.png", "is a file of the format EPS, wanted PNG"),
    "dds": (lambda p: see_through(ONE, 255).save(p, format="dds", pixel_format="DXT5"), "z.png", "of the format DDS"),
    "loop": (lambda p: p.symlink_to(p.name), "z.png", "is not a whole image: Too many levels"),
    "folder": (lambda p: p.mkdir(), "z.png", "is a folder"), "link to a folder": (lambda p: p.symlink_to("/usr"), "z.png", "is a folder"),
    "socket": (bound, "z.png", "is no regular file"), "unknown": (lambda p: p.write_bytes(b"\0\0\0\x18ftypxxxx"), "z.heic", "is not an image"),
    "link": (lambda p: p.symlink_to("nowhere.png"), "z.png", "is not a whole image: No such file")}


@pytest.mark.parametrize("how", BAD)
def test_what_cannot_be_used_is_named_and_the_rest_measured(how, pngs, capsys):
    make, name, word = BAD[how]
    (pngs/name).unlink(missing_ok=True)
    make(pngs/name)
    n = 8 if name[0] == "z" else 7
    found = read_images(pngs)
    assert [p.name for p in found.problems] == [name] and word in found.problems[0].why and found.x.shape == (n, 3, 32, 32)
    assert name not in found.names and found.notes == [] and str(pngs) not in found.problems[0].why
    with pytest.raises(ValueError, match=f"{name} "): load_images(pngs)
    err = fails(capsys, *REPORT, pngs, "--strict")
    assert word in err and name in err


def test_the_report_counts_what_could_not_be_used(pngs, capsys):
    for how in ("grey", "cut jpeg", "gif"): BAD[how][0](pngs/BAD[how][1])
    status, out, err = run(capsys, *REPORT, pngs)
    assert status == 0 and "8 images" in out and out.endswith("8 read, 3 files could not be used\n")
    for _, name, word in (BAD[k] for k in ("grey", "cut jpeg", "gif")):
        assert err.count(f"rulediff report: {name} ") == 1 and word in err and name not in out
    assert len(err.splitlines()) == 3
    for p in ("z.jpg", "z.gif"): (pngs/p).unlink()
    assert "8 read, 1 file could not be used" in run(capsys, *REPORT, pngs)[1]
    (pngs/"z.png").unlink()
    status, out, err = run(capsys, *REPORT, pngs)
    assert out.rstrip().endswith("8 read, 0 files could not be used") and err == ""


def test_nothing_is_said_twice(pngs, capsys):
    for how in ("grey", "cut jpeg", "gif"): BAD[how][0](pngs/BAD[how][1])
    see_through(ONE, 255).save(pngs/"1.png")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(pngs/"5.png")
    _, out, err = run(capsys, *REPORT, pngs)
    lines = [s.removeprefix("rulediff report: ").strip() for s in (out + err).splitlines()]
    assert len(err.splitlines()) == 5 and len(lines) == len(set(lines))


@pytest.mark.parametrize("name,make", [
    ("z.png", os.mkfifo), ("z.jpg", lambda p: p.symlink_to("/dev/zero")), ("z.gif", lambda p: p.symlink_to("/dev/stdin"))])
def test_a_pipe_is_named_and_not_waited_for(name, make, pngs):
    make(pngs/name)
    status, out, err = shell(f"timeout 50 {RULEDIFF} {' '.join(REPORT)} {pngs} < <(sleep 55 > /dev/null 2>&1)")
    assert status == 0 and f"{name} is no regular file" in err and "8 read, 1 file" in out


@pytest.mark.parametrize("name", ["z\u00fc.png", os.fsdecode(b"z\xff.png")])
def test_a_name_that_the_terminal_cannot_show_loses_no_report(name, pngs, tmp_path):
    ONE.convert("L").save(pngs/name)
    files = f"--out {tmp_path}/r.md --per-image {tmp_path}/i.csv"
    status, out, err = shell(f"{RULEDIFF} {' '.join(REPORT)} {pngs} {files}", PYTHONIOENCODING="ascii:strict")
    shown = name.encode("ascii", "backslashreplace").decode()
    assert status == 0 and "8 read, 1 file" in out and f"rulediff report: {shown} is greyscale" in err
    for p in ("r.md", "i.csv"): assert "is greyscale" in (tmp_path/p).read_text("utf-8")


def webp(path, **how): Image.fromarray(PIXELS[0]).save(path, format="webp", **how)


@pytest.mark.parametrize("said,name,make", [
    ("JPEG", "0.jpg", ONE.save), ("JPEG", "0.png", lambda p: ONE.save(p, format="jpeg")),
    ("JPEG", "0.tif", lambda p: ONE.save(p, compression="jpeg")), ("lossy WebP", "0.webp", webp), ("JPEG", "0.jfif", ONE.save),
    ("JPEG", "0.jpg", lambda p: ONE.save(p, format="mpo")), ("AVIF", "0.avif", ONE.save), ("AVIF", "0.png", lambda p: ONE.save(p, format="avif")),
    ("JPEG 2000", "0.jp2", lambda p: ONE.save(p, irreversible=True)), ("", "0.jp2", ONE.save),
    ("lossy WebP", "0.webp", functools.partial(webp, icc_profile=bytes(129))),
    ("lossy WebP", "0.webp", lambda p: see_through(ONE, 128).save(p, format="webp")),
    ("", "0.webp", functools.partial(webp, lossless=True)), ("", "0.tif", ONE.save), ("", "0.bmp", ONE.save),
    ("", "0.webp", lambda p: see_through(ONE, 128).save(p, format="webp", lossless=True))])
def test_compression_that_moves_edges_is_noted(said, name, make, pngs, capsys):
    (pngs/"0.png").unlink()
    make(pngs/name)
    found = [n for n in read_images(pngs).notes if "compression" in n]
    assert found == ([f"1 of 8 images is {said}: {NOTES['jpeg'].split(': ')[1]}"] if said else [])
    err = run(capsys, *REPORT, pngs)[2]
    assert ("compression moves edges" in err) == bool(said)


def test_jpegs_are_counted(pngs):
    for i in range(3): Image.open(pngs/f"{i}.png").save(pngs/f"{i}.jpg"), (pngs/f"{i}.png").unlink()
    assert read_images(pngs).notes[0].startswith("3 of 8 images are JPEG: its compression moves edges")


def as_file(how, path):
    "Real images after something that moved their edges; the file's ending is the way's."
    for i, p in enumerate(PIXELS): how(Image.fromarray(p), path/f"{i}.png")
    return read_images(path)


def larger(side, by): return lambda im, p: im.resize((side, side), by).save(p)


NEAREST, SOFT = Image.Resampling.NEAREST, (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


@pytest.mark.parametrize("side", [40, 48, 64, 96])
def test_images_that_were_made_larger_are_noted(side, tmp_path):
    for by in (NEAREST, *SOFT) if side > 40 else (NEAREST,):   # a quarter larger is too little to see by softness
        found = as_file(larger(side, by), tmp_path)
        said = [v for v in found.notes if "size in which they were drawn" in v]
        assert len(said) == 1 and int(said[0].split()[0]) >= (8 if by == NEAREST else 5), (by, found.notes)


@pytest.mark.parametrize("how", [
    Image.Image.save, lambda im, p: im.save(p, format="webp", lossless=True), lambda im, p: im.save(p, format="gif"),
    lambda im, p: im.quantize(256).save(p), lambda im, p: im.save(p, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    lambda im, p: im.resize((16, 16), Image.Resampling.BOX).save(p)])
def test_what_keeps_the_pixels_brings_no_note(how, tmp_path): assert as_file(how, tmp_path).notes == []


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("size,n", [(16, 40), (32, 60), (64, 8), (256, 2)])
def test_real_images_bring_no_note(name, size, n, tmp_path):
    for palette in ("fixed", "random"):
        np.savez(tmp_path/"x.npz", to_bytes(get_task(name, palette=palette, size=size).sample(n, 1)[0]))
        assert read_images(tmp_path/"x.npz").notes == []


def test_what_a_model_draws_brings_no_note(tmp_path):
    np.savez(tmp_path/"x.npz", to_bytes(sample(load_pretrained("two_circles"), 16, 8, 1., 3)))
    assert read_images(tmp_path/"x.npz").notes == []


@pytest.mark.parametrize("how", [lambda im, p: im.convert("P").save(p), lambda im, p: im.quantize(16).save(p),
                                 lambda im, p: im.convert("P").save(p, format="gif")])
def test_a_palette_that_replaced_colours_is_noted(how, tmp_path):
    assert [v.split(":")[0] for v in as_file(how, tmp_path).notes] == ["8 of 8 images are limited to a palette that may have replaced colours"]


def with_gamma(im, p, value=.8):
    "A PNG that says its gamma; Pillow writes none."
    im.save(p)
    blob, data = p.read_bytes(), b"gAMA" + struct.pack(">I", round(value*1e5))
    p.write_bytes(blob[:33] + struct.pack(">I", 4) + data + struct.pack(">I", zlib.crc32(data)) + blob[33:])


LINEAR = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@pytest.mark.parametrize("how,word", [
    (with_gamma, "with a gamma other"), (functools.partial(with_gamma, value=.45455), ""),
    (lambda im, p: im.save(p, icc_profile=LINEAR), "with a colour profile"),
    (lambda im, p: im.save(p, format="tiff", icc_profile=LINEAR), "profile")])
def test_colours_that_are_not_the_pixels_are_noted(how, word, tmp_path):
    found = as_file(how, tmp_path)
    assert len(found.notes) == bool(word) and all(word in v for v in found.notes) and torch.equal(found.x, from_bytes(PIXELS))


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp"])
def test_an_orientation_tag_is_followed_and_noted(kind, pngs):
    tag = Image.Exif()
    tag[274] = 6   # a quarter turn
    more = dict(webp=dict(lossless=True), jpeg=dict(quality=100)).get(kind, {})
    ONE.rotate(90).save(pngs/"0.png", format=kind, exif=tag, **more)
    found = read_images(pngs)
    assert "1 of 8 images is turned as their orientation tag says, which viewers do too" in found.notes
    assert (found.x[0] - from_bytes(PIXELS)[0]).abs().mean() < (.05 if kind == "jpeg" else 1e-6)


def test_pale_files_are_measured(tmp_path, capsys):
    "For a file of 8 bits the range is known: nothing looks like 0..1 to it."
    pale = to_bytes(TASKS["two_squares"].sample(12, 0)[0]*.3 + .65)
    assert pale.min() > 150
    np.savez(tmp_path/"x.npz", pale), (tmp_path/"png").mkdir()
    for i, p in enumerate(pale): Image.fromarray(p).save(tmp_path/"png"/f"{i}.png")
    for where in ("x.npz", "png"):
        with warnings.catch_warnings(action="error"): status, out, err = run(capsys, *REPORT, tmp_path/where)
        assert status == 0 and "12 images" in out and "[-1,1]" not in out + err


@pytest.mark.parametrize("error", [struct.error("unpack"), KeyError("x"), IndexError(), MemoryError(), RuntimeError("decoder"),
                                   RecursionError("deep"), AssertionError(), NotImplementedError("mode")])
def test_whatever_a_decoder_raises_is_named(error, pngs, monkeypatch):
    plain = Image.open

    def broken(path):
        if Path(path).name == "3.png": raise error
        return plain(path)
    monkeypatch.setattr(images.Image, "open", broken)
    (name, why), = read_images(pngs).problems
    assert name == "3.png" and why == f"is not a whole image: {str(error) or type(error).__name__}"


@pytest.mark.parametrize("text,shape", [("0 images of 32 pixels, 8 in a row", None), ("4 images of 32 pixels, 0 in a row", None),
                                        ("4 images of 8 pixels, 4 in a row", (35, 8)), ("nonsense", None), (None, None)])
def test_a_picture_that_is_no_grid_is_named(text, shape, tmp_path, capsys):
    said = PngImagePlugin.PngInfo()
    if text is not None: said.add_text("rulediff_nb", text)
    blank(*shape or (32, 32)).save(tmp_path/"g.png", pnginfo=said)
    assert "g.png" in fails(capsys, *REPORT, tmp_path/"g.png")
    with pytest.raises(ValueError, match="g.png"): read_images(tmp_path/"g.png")
    (tmp_path/"g.png").write_bytes((tmp_path/"g.png").read_bytes()[:60])
    assert "g.png" in fails(capsys, *REPORT, tmp_path/"g.png")


def test_a_folder_that_cannot_be_looked_into_is_named(pngs, monkeypatch):
    def refuse(self): raise PermissionError(13, "Permission denied", str(self))
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match="png cannot be read: Permission denied"): read_images(pngs)


def test_a_name_takes_one_line(pngs, tmp_path, capsys):
    name = "a\n`b\x1b[31m.png"
    ONE.convert("L").save(pngs/name)
    status, out, err = run(capsys, *REPORT, pngs, "--out", tmp_path/"r.md", "--per-image", tmp_path/"i.csv")
    assert status == 0 and err.splitlines()[-1].startswith("rulediff report: a\\n`b\\x1b[31m.png is greyscale") and len(err.splitlines()) == 1
    assert (tmp_path/"r.md").read_text().splitlines()[-1].startswith("- `a\\n`b\\x1b[31m.png` is greyscale")
    assert [r["file"] for r in csv.DictReader((tmp_path/"i.csv").open(newline=""))][-1] == name
    assert shown("z\u00fc 1.png") == "z\u00fc 1.png" and shown(os.fsdecode(b"\xff")) == "\\udcff"


# ---------------------------------------------------------------- images of another task

@pytest.mark.parametrize("task,palette", [("two_circles", "fixed"), ("two_circles", "random"), ("perspective", "fixed"), ("sun_shadow", "random")])
def test_images_of_another_task_are_recognised(task, palette, tmp_path, capsys):
    np.savez(tmp_path/"x.npz", to_bytes(get_task(task, palette=palette).sample(24, 3)[0]))
    status, out, err = run(capsys, *REPORT, tmp_path/"x.npz")
    refusals, said = err.splitlines()
    counts = [int(v.split(" (")[0]) for v in refusals.removeprefix("rulediff report: the ruler refused ").split(", ")]
    readable = float(re.search(r"readable +([\d.]+)", out)[1])
    assert status == 0 and sum(counts) == round(24*(1 - readable)) > 12 and counts == sorted(counts, reverse=True)
    assert all(r in REASONS[1:] for r in re.findall(r"\((.*?)\)", refusals))
    assert f"look like {task}" in said and f"palette {palette}" in said and " of 24 can be read then" in said


def test_images_of_the_task_bring_no_suggestion(pngs, capsys):
    assert run(capsys, *REPORT, pngs)[2] == ""
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(pngs/"5.png")
    err = run(capsys, *REPORT, pngs)[2]
    assert err.startswith("rulediff report: the ruler refused 1 (") and err.count("\n") == 1


def test_images_of_no_task_bring_no_suggestion(tmp_path, capsys):
    np.savez(tmp_path/"x.npz", np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    err = run(capsys, *REPORT, tmp_path/"x.npz")[2]
    assert "the ruler refused 8 (" in err and err.count("\n") == 1


def test_another_palette_is_named_once(tmp_path, capsys):
    np.savez(tmp_path/"x.npz", to_bytes(get_task("two_squares", palette="random").sample(24, 3)[0]))
    _, out, err = run(capsys, *REPORT, tmp_path/"x.npz")
    assert out.count("palette='random' reads") == 1 and "look like" not in err
    _, out, err = run(capsys, *REPORT, tmp_path/"x.npz", "--palette", "random")
    assert "palette='fixed' reads" not in out and err == ""


@pytest.mark.parametrize("size,n,tried", [(16, 100, 64), (32, 100, 64), (128, 30, 16), (256, 30, 8)])
def test_how_many_images_are_shown_to_the_rulers(size, n, tried, monkeypatch):
    seen = []
    def measure(task, x): seen.append(x.shape); return real(TASK, x[:, :, :16, :16])
    real = images.measure
    monkeypatch.setattr(images, "measure", measure)
    found = fits(torch.ones(n, 3, size, size))
    assert set(seen) == {(tried, 3, size, size)} and len(seen) == len(found) == 2*len(TASKS) and {v.n for v in found} == {tried}


def test_tasks_that_read_the_same_are_all_named(monkeypatch):
    both = [Fit(9, 9, 9, k, "fixed") for k in ("sun_shadow", "sun_shadow_free")]
    every = [*both, Fit(9, 9, 9, "sun_shadow", "random"), Fit(1, 1, 9, "two_squares", "fixed")]
    monkeypatch.setattr(images, "fits", lambda x: every)
    said = suggestion(TASKS["two_squares"], torch.ones(9, 3, 32, 32), .1)
    assert said == "the images look like sun_shadow or sun_shadow_free, palette fixed: 9 of 9 can be read then, 1 as two_squares fixed"
    assert suggestion(TASKS["sun_shadow"], torch.ones(9, 3, 32, 32), .1) == ""


def test_refusals_are_counted_by_reason():
    x = from_bytes(PIXELS)
    x[0], x[3:5] = 1., math.nan
    f = TASKS["two_squares"].features(x)
    assert refused(TASKS["two_squares"], f) == {"not finite": 2, "an object is missing": 1}


# ---------------------------------------------------------------- files and arrays

def test_a_file_that_may_not_be_read_is_named(pngs, monkeypatch):
    plain = Image.open

    def refuse(path):
        if Path(path).name == "3.png": raise PermissionError(13, "Permission denied", str(path))
        return plain(path)
    monkeypatch.setattr(images.Image, "open", refuse)
    assert read_images(pngs).problems == [("3.png", "is not a whole image: Permission denied")]


def test_a_picture_that_would_fill_the_memory_is_not_decoded(pngs):
    blob = bytearray((pngs/"0.png").read_bytes())
    for side in (12_000, 50_000):   # one that Pillow warns of, one that it refuses
        blob[16:24] = struct.pack(">II", side, side)
        blob[29:33] = struct.pack(">I", zlib.crc32(blob[12:29]))
        (pngs/"z.png").write_bytes(blob)
        assert [p.name for p in read_images(pngs).problems] == ["z.png"]


def test_hidden_files_folders_and_other_files_are_left_alone(pngs):
    (pngs/"inner").mkdir()
    for p in (pngs/"inner"/"a.png", pngs/".hidden.png", pngs/"._0.png"): blank(8, 8).save(p)
    for name in ("notes.txt", "Thumbs.db", "png"): (pngs/name).write_text("no image")
    blank(32, 32).save(pngs/"UPPER.PNG")
    found = read_images(pngs)
    assert found.names == [*(f"{i}.png" for i in range(8)), "UPPER.PNG"] and not found.problems


def test_the_size_that_most_files_have_is_measured(tmp_path, capsys):
    for i, s in enumerate((16, 24, 24, 16, 24, 300)): blank(s, s).save(tmp_path/f"{i}.png")
    found = read_images(tmp_path)
    assert found.names == ["1.png", "2.png", "4.png"] and found.x.shape[-1] == 24
    assert [p.why[:8] for p in found.problems] == ["is 16x16", "is 16x16", "is 300x3"]
    (tmp_path/"4.png").unlink()
    assert read_images(tmp_path).names == ["0.png", "3.png"]   # a tie: the size of the first
    with pytest.raises(ValueError, match="1.png is 24x24, most"): (tmp_path/"5.png").unlink(), load_images(tmp_path)


@pytest.mark.parametrize("size", [16, 17, 48, 256])
def test_all_sizes_of_tasks_are_read(size, tmp_path, capsys):
    x = TASK.with_(size=size).sample(3, 0)[0]
    for i, v in enumerate(to_bytes(x)): Image.fromarray(v).save(tmp_path/f"{i}.png")
    assert (load_images(tmp_path) - x).abs().max() < 1/127
    if size < 32:
        status, out, _ = run(capsys, *REPORT, tmp_path, "--palette", "fixed")
        assert status == 0 and f"size={size}" in out


def test_nothing_that_can_be_used_is_one_line(tmp_path, capsys):
    for i in range(5): (tmp_path/f"{i}.png").write_text("x")
    err = fails(capsys, *REPORT, tmp_path)
    assert "none of 5 files" in err and "2.png is not an image" in err and "3.png" not in err and "2 more" in err
    blank(300, 300).save(tmp_path/"0.png")
    assert "is 300x300" in fails(capsys, *REPORT, tmp_path)
    for i in range(1, 5): (tmp_path/f"{i}.png").unlink()
    assert fails(capsys, *REPORT, tmp_path).endswith("16 to 256 pixels a side\n")


def test_palettes_and_alpha(pngs, capsys):
    want = load_images(pngs)
    see_through(ONE, 255).save(pngs/"0.png")
    see_through(ONE, 255).save(pngs/"1.png")
    see_through(ONE, 128).save(pngs/"2.png")
    ONE.quantize(256).save(pngs/"3.png")
    ONE.quantize(256).save(pngs/"4.gif")
    indexed = Image.fromarray(np.full((32, 32), 1, np.uint8)).convert("P")
    indexed.putpalette([255, 0, 0, 0, 0, 255])
    indexed.save(pngs/"5.png", transparency=1)       # blue, and blue is transparent
    blank(32, 32).save(pngs/"6.png", transparency=(0, 0, 0))
    found = read_images(pngs)
    assert not found.problems and found.notes == ["2 of 9 images are RGBA, opaque everywhere: alpha dropped",
                                                  "3 of 9 images are transparent: composed onto white"]
    x = dict(zip(found.names, found.x))
    for name in ("0.png", "1.png", "3.png", "4.gif"): assert (x[name] - want[0]).abs().max() < 1e-6, name
    assert (x["2.png"] - (1 + (want[0] - 1)*128/255)).abs().max() < 2/127
    assert (x["5.png"] == 1).all() and (x["6.png"] == 1).all() and (x["7.png"] - want[7]).abs().max() < 1e-6
    status, out, err = run(capsys, *REPORT, pngs)
    assert status == 0 and err.splitlines()[:2] == [f"rulediff report: {v}" for v in found.notes] and "9 read, 0 files" in out


def test_damaged_images_are_named(pngs, capsys):
    blob = (pngs/"3.png").read_bytes()
    cuts = [b"", b"x", blob[:10], blob[:len(blob)//2], blob[:-12]]
    for bad in [*cuts, *(blob[:i] + bytes([blob[i] ^ 0x5a]) + blob[i + 1:] for i in range(8, len(blob), 5))]:
        (pngs/"3.png").write_bytes(bad)
        try: load_images(pngs)
        except ValueError as e: assert "3.png" in str(e)   # other flips leave a picture of the same size: not to be known
    (pngs/"3.png").write_bytes(cuts[2])
    assert "3.png" in fails(capsys, *REPORT, pngs, "--strict") and read_images(pngs).problems[0].name == "3.png"


NPZ = {"floats": dict(a=PIXELS.astype(np.float32)), "two": dict(a=PIXELS, b=PIXELS), "none": {}, "flat": dict(a=PIXELS[0]),
       "grey": dict(a=PIXELS[..., :1]), "oblong": dict(a=PIXELS[:, :16]), "empty": dict(a=PIXELS[:0]), "tiny": dict(a=PIXELS[:, :8, :8]),
       "objects": dict(a=np.array([{}], dtype=object)), "deep": dict(a=PIXELS.astype(np.uint16)), "greys": dict(a=PIXELS[..., 0]),
       "five": dict(a=np.zeros((2, 32, 32, 5), np.uint8)), "large": dict(a=np.zeros((2, 257, 257, 3), np.uint8)), "number": dict(a=3)}
WORD = {"grey": "by their colours", "greys": "by their colours", "deep": "uint16", "large": "16 to 256", "tiny": "16 to 256",
        "oblong": "with s from", "empty": "no images", "objects": "not a whole .npz"}


@pytest.mark.parametrize("how", NPZ)
def test_arrays_that_do_not_fit(how, tmp_path, capsys):
    np.savez(tmp_path/"x.npz", **NPZ[how])
    err = fails(capsys, *REPORT, tmp_path/"x.npz")
    assert "x.npz" in err and WORD.get(how, "holds") in err


def test_an_array_with_alpha(tmp_path):
    alpha = np.full((*PIXELS.shape[:3], 1), 255, np.uint8)
    alpha[2:5] = 0
    for order in ((0, 1, 2, 3), (0, 3, 1, 2)):
        np.savez(tmp_path/"x.npz", np.concatenate([PIXELS, alpha], 3).transpose(order))
        found = read_images(tmp_path/"x.npz")
        assert found.notes[1] == "3 of 8 images are transparent: composed onto white" and (found.x[2:5] == 1).all()
        assert torch.equal(found.x[5:], from_bytes(PIXELS[5:])) and found.names[7] == "x.npz[7]"


def npy(): np.save(f := io.BytesIO(), PIXELS); return f.getvalue()


@pytest.mark.parametrize("blob", [b"", b"x"*100, b"PK\3\4" + b"x"*100, None, npy()])
def test_a_damaged_npz_is_named(blob, tmp_path, capsys):
    np.savez(tmp_path/"x.npz", PIXELS)
    (tmp_path/"x.npz").write_bytes((tmp_path/"x.npz").read_bytes()[:-50] if blob is None else blob)
    assert "x.npz" in fails(capsys, *REPORT, tmp_path/"x.npz")


@pytest.mark.parametrize("where", ["missing", "empty", "0.png"])
def test_nothing_to_report_on(where, pngs, tmp_path, capsys):
    (pngs/"empty").mkdir()
    assert where in fails(capsys, *REPORT, pngs/where)


def test_a_report_that_cannot_be_written(pngs, capsys):
    assert "cannot write" in fails(capsys, *REPORT, pngs, "--out", pngs/"0.png"/"r.csv")


MEASURED = ("a", "b", "log_ratio", "measured_px", "predicted_px")


@pytest.fixture
def mixed(pngs):
    "Eight good images, one of them unreadable to the ruler, and two files that are no use."
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(pngs/"5.png")
    for how in ("grey", "cut jpeg"): BAD[how][0](pngs/BAD[how][1])
    return pngs


def test_a_row_per_image(mixed, tmp_path, capsys):
    assert run(capsys, *REPORT, mixed, "--per-image", tmp_path/"i.csv")[0] == 0
    rows = list(csv.DictReader((tmp_path/"i.csv").open()))
    assert list(rows[0]) == ["schema", "file", "readable", "why", *MEASURED]
    assert [r["file"] for r in rows] == [*(f"{i}.png" for i in range(8)), "z.jpg", "z.png"]
    assert [r["readable"] for r in rows] == ["1"]*5 + ["0"] + ["1"]*2 + ["0"]*2 and {r["schema"] for r in rows} == {str(SCHEMA)}
    assert {r["why"] for r in rows[:5]} == {"read"} and rows[5]["why"] in REASONS[1:]
    assert rows[9]["why"].startswith("not used: is greyscale")
    for r in rows[5], rows[8], rows[9]: assert not any(r[k] for k in MEASURED)
    f = TASKS["two_squares"].factors(8, 0)
    for i in (0, 1, 2, 3, 4, 6, 7):
        a, b, log, got, want = (float(rows[i][k]) for k in MEASURED)
        assert abs(got - 32*f.l2[i]) < .05 and abs(want - 48*f.l1[i]) < .05 and abs(log - math.log(b/a)) < 1e-4 and abs(b*32 - got) < 1e-3


def test_a_row_per_image_of_an_array(tmp_path, capsys):
    np.savez(tmp_path/"x.npz", PIXELS)
    for option in ("--per-image", "--per_image"):
        assert run(capsys, *REPORT, tmp_path/"x.npz", option, tmp_path/"i.CSV")[0] == 0
    assert run(capsys, *REPORT, tmp_path/"x.npz", f"--per-image={tmp_path}/j.csv")[0] == 0
    assert [r["file"] for r in csv.DictReader((tmp_path/"j.csv").open())] == [f"x.npz[{i}]" for i in range(8)]
    assert (tmp_path/"i.CSV").read_text() == (tmp_path/"j.csv").read_text()


def test_sides_that_are_not_finite_are_no_reading():
    task = TASKS["two_squares"]
    f = task.features(from_bytes(PIXELS))
    f = f._replace(l1=f.l1.clone().index_fill_(0, torch.tensor([2]), math.nan))
    found = images.Images(from_bytes(PIXELS), list("abcdefgh"), [], [])
    rows = list(csv.DictReader(io.StringIO(images.image_table(task, found, f).to_csv(index=False))))
    assert [r["why"] for r in rows] == ["read"]*2 + ["not finite"] + ["read"]*5 and rows[2]["readable"] == "0" and not rows[2]["a"]
    assert refused(task, f) == {"not finite": 1}


@pytest.mark.parametrize("name", ["r.md", "r.MD"])
def test_a_report_as_markdown(name, mixed, tmp_path, capsys):
    see_through(ONE, 255).save(mixed/"0.png")
    assert run(capsys, *REPORT, mixed, "--out", tmp_path/name)[0] == 0
    text = (tmp_path/name).read_text()
    assert text.startswith("# name=two_squares size=32 palette=fixed\n\n8 read, 2 files could not be used.\n")
    assert "\n1 of 8 images is RGBA, opaque everywhere: alpha dropped.\n" in text and "\nthe ruler refused 1 (" in text
    table = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert table[0] == ["", "8 images", "95 % interval", "floor", "chance"] and {len(r) for r in table} == {5}
    rows = {r[0]: r for r in table[2:]}
    assert [k for k in rows if k not in ("lost", "missed")] == list(ROWS) and rows["memorized"][1] == "not measured"
    assert list(rows)[ROWS.index("rule_gap"):][:3] == ["rule_gap", "lost", "missed"]   # the parts stand under the whole
    assert rows["readable"][1:] == ["0.875", "0.625 .. 1.000", "1.000", "1.000"]
    assert text.endswith(f"## Not used\n\n- `z.jpg` {read_images(mixed).problems[0].why}\n- `z.png` {read_images(mixed).problems[1].why}\n")


def test_a_markdown_report_with_nothing_amiss(pngs, tmp_path, capsys):
    assert run(capsys, *REPORT, pngs, "--out", tmp_path/"r.md")[0] == 0
    text = (tmp_path/"r.md").read_text()
    assert "8 read, 0 files could not be used." in text and "Not used" not in text and "\n\n\n" not in text


@pytest.mark.parametrize("args,words", [(["--out", "r.txt"], (".csv or .md", "r.txt")), (["--out", "report"], (".csv or .md",)),
                                        (["--per-image", "i.md"], ("--per-image", ".csv")), (["--per-image", "i"], (".csv",))])
def test_an_unknown_ending_is_refused_before_any_work(args, words, pngs, capsys, monkeypatch):
    monkeypatch.setattr(cli, "read_images", lambda *a: pytest.fail("worked before it looked at the ending"))
    err = fails(capsys, *REPORT, pngs, *args)
    assert all(w in err for w in words)


def test_a_list_that_cannot_be_written(pngs, capsys):
    assert "cannot write" in fails(capsys, *REPORT, pngs, "--per-image", pngs/"0.png"/"i.csv")


def test_a_grid_is_read_back(tmp_path):
    from rulediff_nb.core import save_images, to_bytes
    x = get_task("two_squares").sample(5, 0)[0]
    got = read_images(save_images(x, tmp_path/"grid.png", cols=3))
    assert (to_bytes(got.x) == to_bytes(x)).all() and got.names[4] == "grid.png[4]" and not got.problems
