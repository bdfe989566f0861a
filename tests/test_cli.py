"The commands: exit codes, one-line errors, a reader's own images, interrupted runs, train to weights to demo."
import csv
import functools
import json
import math
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tree import ROOT, clean_env

from rulediff_nb import cli
from rulediff_nb.cli import SCHEMA, SHOWN, load_images, main, read_images
from rulediff_nb.classifier import classifier, load_classifier
from rulediff_nb.core import from_bytes, to_bytes
from rulediff_nb.features import REASONS
from rulediff_nb.grid import csv_text
from rulediff_nb.metrics import ROWS
from rulediff_nb.sample import load_pretrained
from rulediff_nb.store import StoreError, load_tensors, save_release
from rulediff_nb.tasks import TASKS, get_task
from rulediff_nb.train import train_steps
from rulediff_nb.unet import unet

torch.set_num_threads(1)
REPORT = "report", "--task", "two_squares", "--images"   # then the images
SMALL = dict(channels=(8, 8, 16), head_dim=8, batch=4, prediction="sample", sigma_data=0.)
TASK = get_task("two_squares", palette="fixed", size=16)
PIXELS = to_bytes(TASKS["two_squares"].sample(8, 0)[0])


def run(capsys, *args):
    "Exit status, standard output, standard error; argparse's exit counts as a status."
    try: status = main([str(a) for a in args])
    except SystemExit as e: status = e.code
    return status, *capsys.readouterr()


def fails(capsys, *args):
    "The single line that a user reads when a command cannot do it."
    status, _, err = run(capsys, *args)
    said = err.split("\r")[-1]   # a bar may have stood there
    assert status == 1 and said.startswith(f"rulediff {args[0]}: ") and said.count("\n") == 1 and "Traceback" not in err, err
    return said


def release(folder, **more):
    m = unet("laptop", TASK, **SMALL)
    said = dict(recipe=m.recipe.to_dict(), seed=0, set_seed=0, steps=1, images_in_set=30)
    save_release(folder, "two_squares-fixed", m.state_dict(), said | more)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    "A folder with one tiny model, in place of the shipped ones."
    release(tmp_path/"weights")
    monkeypatch.setattr(cli, "WEIGHTS", tmp_path/"weights")
    monkeypatch.setattr(cli, "load_pretrained", functools.partial(load_pretrained, folder=tmp_path/"weights"))
    monkeypatch.setattr(cli, "CLASSIFIER_WEIGHTS", tmp_path/"classifiers")
    monkeypatch.setattr(cli, "load_classifier", functools.partial(load_classifier, folder=tmp_path/"classifiers"))
    return tmp_path/"weights"


@pytest.fixture
def pngs(tmp_path):
    (tmp_path/"png").mkdir()
    for i, p in enumerate(PIXELS): Image.fromarray(p).save(tmp_path/"png"/f"{i}.png")
    return tmp_path/"png"


# ---------------------------------------------------------------- usage

@pytest.mark.parametrize("args,status", [([], 0), (["-h"], 0), (["--help"], 0), (["paint"], 2), (["--n", "3"], 2), ([""], 2)])
def test_usage(args, status, capsys):
    found, out, _ = run(capsys, *args)
    assert found == status and all(k in out for k in ("usage: rulediff", "demo", "train", "report", "doctor"))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0 and f"usage: rulediff {command}" in out


@pytest.mark.parametrize("args", [["demo", "--n", "many"], ["demo", "--paint", "1"], ["train"],
                                  ["train", "two_squares", "--steps", "1.5"]])
def test_arguments_that_cannot_be_parsed(args, capsys):
    status, _, err = run(capsys, *args)
    assert status == 2 and f"usage: rulediff {args[0]}" in err


@pytest.mark.parametrize("args", [["train", "moon"], ["report", "--task", "moon", "--images", "PNG"]])
def test_unknown_worlds_list_the_known_ones(args, capsys, pngs, tmp_path):
    err = fails(capsys, *[str(pngs) if a == "PNG" else a for a in args], *(["--out", tmp_path/"runs"] if args[0] == "train" else []))
    assert "'moon'" in err and all(k in err for k in TASKS) and not (tmp_path/"runs").exists()


@pytest.mark.parametrize("args,word", [
    (["--palette", "sepia"], "sepia"), (["--preset", "desktop"], "laptop, published"), (["--steps", "0"], "steps"), (["--n", "-1"], "n must"),
    (["--seed", "-1"], "seed"), (["--score", "3"], "score")])
def test_train_refuses_before_it_works(args, word, capsys, tmp_path):
    assert word in fails(capsys, "train", "two_squares", "--out", tmp_path/"runs", *args) and not (tmp_path/"runs").exists()


# ---------------------------------------------------------------- demo

def test_demo(weights, tmp_path, capsys):
    status, out, _ = run(capsys, "demo", "--n", 16, "--steps", 2, "--out", tmp_path/"d")
    assert status == 0 and sorted(p.name for p in (tmp_path/"d").iterdir()) == ["demo.csv", "demo.png", "demo.txt"]
    text = (tmp_path/"d"/"demo.txt").read_text()
    assert text.strip() in out and all(k in text for k in (*SHOWN, "floor", "model", "chance", "two_squares fixed"))
    assert Image.open(tmp_path/"d"/"demo.png").size[0] > 100
    rows = list(csv.DictReader((tmp_path/"d"/"demo.csv").open()))
    assert [r["images"] for r in rows] == ["floor", "model", "chance"] and {r["schema"] for r in rows} == {str(SCHEMA)}
    for r in rows:
        for k in SHOWN: assert not r[k] or np.isfinite(float(r[k])), "no NaN in a stored table"


def test_demo_has_a_guided_row_where_a_classifier_is_shipped(weights, tmp_path, capsys):
    clf = classifier("laptop", TASK, channels=(8, 8), attention=(False, False), width=8)
    save_release(tmp_path/"classifiers", "two_squares-fixed-classifier", clf.state_dict(), dict(recipe=clf.recipe.to_dict()))
    for scale, want in ((2, ["floor", "model", "guided", "chance"]), (0, ["floor", "model", "chance"])):
        status, *_ = run(capsys, "demo", "--n", 16, "--steps", 2, "--scale", scale, "--out", tmp_path/"d")
        rows = list(csv.DictReader((tmp_path/"d"/"demo.csv").open()))
        assert status == 0 and [r["images"] for r in rows] == want
    assert "finite" in fails(capsys, "demo", "--n", 16, "--steps", 2, "--scale", "inf", "--out", tmp_path/"e")


def test_stored_tables(tmp_path, capsys):
    (tmp_path/"guidance").mkdir()
    names = cli.STORED["guidance"]
    def line(seed, gap): return {k: "x" for k in names.keys} | {k: .5 for k in names.names} | dict(rule_gap=gap, scale=2., seed=seed)
    (tmp_path/"guidance"/"table.csv").write_text(csv_text([line(1, .1), line(2, .3)]))
    for args in ((), ("--table", "guidance")):
        status, out, _ = run(capsys, "report", *args, "--results", tmp_path)
        assert status == 0 and "0.200 [0.100, 0.300]" in out and "make guidance" in out and "2 lines" in out
    assert "known: guidance" in fails(capsys, "report", "--table", "none", "--results", tmp_path)
    assert "no table" in fails(capsys, "report", "--table", "sampling", "--results", tmp_path)
    assert "not both" in fails(capsys, "report", "--table", "guidance", "--task", "two_squares", "--results", tmp_path)
    assert "--task" in fails(capsys, "report", "--results", tmp_path/"nothing")


@pytest.mark.parametrize("name", cli.STORED)
def test_every_stored_table_can_be_printed(name, capsys):
    status, out, _ = run(capsys, "report", "--table", name)
    assert status == 0 and cli.STORED[name].command in out
    target = cli.STORED[name].command.removeprefix("make ")
    assert f"\n{target}:" in (ROOT/"Makefile").read_text()


def test_demo_again_gives_the_same_table(weights, tmp_path, capsys):
    tables = []
    for d in "ab":
        run(capsys, "demo", "--n", 16, "--steps", 2, "--out", tmp_path/d)
        tables.append((tmp_path/d/"demo.csv").read_text())
    assert tables[0] == tables[1]


def test_a_model_that_has_learned_nothing_is_measured(weights, tmp_path, capsys, monkeypatch):
    "Pale images are unreadable, not a mistake of the caller's."
    pale = .5 + .5*torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(cli, "sample_batches", lambda *args, **kw: iter([pale]))
    status, out, err = run(capsys, "demo", "--n", 16, "--out", tmp_path/"d")
    assert status == 0 and "two_squares fixed" in out, err


@pytest.mark.parametrize("args,word", [(["--n", "0"], "n must"), (["--n", "-5"], "n must"),
                                       (["--steps", "0"], "steps"), (["--steps", "1001"], "steps"), (["--seed", "-1"], "seed"),
                                       (["--only", "moon"], "two_squares-fixed")])
def test_demo_refuses_before_it_works(args, word, weights, tmp_path, capsys):
    assert word in fails(capsys, "demo", *args, "--out", tmp_path/"d") and not (tmp_path/"d").exists()


def test_demo_into_a_place_that_cannot_be_written(weights, tmp_path, capsys, monkeypatch):
    (tmp_path/"file").write_text("x")
    monkeypatch.setattr(cli, "load_pretrained", lambda *a, **k: pytest.fail("worked before it looked at the folder"))
    assert "cannot write" in fails(capsys, "demo", "--n", 16, "--out", tmp_path/"file"/"d")


def test_demo_without_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "WEIGHTS", tmp_path/"none")
    assert "there are: none" in fails(capsys, "demo", "--out", tmp_path/"d")


def test_demo_with_damaged_weights(weights, tmp_path, capsys):
    f = weights/"two_squares-fixed.safetensors"
    f.write_bytes(f.read_bytes()[:-1])
    assert "two_squares-fixed.safetensors" in fails(capsys, "demo", "--n", 16, "--out", tmp_path/"d") and not list((tmp_path/"d").iterdir())


def test_a_disk_that_fills_up_in_the_demo(weights, tmp_path, capsys, monkeypatch):
    plain = cli.write_atomic

    def full(path, blob):
        if Path(path).suffix == ".txt": raise OSError(28, "No space left on device")
        return plain(path, blob)
    monkeypatch.setattr(cli, "write_atomic", full)
    assert "No space" in fails(capsys, "demo", "--n", 16, "--steps", 1, "--out", tmp_path/"d")
    assert [p.name for p in (tmp_path/"d").iterdir()] == ["demo.png"]


INTERRUPTED = """
import functools, signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell in the background may have it ignored
torch.set_num_threads(1)
from pathlib import Path
from rulediff_nb import cli
from rulediff_nb.sample import load_pretrained
def load(*args, **kw):
    print('GO', flush=True)
    return load_pretrained(*args, **kw, folder=Path(sys.argv[1]))
cli.WEIGHTS, cli.load_pretrained = Path(sys.argv[1]), load
sys.exit(cli.main(['demo', '--n', '512', '--steps', '1000', '--out', sys.argv[2]]))
"""


def test_an_interrupted_demo(tmp_path):
    release(tmp_path/"w")
    p = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path/"w"), str(tmp_path/"d")], cwd=ROOT, text=True,
                         env=clean_env(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert p.stdout.readline() == "GO\n"
        time.sleep(1)
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=120)
    finally: p.kill()
    assert p.returncode == 130 and "interrupted" in err and "Traceback" not in err and not list((tmp_path/"d").iterdir())


def test_a_reader_that_leaves_is_no_error():
    report = "import sys; from rulediff_nb.cli import main; sys.exit(main(['report', '--table', 'guidance']))"
    p = subprocess.Popen([sys.executable, "-c", report], cwd=ROOT, env=clean_env(), text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE)
    p.stdout.close()
    assert p.stderr.read() == "" and p.wait(timeout=120) == 141


# ---------------------------------------------------------------- train

@pytest.fixture
def tiny(monkeypatch):
    "The laptop preset with a tiny network, and a short report."
    monkeypatch.setattr(cli, "unet", functools.partial(unet, **SMALL))
    monkeypatch.setitem(cli.REPORT, "steps", 1)


TRAIN = ["train", "two_squares", "--steps", 4, "--n", 20, "--score", 64]


def interrupt_after(k):
    def progress(steps, *args, **kw):
        for s in steps:
            yield s
            if s.step == k: raise KeyboardInterrupt
    return progress


def test_train_interrupted_resumed_released(tiny, tmp_path, capsys, monkeypatch):
    status, out, _ = run(capsys, *TRAIN, "--out", tmp_path/"a", "--weights", tmp_path/"wa")
    assert status == 0 and "rule_gap" in out
    with monkeypatch.context() as m:
        m.setattr(cli, "progress", interrupt_after(2))
        status, _, err = run(capsys, *TRAIN, "--out", tmp_path/"b", "--weights", tmp_path/"wb")
    assert status == 130 and "resumes" in err and not (tmp_path/"wb").exists()
    run_b = next((tmp_path/"b").iterdir())
    assert load_tensors(run_b/"checkpoint.safetensors")[1]["step"] == 2
    with pytest.raises(ValueError, match="partial, 2 of 4 steps"): cli.release(run_b, tmp_path/"wb")
    assert run(capsys, *TRAIN, "--out", tmp_path/"b", "--weights", tmp_path/"wb")[0] == 0
    one, two = ((tmp_path/w/"two_squares-fixed.safetensors").read_bytes() for w in ("wa", "wb"))
    assert one == two
    m = load_pretrained("two_squares", folder=tmp_path/"wb")
    said = m.manifest
    assert said["steps"] == 4 and said["images_in_set"] == 20 and said["images_seen"] == 16 and said["seed"] == 0
    assert said["report"]["n"] == 64 and {"rule_gap", "readable", "memorized"} <= set(said["report"]["rows"])
    assert {"revision", "hardware", "sha256", "torch", "diffusers"} <= set(said) and json.dumps(said, allow_nan=False)


def test_train_beside_its_checkpoint_and_again(tiny, tmp_path, capsys):
    for _ in range(2): assert run(capsys, *TRAIN, "--out", tmp_path)[0] == 0   # a finished run is measured again, not repeated
    names = sorted(p.name for p in next(tmp_path.iterdir()).iterdir() if p.name != ".lock")
    assert names == ["checkpoint.safetensors", "two_squares-fixed.json", "two_squares-fixed.safetensors"]


def test_train_with_a_damaged_checkpoint(tiny, tmp_path, capsys):
    run(capsys, *TRAIN, "--out", tmp_path)
    f = next(tmp_path.iterdir())/"checkpoint.safetensors"
    f.write_bytes(f.read_bytes()[:500])
    assert "checkpoint.safetensors" in fails(capsys, *TRAIN, "--out", tmp_path)


def test_train_that_blows_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "unet", functools.partial(unet, **SMALL, lr=1e30, warmup=0))
    assert "learning rate" in fails(capsys, *["20" if a == 4 else a for a in TRAIN], "--out", tmp_path)


# ---------------------------------------------------------------- report

@pytest.mark.parametrize("args", [["--task", "two_squares"], ["--images", "PNG"]])
def test_report_wants_both(args, pngs, capsys):
    assert "--images" in fails(capsys, "report", *[pngs if a == "PNG" else a for a in args])


def test_report_on_a_folder(pngs, tmp_path, capsys):
    (pngs/"notes.txt").write_text("no image")
    status, out, _ = run(capsys, *REPORT, pngs, "--out", tmp_path/"r.csv")
    assert status == 0 and "8 images" in out and "not measured" in out
    rows = list(csv.DictReader((tmp_path/"r.csv").open()))
    assert [r["images"] for r in rows] == ["floor", "images", "chance"] and float(rows[1]["readable"]) == 1
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
    assert status == 0 and "8 images" in out and "8 read, 3 files could not be used:" in out
    for _, name, word in (BAD[k] for k in ("grey", "cut jpeg", "gif")):
        assert f"  {name} " in out and f"rulediff report: {name} " in err and word in out
    assert len(err.splitlines()) == 3
    for p in ("z.jpg", "z.gif"): (pngs/p).unlink()
    assert "8 read, 1 file could not be used:" in run(capsys, *REPORT, pngs)[1]
    (pngs/"z.png").unlink()
    status, out, err = run(capsys, *REPORT, pngs)
    assert out.rstrip().endswith("8 read, 0 files could not be used") and err == ""


def test_a_file_that_may_not_be_read_is_named(pngs, monkeypatch):
    plain = Image.open

    def refuse(path):
        if Path(path).name == "3.png": raise PermissionError(13, "Permission denied", str(path))
        return plain(path)
    monkeypatch.setattr(cli.Image, "open", refuse)
    assert read_images(pngs).problems == [("3.png", "is not a whole image: Permission denied")]


def test_a_picture_that_would_fill_the_memory_is_not_decoded(pngs):
    blob = bytearray((pngs/"0.png").read_bytes())
    for side in (12_000, 50_000):   # one that Pillow warns of, one that it refuses
        blob[16:24] = struct.pack(">II", side, side)
        blob[29:33] = struct.pack(">I", zlib.crc32(blob[12:29]))
        (pngs/"z.png").write_bytes(blob)
        assert [p.name for p in read_images(pngs).problems] == ["z.png"]


def test_hidden_files_folders_and_other_files_are_left_alone(pngs):
    (pngs/"inner.png").mkdir()
    for p in (pngs/"inner.png"/"a.png", pngs/".hidden.png", pngs/"._0.png"): blank(8, 8).save(p)
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
def test_all_sizes_of_worlds_are_read(size, tmp_path, capsys):
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
    assert not found.problems and found.notes == ["2 of 9 images: alpha channel that is opaque everywhere, dropped",
                                                  "3 of 9 images: transparent, composed onto white"]
    x = dict(zip(found.names, found.x))
    for name in ("0.png", "1.png", "3.png", "4.gif"): assert (x[name] - want[0]).abs().max() < 1e-6, name
    assert (x["2.png"] - (1 + (want[0] - 1)*128/255)).abs().max() < 2/127
    assert (x["5.png"] == 1).all() and (x["6.png"] == 1).all() and (x["7.png"] - want[7]).abs().max() < 1e-6
    status, out, err = run(capsys, *REPORT, pngs)
    assert status == 0 and err.splitlines() == [f"rulediff report: {v}" for v in found.notes] and "9 read, 0 files" in out


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
        assert found.notes[1] == "3 of 8 images: transparent, composed onto white" and (found.x[2:5] == 1).all()
        assert torch.equal(found.x[5:], from_bytes(PIXELS[5:])) and found.names[7] == "x.npz[7]"


@pytest.mark.parametrize("blob", [b"", b"x"*100, b"PK\3\4" + b"x"*100, None])
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
    found = cli.Images(from_bytes(PIXELS), list("abcdefgh"), [], [])
    rows = list(csv.DictReader(cli.image_table(task, found, f).splitlines()))
    assert [r["why"] for r in rows] == ["read"]*2 + ["not finite"] + ["read"]*5 and rows[2]["readable"] == "0" and not rows[2]["a"]


@pytest.mark.parametrize("name", ["r.md", "r.MD"])
def test_a_report_as_markdown(name, mixed, tmp_path, capsys):
    see_through(ONE, 255).save(mixed/"0.png")
    assert run(capsys, *REPORT, mixed, "--out", tmp_path/name)[0] == 0
    text = (tmp_path/name).read_text()
    assert text.startswith("# name=two_squares size=32 palette=random\n\n8 read, 2 files could not be used.\n")
    assert "\n1 of 8 images: alpha channel that is opaque everywhere, dropped.\n" in text
    table = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert table[0] == ["", "8 images", "95 % interval", "floor", "chance"] and {len(r) for r in table} == {5}
    rows = {r[0]: r for r in table[2:]}
    assert tuple(rows) == ROWS and rows["memorized"][1] == "not measured"
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


# ---------------------------------------------------------------- doctor

def test_doctor(weights, tmp_path, capsys):
    status, out, _ = run(capsys, "doctor", "--out", tmp_path/"d")
    assert status == 0 and all(k in out for k in (*cli.LIBRARIES, torch.__version__, "device", "can be written"))
    assert out.splitlines()[-1].split() == ["two_squares-fixed", "ok"] and not list((tmp_path/"d").glob("*"))


def test_doctor_sees_what_is_wrong(weights, tmp_path, capsys):
    f = weights/"two_squares-fixed.safetensors"
    f.write_bytes(f.read_bytes() + b"x")
    (tmp_path/"file").write_text("")
    status, out, _ = run(capsys, "doctor", "--out", tmp_path/"file"/"d")
    assert status == 0 and "cannot write" in out and "is damaged" in out


def test_doctor_names_a_missing_library(weights, tmp_path, capsys, monkeypatch):
    import importlib.metadata as meta
    plain = meta.version

    def version(name):
        if name == "ipywidgets": raise meta.PackageNotFoundError(name)
        return plain(name)
    monkeypatch.setattr(meta, "version", version)
    status, out, _ = run(capsys, "doctor", "--out", tmp_path/"d")
    assert status == 0 and "ipywidgets" in out and "two_squares-fixed" in out


def test_a_run_goes_on_with_attention_and_another_rate(tmp_path):
    "What a finished run has learned is where the next one begins, also where that one has attention at more resolutions."
    assert cli.changes("laptop", 0., False) == {}
    model, remarks, _ = cli.begin(unet("laptop", "two_squares", 3), 3, "")
    for _ in train_steps(model, model.recipe.task.sample(8, 3)[0], tmp_path/"run", 2, 3, remarks=remarks): pass
    more, remarks, batches = cli.begin(unet("laptop", "two_squares", 3, **cli.changes("laptop", 1e-3, True)), 3, str(tmp_path/"run"))
    x, t = torch.zeros(2, 3, 32, 32), torch.tensor([10, 800])
    with torch.no_grad(): assert (more.eval().predict(x, t) - model.eval().predict(x, t)).abs().max() < 1e-3
    assert more.recipe.lr == 1e-3 and more.recipe.attention == (False, True, True) and remarks["before"] == 2 and batches != 3
    assert [(v["steps"], v["images"], v["lr"]) for v in remarks["stages"]] == [(2, 64, model.recipe.lr)]
    with pytest.raises(StoreError, match="another network"): cli.begin(unet("laptop", "two_circles", 3), 3, str(tmp_path/"run"))
    with pytest.raises(ValueError, match="lr must be"): cli.changes("laptop", -1., False)
