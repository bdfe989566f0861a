"The commands: exit codes, one-line errors, a reader's own images, interrupted runs, train to weights to demo."
import csv
import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tree import ROOT, clean_env

from rulediff_nb import cli
from rulediff_nb.cli import SCHEMA, SHOWN, load_images, main
from rulediff_nb.sample import load_pretrained
from rulediff_nb.store import load_tensors, save_release
from rulediff_nb.tasks import TASKS, get_task
from rulediff_nb.unet import unet

torch.set_num_threads(1)
REPORT = "report", "--task", "two_squares", "--images"   # then the images
SMALL = dict(channels=(8, 8, 16), head_dim=8, batch=4, prediction="sample", contrast=0.)
TASK = get_task("two_squares", palette="pure", size=16)
PIXELS = ((TASKS["two_squares"].sample(8, 0)[0] + 1)*127.5).round().byte().permute(0, 2, 3, 1).numpy()


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
    save_release(folder, "two_squares-pure", m.state_dict(), said | more)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    "A folder with one tiny model, in place of the shipped ones."
    release(tmp_path/"weights")
    monkeypatch.setattr(cli, "WEIGHTS", tmp_path/"weights")
    monkeypatch.setattr(cli, "load_pretrained", functools.partial(load_pretrained, folder=tmp_path/"weights"))
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
    (["--palette", "sepia"], "sepia"), (["--preset", "desktop"], "laptop, paper"), (["--steps", "0"], "steps"), (["--n", "-1"], "n must"),
    (["--seed", "-1"], "seed"), (["--score", "3"], "score")])
def test_train_refuses_before_it_works(args, word, capsys, tmp_path):
    assert word in fails(capsys, "train", "two_squares", "--out", tmp_path/"runs", *args) and not (tmp_path/"runs").exists()


# ---------------------------------------------------------------- demo

def test_demo(weights, tmp_path, capsys):
    status, out, _ = run(capsys, "demo", "--n", 16, "--steps", 2, "--out", tmp_path/"d")
    assert status == 0 and sorted(p.name for p in (tmp_path/"d").iterdir()) == ["demo.csv", "demo.png", "demo.txt"]
    text = (tmp_path/"d"/"demo.txt").read_text()
    assert text.strip() in out and all(k in text for k in (*SHOWN, "floor", "model", "chance", "two_squares pure"))
    assert Image.open(tmp_path/"d"/"demo.png").size[0] > 100
    rows = list(csv.DictReader((tmp_path/"d"/"demo.csv").open()))
    assert [r["images"] for r in rows] == ["floor", "model", "chance"] and {r["schema"] for r in rows} == {str(SCHEMA)}
    for r in rows:
        for k in SHOWN: assert not r[k] or np.isfinite(float(r[k])), "no NaN in a stored table"


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
    assert status == 0 and "two_squares pure" in out, err


@pytest.mark.parametrize("args,word", [(["--n", "0"], "n must"), (["--n", "-5"], "n must"),
                                       (["--steps", "0"], "steps"), (["--steps", "1001"], "steps"), (["--seed", "-1"], "seed"),
                                       (["--only", "moon"], "two_squares-pure")])
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
    f = weights/"two_squares-pure.safetensors"
    f.write_bytes(f.read_bytes()[:-1])
    assert "two_squares-pure.safetensors" in fails(capsys, "demo", "--n", 16, "--out", tmp_path/"d") and not list((tmp_path/"d").iterdir())


def test_a_disk_that_fills_up_in_the_demo(weights, tmp_path, capsys, monkeypatch):
    plain = cli.write_atomic

    def full(path, blob):
        if Path(path).suffix == ".txt": raise OSError(28, "No space left on device")
        return plain(path, blob)
    monkeypatch.setattr(cli, "write_atomic", full)
    assert "No space" in fails(capsys, "demo", "--n", 16, "--steps", 1, "--out", tmp_path/"d")
    assert [p.name for p in (tmp_path/"d").iterdir()] == ["demo.png"]


INTERRUPTED = """
import functools, sys, torch
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
    one, two = ((tmp_path/w/"two_squares-pure.safetensors").read_bytes() for w in ("wa", "wb"))
    assert one == two
    m = load_pretrained("two_squares", folder=tmp_path/"wb")
    said = m.manifest
    assert said["steps"] == 4 and said["images_in_set"] == 20 and said["images_seen"] == 16 and said["seed"] == 0
    assert said["report"]["n"] == 64 and {"rule_gap", "yield_", "copies"} <= set(said["report"]["rows"])
    assert {"revision", "hardware", "sha256", "torch", "diffusers"} <= set(said) and json.dumps(said, allow_nan=False)


def test_train_beside_its_checkpoint_and_again(tiny, tmp_path, capsys):
    for _ in range(2): assert run(capsys, *TRAIN, "--out", tmp_path)[0] == 0   # a finished run is measured again, not repeated
    names = sorted(p.name for p in next(tmp_path.iterdir()).iterdir())
    assert names == ["checkpoint.safetensors", "two_squares-pure.json", "two_squares-pure.safetensors"]


def test_train_with_a_damaged_checkpoint(tiny, tmp_path, capsys):
    run(capsys, *TRAIN, "--out", tmp_path)
    f = next(tmp_path.iterdir())/"checkpoint.safetensors"
    f.write_bytes(f.read_bytes()[:500])
    assert "checkpoint.safetensors" in fails(capsys, *TRAIN, "--out", tmp_path)


def test_train_that_blows_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "unet", functools.partial(unet, **SMALL, lr=1e30, warmup=0))
    assert "learning rate" in fails(capsys, *["20" if a == 4 else a for a in TRAIN], "--out", tmp_path)


# ---------------------------------------------------------------- report

@pytest.mark.parametrize("args", [[], ["--task", "two_squares"], ["--images", "PNG"]])
def test_report_wants_both(args, pngs, capsys):
    assert run(capsys, "report", *[pngs if a == "PNG" else a for a in args])[0] in (1, 2)


def test_report_on_a_folder(pngs, tmp_path, capsys):
    (pngs/"notes.txt").write_text("no image")
    status, out, _ = run(capsys, *REPORT, pngs, "--out", tmp_path/"r.csv")
    assert status == 0 and "8 images" in out and "not measured" in out
    rows = list(csv.DictReader((tmp_path/"r.csv").open()))
    assert [r["images"] for r in rows] == ["floor", "images", "chance"] and float(rows[1]["yield_"]) == 1
    assert float(rows[1]["error_px"]) < .05


def test_what_is_loaded_is_what_was_drawn(pngs, tmp_path):
    want = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float()/127.5 - 1
    assert torch.equal(load_images(pngs), want)
    for shape in (PIXELS, PIXELS.transpose(0, 3, 1, 2)):
        np.savez(tmp_path/"x.npz", images=shape)
        assert torch.equal(load_images(tmp_path/"x.npz"), want)


def test_report_on_an_npz(tmp_path, capsys):
    np.savez_compressed(tmp_path/"x.npz", PIXELS)
    status, out, _ = run(capsys, *REPORT, tmp_path/"x.npz")
    assert status == 0 and "8 images" in out


def test_report_at_another_size_and_palette(tmp_path, capsys):
    np.savez(tmp_path/"x.npz", ((TASK.sample(4, 0)[0] + 1)*127.5).round().byte().numpy())
    status, out, _ = run(capsys, *REPORT, tmp_path/"x.npz", "--palette", "pure")
    assert status == 0 and "size=16" in out and "palette=pure" in out


ONE = Image.fromarray(PIXELS[0])
BAD = {"rgba": ("z.png", ONE.convert("RGBA"), "RGBA"), "grey": ("z.png", ONE.convert("L"), "L"),
       "indexed": ("z.png", ONE.convert("P"), "P"),
       "size": ("z.png", Image.new("RGB", (16, 16)), "16x16"),
       "oblong": ("0.png", Image.new("RGB", (32, 16)), "32x16")}


@pytest.mark.parametrize("how", BAD)
def test_images_that_do_not_fit_are_named(how, pngs, capsys):
    name, image, word = BAD[how]
    image.save(pngs/name)
    err = fails(capsys, *REPORT, pngs)
    assert word in err and name in err


def test_damaged_images_are_named(pngs, capsys):
    blob = (pngs/"3.png").read_bytes()
    cuts = [b"", b"x", blob[:10], blob[:len(blob)//2], blob[:-12]]
    for bad in [*cuts, *(blob[:i] + bytes([blob[i] ^ 0x5a]) + blob[i + 1:] for i in range(8, len(blob), 5))]:
        (pngs/"3.png").write_bytes(bad)
        try: load_images(pngs)
        except ValueError as e: assert "3.png" in str(e)   # other flips leave a picture of the same size: not to be known
    (pngs/"3.png").write_bytes(cuts[2])
    assert "3.png" in fails(capsys, *REPORT, pngs)


NPZ = {"floats": dict(a=PIXELS.astype(np.float32)), "two": dict(a=PIXELS, b=PIXELS), "none": {}, "flat": dict(a=PIXELS[0]),
       "grey": dict(a=PIXELS[..., :1]), "oblong": dict(a=PIXELS[:, :16]), "empty": dict(a=PIXELS[:0]), "tiny": dict(a=PIXELS[:, :8, :8]),
       "objects": dict(a=np.array([{}], dtype=object))}


@pytest.mark.parametrize("how", NPZ)
def test_arrays_that_do_not_fit(how, tmp_path, capsys):
    np.savez(tmp_path/"x.npz", **NPZ[how])
    fails(capsys, *REPORT, tmp_path/"x.npz")


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


# ---------------------------------------------------------------- doctor

def test_doctor(weights, tmp_path, capsys):
    status, out, _ = run(capsys, "doctor", "--out", tmp_path/"d")
    assert status == 0 and all(k in out for k in (*cli.LIBRARIES, torch.__version__, "device", "can be written"))
    assert out.splitlines()[-1].split() == ["two_squares-pure", "ok"] and not list((tmp_path/"d").glob("*"))


def test_doctor_sees_what_is_wrong(weights, tmp_path, capsys):
    f = weights/"two_squares-pure.safetensors"
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
    assert status == 0 and "ipywidgets" in out and "two_squares-pure" in out
