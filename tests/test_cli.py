"The commands: exit codes, one-line errors, interrupted runs, studies and tables, train to weights to demo."
import csv
import functools
import importlib.metadata as meta
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from commands import RULEDIFF, fails, run, shell
from PIL import Image
from tree import ROOT, clean_env, toml

import rulediff_nb
from rulediff_nb import cli, table
from rulediff_nb.classifier import classifier, load_classifier
from rulediff_nb.cli import RULES
from rulediff_nb.core import read_grid, to_bytes
from rulediff_nb.images import SCHEMA, SHOWN
from rulediff_nb.sample import WEIGHTS, load_pretrained, sample
from rulediff_nb.store import StoreError, list_releases, load_tensors, save_release
from rulediff_nb.study import run_study, ship
from rulediff_nb.table import STUDIES, Study, read_table, register_study, results, studies, table_names
from rulediff_nb.tasks import TASKS, get_task
from rulediff_nb.train import train_steps
from rulediff_nb.unet import unet

SMALL = dict(channels=(8, 8, 16), head_dim=8, batch=4, prediction="sample", sigma_data=0.)
TASK = get_task("two_squares", palette="fixed", size=16)


def release(folder, name="two_squares-fixed", task=TASK, **more):
    m = unet("laptop", task, **SMALL)
    said = dict(recipe=m.recipe.to_dict(), seed=0, set_seed=0, steps=1, images_in_set=30)
    save_release(folder, name, m.state_dict(), said | more)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    "A folder with one tiny model, in place of the shipped ones."
    release(tmp_path/"weights")
    monkeypatch.setattr(cli, "WEIGHTS", tmp_path/"weights")
    def load(name, *args, **kw):   # a path is a reader's own
        return load_pretrained(name, *args, **kw, **({"folder": tmp_path/"weights"} if name in TASKS else {}))
    monkeypatch.setattr(cli, "load_pretrained", load)
    monkeypatch.setattr(cli, "CLASSIFIER_WEIGHTS", tmp_path/"classifiers")
    monkeypatch.setattr(cli, "load_classifier", functools.partial(load_classifier, folder=tmp_path/"classifiers"))
    return tmp_path/"weights"


@pytest.fixture
def guide(weights, tmp_path):
    "A tiny classifier beside the tiny model."
    clf = classifier("laptop", TASK, channels=(8, 8), attention=(False, False), width=8)
    save_release(tmp_path/"classifiers", "two_squares-fixed-classifier", clf.state_dict(), dict(recipe=clf.recipe.to_dict()))


# ---------------------------------------------------------------- usage

@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_usage(args, capsys):
    status, out, err = run(capsys, *args)
    assert status == 0 and err == "" and "usage: rulediff" in out
    for k, f in cli.commands().items(): assert f"  {k:8}{f.__doc__}\n" in out


@pytest.mark.parametrize("word,near", [("smaple", "sample"), ("reprot", "report"), ("studies", "study"), ("tables", "table"), ("zzz", ""), ("", ""),
                                       ("--n", "")])
def test_an_unknown_command_names_itself_and_the_nearest(word, near, capsys):
    status, out, err = run(capsys, word, "--n", 3)
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith(f"rulediff: unknown command {word!r}")
    assert (f"did you mean {near!r}?" in err) == bool(near) and all(k in err for k in cli.commands())


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"rulediff_nb {rulediff_nb.__version__}\n", "")


@pytest.mark.parametrize("how", [RULEDIFF, f"{RULEDIFF}.cli",
                                 f"{sys.executable} -c 'import sys; from rulediff_nb.__main__ import main; sys.exit(main())'"])
def test_ways_to_start_it(how):
    status, out, err = shell(f"{how} train moon")
    assert status == 1 and out == "" and "unknown task 'moon'" in err and err.count("\n") == 1


def test_the_command_sets_what_must_be_set_before_torch(tmp_path):
    module, f = toml()["project"]["scripts"]["rulediff"].split(":")
    code = f"import {module} as m, sys; assert 'torch' not in sys.modules; sys.argv = ['rulediff', 'doctor', '--out', '{tmp_path}']; m.{f}()"
    for env, want in (({}, "PASSIVE"), (dict(OMP_WAIT_POLICY="ACTIVE"), "ACTIVE")):
        assert f"OMP_WAIT_POLICY is {want} (" in shell(f'{sys.executable} -c "{code}"', **env)[1]


def test_the_module_of_the_commands_starts_as_the_package_does(tmp_path):
    for env, want in (({}, "PASSIVE"), (dict(OMP_WAIT_POLICY="ACTIVE"), "ACTIVE")):
        assert f"OMP_WAIT_POLICY is {want} (" in shell(f"{RULEDIFF}.cli doctor --out {tmp_path}", **env)[1]


@pytest.mark.parametrize("command", cli.commands())
def test_help(command, capsys):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0 and f"usage: rulediff {command}" in out


# ---------------------------------------------------------------- options

def options(*only):
    "Every option, as (command, action of argparse)."
    for name, f in cli.commands().items():
        for a in cli.command_parser(name, f)._actions:
            if a.dest != "help" and (not only or a.type in only): yield pytest.param(name, a, id=f"{name}-{a.dest}")


def bounds(text):
    "Smallest and largest number that a help names; None: any."
    both, least = re.search(r"([\d.]+) to ([\d.]+)", text), re.search(r"([\d.]+) or more(?: and below ([\d.]+))?", text)
    return both.groups() if both else least.groups() if least else (None, None)


@pytest.mark.parametrize("command,option", options(int, float))
def test_a_number_out_of_the_bounds_in_its_help_is_refused(command, option, capsys, tmp_path):
    low, high = bounds(option.help)
    assert low is not None or "any finite number" in option.help
    wrong = ["inf", "nan"] if low is None else [option.type(float(low) - 1)] + ([option.type(float(high) + 1)] if high else [])
    place = dict(study="ruler", demo=None).get(command, "two_squares")
    for v in wrong:
        err = fails(capsys, command, *([place] if place else []), "--out", tmp_path/"o", f"{option.option_strings[0]}={v}")
        assert re.search(rf"\b{option.dest} must be", err) and not (tmp_path/"o").exists()


@pytest.mark.parametrize("command,option", options(int, float))
def test_the_default_lies_within_the_bounds(command, option):
    low, high = bounds(option.help)
    assert low is None or float(low) <= option.default and (high is None or option.default <= float(high))


CHOSEN = dict(task="two_squars", palette="randon", preset="labtop", tasks="two_squares,two_squars", palettes="fixed,randon", presets="labtop",
              engine="lokky", precision="bf61", device="cudda")


@pytest.mark.parametrize("command,option", [p for p in options(str) if p.values[1].dest in CHOSEN])
def test_a_choice_stands_in_the_help_and_an_unknown_one_is_named(command, option, capsys, tmp_path, pngs):
    k, places = option.dest, dict(sample=["two_squares"], train=["two_squares"], grid=["two_squares"], study=["ruler"]).get(command, [])
    wrong = [CHOSEN[k]] if not option.option_strings else [f"{option.option_strings[0]}={CHOSEN[k]}"]
    more = ["--task=two_squares", f"--images={pngs}"] if command == "report" else [f"--out={tmp_path/'o'}"]
    err = fails(capsys, command, *([] if k in ("task", "tasks") else places), *more, *wrong)
    assert repr(CHOSEN[k].split(",")[-1]) in err and not (tmp_path/"o").exists()
    for name in cli.CHOICES.get(k, ("cpu", "cuda", "cuda:1", "mps")): assert name in option.help and name in err
    if k != "device": assert "did you mean" in err


def test_no_option_lacks_a_comment():
    for p in options(): assert len(p.values[1].help) > 8


def test_defaults_are_said(capsys):
    out = run(capsys, "demo", "--help")[1] + run(capsys, "train", "--help")[1]
    assert "(default: 96)" in out and "(default: 0)" in out and "(default: 0.0)" in out
    for nothing in ("(default: )", "(default: False)", "''"): assert nothing not in out


@pytest.mark.parametrize("command", ["sample", "study", "demo", "grid"])
def test_a_device_that_is_not_here(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    place = dict(sample=["two_squares"], study=["ruler"], grid=["two_squares"]).get(command, [])
    for name in ("cuda", "cuda:3", "cpu:1"):
        err = fails(capsys, command, *place, "--device", name, "--out", tmp_path/"o")
        assert f"there is no device {name!r} in this machine" in err and "there are: cpu" in err and not (tmp_path/"o").exists()
        assert ("built without CUDA" in err) == (name != "cpu:1" and not torch.version.cuda)


@pytest.mark.parametrize("args", [["demo", "--n", "many"], ["demo", "--paint", "1"], ["train"], ["list", "tasks"],
                                  ["train", "two_squares", "--steps", "1.5"]])
def test_arguments_that_cannot_be_parsed(args, capsys):
    status, _, err = run(capsys, *args)
    assert status == 2 and f"usage: rulediff {args[0]}" in err


@pytest.mark.parametrize("args", [["train", "moon"], ["report", "--task", "moon", "--images", "PNG"]])
def test_unknown_tasks_list_the_known_ones(args, capsys, pngs, tmp_path):
    err = fails(capsys, *[str(pngs) if a == "PNG" else a for a in args], *(["--out", tmp_path/"runs"] if args[0] == "train" else []))
    assert "'moon'" in err and all(k in err for k in TASKS) and not (tmp_path/"runs").exists()


@pytest.fixture
def pngs(tmp_path):
    (tmp_path/"png").mkdir()
    for i, p in enumerate(to_bytes(TASKS["two_squares"].sample(4, 0)[0])): Image.fromarray(p).save(tmp_path/"png"/f"{i}.png")
    return tmp_path/"png"


@pytest.mark.parametrize("args,word", [
    (["--palette", "sepia"], "sepia"), (["--preset", "desktop"], "laptop, published"), (["--lr", "1"], "lr must"),
    (["--change", "colour=1"], "colour=1")])
def test_train_refuses_before_it_works(args, word, capsys, tmp_path):
    assert word in fails(capsys, "train", "two_squares", "--out", tmp_path/"runs", *args) and not (tmp_path/"runs").exists()


# ---------------------------------------------------------------- streams

@pytest.mark.parametrize("args,buffer", [("table recipes --csv", "1"), ("--help", ""), ("sample --help", "")])
def test_a_reader_that_leaves_is_no_error(args, buffer):
    p = subprocess.Popen([*RULEDIFF.split(), *args.split()], cwd=ROOT, env=clean_env(PYTHONUNBUFFERED=buffer), text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.close()
    assert p.stderr.read() == "" and p.wait(timeout=120) == 141


def test_head_gets_its_line_and_no_traceback():
    status, out, err = shell(f"{RULEDIFF} table recipes | head -1; exit ${{PIPESTATUS[0]}}")
    assert status in (0, 141) and out.startswith("task ") and out.count("\n") == 1 and err == ""


@pytest.mark.parametrize("line,status", [("list >&-", 0), ("list 2>&-", 0), ("list <&- >&- 2>&-", 0), ("list > /dev/full", 1),
                                         ("sample two_squares --n 1 --steps 1 --out $PWD/s.png >&- 2>&-", 0)])
def test_streams_that_are_closed_or_full(line, status, tmp_path):
    found, out, err = shell(f"{RULEDIFF} {line}", tmp_path, PYTHONPATH=str(ROOT))
    assert found == status and "Traceback" not in err and "Exception ignored" not in err
    if status: assert err.startswith("rulediff list: ") and "No space left" in err and err.count("\n") == 1
    elif "2>&-" in line: assert err == ""
    if "sample" in line: assert Image.open(tmp_path/"s.png").size == (32, 32)


def test_a_place_that_the_terminal_cannot_show_is_written_to(tmp_path):
    line = f"{RULEDIFF} sample two_squares --n 1 --steps 1 --out z\u00fc.png"
    status, out, err = shell(line, tmp_path, PYTHONPATH=str(ROOT), PYTHONIOENCODING="ascii:strict", LC_ALL="C.UTF-8")
    assert status == 0 and out == "written: z\\xfc.png\n" and (tmp_path/"z\u00fc.png").exists()


def test_an_error_nobody_can_read_is_still_a_status():
    assert shell(f"{RULEDIFF} train moon 2>&-") == (1, "", "")


# ---------------------------------------------------------------- demo

def demo_csv(folder): return list(csv.DictReader((folder/"demo.csv").open()))


def test_demo(weights, tmp_path, capsys):
    status, out, _ = run(capsys, "demo", "--n", 16, "--steps", 2, "--out", tmp_path/"d")
    assert status == 0 and sorted(p.name for p in (tmp_path/"d").iterdir()) == ["demo.csv", "demo.png", "demo.txt"]
    text = (tmp_path/"d"/"demo.txt").read_text()
    assert text.strip() in out and all(k in text for k in (*SHOWN, "floor", "model", "chance", "two_squares", "fixed"))
    head, floor, model, chance = text.splitlines()[2:6]
    assert len(floor) == len(chance) == len(head) - len("  flags") and len(model) >= len(floor), "a table, flags at its end"
    assert Image.open(tmp_path/"d"/"demo.png").size[0] > 100
    rows = demo_csv(tmp_path/"d")
    assert list(rows[0]) == ["schema", "task", "palette", "images", "n", *SHOWN, "flags"] and {r["schema"] for r in rows} == {str(SCHEMA)}
    assert [(r["task"], r["palette"], r["images"]) for r in rows] == [("two_squares", "fixed", k) for k in ("floor", "model", "chance")]
    for r in rows:
        for k in SHOWN: assert not r[k] or np.isfinite(float(r[k])), "no NaN in a stored table"


def test_demo_has_a_guided_row_where_a_classifier_is_shipped(weights, guide, tmp_path, capsys):
    for scale, want in ((2, ["floor", "model", "guided", "chance"]), (0, ["floor", "model", "chance"])):
        status, *_ = run(capsys, "demo", "--n", 16, "--steps", 2, "--scale", scale, "--out", tmp_path/"d")
        assert status == 0 and [r["images"] for r in demo_csv(tmp_path/"d")] == want


def test_demo_prints_what_is_done_before_the_next_is(weights, tmp_path, capsys, monkeypatch):
    release(weights, "two_squares-random", TASK.with_(palette="random"))
    seen, panel = [], cli._panel
    monkeypatch.setattr(cli, "_panel", lambda *a: (seen.append(capsys.readouterr().out), panel(*a))[1])
    assert run(capsys, "demo", "--n", 16, "--steps", 2, "--out", tmp_path/"d")[0] == 0
    assert "rule_gap" in seen[0] and "random" in seen[0] and "fixed" not in seen[0] and "fixed" in seen[1] and "random" not in seen[1]


@pytest.mark.parametrize("n,workers,sizes", [
    (160, 1, [64, 64, 32]), (160, 2, [40]*4), (17, 2, [5, 5, 5, 2]), (16, 1, [16]), (1000, 2, [64]*15 + [40])])
def test_all_images_are_drawn_in_equal_parts(n, workers, sizes):
    parts = cli.demo_parts([cli.Demo("two_squares", "fixed", n), cli.Demo("two_squares", "random", n)], workers)
    lines = [("fixed", "model"), ("fixed", "guided"), ("random", "model")]
    assert [(p.row.palette, p.what) for p in parts] == [v for v in lines for _ in sizes]
    for v in lines:
        mine = [(p.first, p.size) for p in parts if (p.row.palette, p.what) == v]
        assert [k for _, k in mine] == sizes and [i for i, _ in mine] == [sum(sizes[:k]) for k in range(len(sizes))] and sum(sizes) == n


def test_parts_are_the_images_that_one_call_draws():
    row, threads = cli.Demo("two_squares", "fixed", 10, 3, seed=5), torch.get_num_threads()
    torch.set_num_threads(2)
    try: (_, (model, pulled)), = cli.demo_rows([row], torch.device("cpu"), "fp32")
    finally: torch.set_num_threads(threads)
    nets = cli.demo_nets(row, [load_pretrained("two_squares"), load_classifier("two_squares")])
    for d, what in ((model, "model"), (pulled, "guided")):
        assert d.what == what and (d.x - sample(nets[what], 10, 3, seed=5)).abs().max() < 1e-3
    assert (model.x - pulled.x).abs().max() > .01


def test_side_by_side_keeps_the_order_and_stops_all():
    def wait(k, stop): return (k, stop.wait(.4/k))
    assert list(cli.side_by_side(wait, [1, 2, 4], 3)) == [(1, False), (2, False), (4, False)]
    start, threads = time.perf_counter(), torch.get_num_threads()
    def forever(k, stop): return stop.wait(60*k)
    with pytest.raises(KeyboardInterrupt):
        for _ in cli.side_by_side(forever, [.001, 1, 1, 1], 2): raise KeyboardInterrupt
    assert time.perf_counter() - start < 20 and torch.get_num_threads() == threads


def test_demo_is_the_study_demo(tmp_path, capsys):
    "The stored table, the study and the command have the same rows and numbers."
    assert run(capsys, "demo", "--only", "two_squares-fixed", "--n", 16, "--steps", 2, "--precision", "fp32", "--out", tmp_path/"d")[0] == 0
    assert run(capsys, "study", "demo", "--quick", "--workers", 1, "--out", tmp_path/"s")[0] == 0
    a, b = pd.read_csv(tmp_path/"d"/"demo.csv"), results("demo", tmp_path/"s")
    pd.testing.assert_frame_equal(a[["images", *SHOWN]], b[["images", *SHOWN]], rtol=1e-5)
    plan = [(r.task, r.palette) for r in STUDIES["demo"].plan(False)]
    assert sorted(plan) == sorted(tuple(k.rsplit("-", 1)) for k in list_releases(WEIGHTS))
    assert [(r.task, r.palette) for r in cli.demo_plan("", 160, 25, "auto", 0, 4.)] == plan


def test_demo_again_gives_the_same_table(weights, tmp_path, capsys):
    tables = []
    for d in "ab":
        run(capsys, "demo", "--n", 16, "--steps", 2, "--out", tmp_path/d)
        tables.append((tmp_path/d/"demo.csv").read_text())
    assert tables[0] == tables[1]


def test_a_model_that_has_learned_nothing_is_measured(weights, tmp_path, capsys, monkeypatch):
    "Pale images are unreadable, not a mistake of the caller's."
    pale = .5 + .5*torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(cli, "sample_batches", lambda *args, **kw: iter([None, pale]))
    status, out, err = run(capsys, "demo", "--n", 16, "--out", tmp_path/"d")
    assert status == 0 and "two_squares" in out, err


@pytest.mark.parametrize("args,word", [
    (["--n", "15"], "n must"), (["--eta", "1.5"], "eta must be auto or in [0, 1], got '1.5'"), (["--eta", "much"], "got 'much'"),
    (["--eta", "nan"], "got 'nan'"), (["--only", "moon"], "two_squares-fixed")])
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
    assert [p.name for p in (tmp_path/"d").iterdir()] == ["demo.csv"]


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
    for p in ("random", "fixed"): release(tmp_path/"w", f"two_squares-{p}", TASK.with_(palette=p))
    p = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path/"w"), str(tmp_path/"d")], cwd=ROOT, text=True,
                         env=clean_env(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert "GO\n" in iter(p.stdout.readline, "")
        time.sleep(1)
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=120)
    finally: p.kill()
    assert p.returncode == 130 and "interrupted" in err and "Traceback" not in err and not list((tmp_path/"d").iterdir())


# ---------------------------------------------------------------- samples and contents

def drawn(n=5, **kw): return to_bytes(sample(load_pretrained("two_squares"), n, 3, **(dict(seed=7) | kw)))


ARGS = "sample", "two_squares", "--n", 5, "--steps", 3, "--seed", 7


def test_samples_are_what_the_api_draws(tmp_path, capsys):
    for out in ("a.png", "b.npz", "c"):
        status, said, _ = run(capsys, *ARGS, "--out", tmp_path/out)
        assert status == 0 and said == f"written: {tmp_path/out}\n"
    pngs = np.stack([np.array(Image.open(p)) for p in sorted((tmp_path/"c").iterdir())])
    for a in (read_grid(tmp_path/"a.png"), np.load(tmp_path/"b.npz")["images"], pngs): assert np.array_equal(a, drawn())


def test_samples_follow_their_options(tmp_path, capsys):
    def pixels(*more):
        assert run(capsys, *ARGS, "--out", tmp_path/"x.npz", *more)[0] == 0
        return np.load(tmp_path/"x.npz")["images"]
    assert np.array_equal(pixels("--eta", 0), drawn(eta=0.)) and np.array_equal(pixels("--seed", 8), drawn(seed=8))
    plain, pulled = pixels(), pixels("--scale", 20)
    assert plain.shape == pulled.shape and np.abs(plain.astype(int) - pulled).max() > 8
    assert not np.array_equal(pixels("--palette", "random"), plain)


def test_eta_is_auto_or_a_number(tmp_path, capsys):
    def pixels(*more):
        assert run(capsys, *ARGS, "--out", tmp_path/"x.npz", *more)[0] == 0
        return np.load(tmp_path/"x.npz")["images"]
    auto = drawn(eta="auto")
    assert np.array_equal(pixels(), auto) and np.array_equal(pixels("--eta", "auto"), auto) and np.array_equal(pixels("--eta", ".5"), drawn(eta=.5))
    assert not np.array_equal(auto, drawn(eta=.5))
    for wrong in ("Auto", "", "1,0", "-.1", "inf", "nan", "2"):
        assert f"eta must be auto or in [0, 1], got {wrong!r}" in fails(capsys, *ARGS, f"--eta={wrong}", "--out", tmp_path/"y.npz")
    assert not (tmp_path/"y.npz").exists()


@pytest.mark.parametrize("command", ["sample", "demo"])
def test_the_help_of_eta_names_what_it_may_be(command, capsys):
    said = " ".join(run(capsys, command, "--help")[1].split())
    assert "--eta STR fresh noise: auto (" in said and "or a number: 0 none to 1" in said and "(default: auto)" in said


def test_eta_may_be_a_number_in_python():
    assert [cli.check_sampling(1, 1, v, 0, 0.) for v in ("auto", 0, 1., "0.5")] == ["auto", 0., 1., .5]
    for wrong in (None, [], 1.01): pytest.raises(ValueError, cli.check_sampling, 1, 1, wrong, 0, 0.).match("eta must be auto or in")


def test_samples_of_a_readers_own_weights(tmp_path, capsys):
    release(tmp_path/"own")
    file = tmp_path/"own"/"two_squares-fixed.safetensors"
    for path in (file, tmp_path/"own"):
        assert run(capsys, *ARGS, "--weights", path, "--out", tmp_path/"x.npz")[0] == 0
        assert np.load(tmp_path/"x.npz")["images"].shape == (5, 16, 16, 3)
    err = fails(capsys, "sample", "two_circles", "--weights", file, "--out", tmp_path/"y.npz")
    assert "two_squares" in err and "two_circles" in err and not (tmp_path/"y.npz").exists()


@pytest.mark.parametrize("name", ["x.npz", "x.png", "x"])
def test_samples_can_be_reported_on(name, tmp_path, capsys):
    assert run(capsys, *ARGS, "--out", tmp_path/name)[0] == 0
    status, out, _ = run(capsys, "report", "--task", "two_squares", "--images", tmp_path/name)
    assert status == 0 and "5 read, 0 files" in out


@pytest.mark.parametrize("out,word", [("x.jpg", ".png or .npz"), ("file/x.png", "cannot write"), ("file", "")])
def test_samples_are_refused_before_any_work(out, word, tmp_path, capsys, monkeypatch):
    (tmp_path/"file").write_text("x")
    monkeypatch.setattr(cli, "load_pretrained", lambda *a, **k: pytest.fail("worked before it looked at the place"))
    assert word in fails(capsys, *ARGS, "--out", tmp_path/out) and (tmp_path/"file").read_text() == "x"


def test_list_names_all_there_is(capsys):
    status, out, err = run(capsys, "list")
    assert status == 0 and err == "" and set(RULES) == set(TASKS)
    for task, rule in RULES.items(): assert re.search(rf"(?m)^  {task} +{re.escape(rule)}$", out)
    for key in list_releases(WEIGHTS):
        gap = json.loads((WEIGHTS/f"{key}.json").read_text())["report"]["rows"]["rule_gap"]
        assert re.search(rf"(?m)^{key} +{gap['value']:.3f} +{gap['low']:.3f} +{gap['high']:.3f} ", out)
    for key in list_releases(WEIGHTS/"classifiers"): assert f"  {key}\n" in out
    for name, s in STUDIES.items(): assert re.search(rf"(?m)^  {name} +{re.escape(s.title)}$", out)


def test_a_task_of_the_readers_own_is_listed_by_its_docstring(capsys, monkeypatch):
    class Own: "Rule a == b."
    monkeypatch.setitem(cli.TASKS, "own", Own())
    assert "own              Rule a == b." in run(capsys, "list")[1]


# ---------------------------------------------------------------- studies

class Toss(NamedTuple):
    coin: str
    seed: int


def tosses(quick): return [Toss(c, s) for s in range(1 if quick else 2) for c in ("fair", "bent")]
def share(row, work): return dict(share=row.seed + (.5 if row.coin == "fair" else .7), throws=10)


@pytest.fixture
def toy(monkeypatch):
    "A small study, registered for this test alone."
    monkeypatch.setattr(table, "STUDIES", dict(studies()))   # all are imported before, or their own would be lost
    return register_study(Study("toy", "is the coin fair?", tosses, share, keys=("coin",), shown=("share", "throws")))


def again(study, **changes):
    "The same study, changed."
    from dataclasses import replace
    return register_study(replace(study, **changes))


def test_a_study_says_what_is_before_it_and_what_each_row_gave(toy, tmp_path, capsys):
    status, out, err = run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"r")
    assert status == 0 and err == "" and out.splitlines() == [
        "toy: 4 rows, 0 there, 4 to do, without a training", "fair seed=0: share 0.500, throws 10.000",
        "bent seed=0: share 0.700, throws 10.000", "fair seed=1: share 1.500, throws 10.000", "bent seed=1: share 1.700, throws 10.000",
        f"table: {tmp_path/'r'/'toy.csv'}"]
    assert results("toy", tmp_path/"r").share.tolist() == [.5, .7, 1.5, 1.7]
    assert run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"r")[1].splitlines()[0] == "toy: 4 rows, 4 there, 0 to do"


def test_the_first_line_comes_before_any_work(toy, tmp_path, capsys, monkeypatch):
    def stop(*a, **kw): raise ValueError("at work")
    monkeypatch.setattr(cli, "run_study", stop)
    status, out, err = run(capsys, "study", "toy", "--out", tmp_path/"r")
    assert status == 1 and out.startswith("toy: 4 rows") and err == "rulediff study: at work\n"


def test_a_study_counts_its_trainings(tmp_path, capsys):
    args = ["grid", "two_squares,two_circles", "--changes", "channels=16,16 attention=False,False head_dim=8 batch=8", "--steps", "2",
            "--seeds", "0", "--n", "32", "--images", "16", "--workers", "1", "--out", tmp_path/"g"]
    status, out, _ = run(capsys, *args)
    lines = out.splitlines()
    assert status == 0 and lines[0] == "grid: 2 rows, 0 there, 2 to do, with 2 trainings" and lines[-1] == f"table: {tmp_path/'g'/'grid.csv'}"
    assert sum("trained" in v for v in lines) == 2 and sum("rule_gap" in v for v in lines) == 2
    table = read_table(tmp_path/"g"/"grid.csv")
    assert table.task.tolist() == ["two_squares", "two_circles"] and {"readable", "rule_gap_low", "mse_100", "label"} <= set(table)
    assert run(capsys, *args)[1].splitlines()[0] == "grid: 2 rows, 2 there, 0 to do"


@pytest.mark.parametrize("args,word", [
    (["moon"], "moon"), (["two_squares", "--steps", "ten"], "steps must be"), (["two_squares", "--changes", "lr=fast"], "lr must be"),
    (["two_squares", "--steps", "0"], "steps"), (["two_squares", "--seeds", "-1"], "seed"), (["two_squares", "--images", "0"], "images")])
def test_a_grid_is_refused_in_one_line(args, word, tmp_path, capsys):
    assert word in fails(capsys, "grid", *args, "--out", tmp_path/"g") and not (tmp_path/"g").exists()


def test_a_grid_trains_nothing_where_one_recipe_cannot_be(tmp_path, capsys):
    for wrong in ("optimizer=magic", "betas=zero_snr prediction=epsilon sigma_data=0", "T=20", "precision=fp16"):
        err = fails(capsys, "grid", "two_squares", "--changes", f"batch=8;{wrong}", "--steps", "1", "--seeds", "0", "--n", "32",
                    "--workers", "1", "--out", tmp_path/"g")
        assert wrong.split("=")[1].split()[0] in err and not list((tmp_path/"trained").glob("*/*"))


def test_a_grid_of_nothing_is_refused(tmp_path, capsys):
    for place, name in (("", "tasks"), (",", "tasks")):
        assert f"{name} must hold at least one" in fails(capsys, "grid", place, "--out", tmp_path/"g")
    for option in ("palettes", "presets", "steps", "seeds"):
        assert f"{option} must hold at least one" in fails(capsys, "grid", "two_squares", f"--{option}=", "--out", tmp_path/"g")
    assert not (tmp_path/"g").exists()


def test_rows_that_are_asked_for(toy, tmp_path, capsys):
    out = run(capsys, "study", "toy", "--workers", 1, "--only", "coin=bent seed=1,7", "--out", tmp_path/"r")[1].splitlines()
    assert out[0].startswith("toy: 1 row,") and len(out) == 3 and out[1].startswith("bent seed=1")
    assert "no row fits coin=round" in fails(capsys, "study", "toy", "--only", "coin=round", "--out", tmp_path/"q") and not (tmp_path/"q").exists()


def test_a_quick_study_is_short(toy, tmp_path, capsys):
    assert run(capsys, "study", "toy", "--quick", "--workers", 1, "--out", tmp_path/"r")[1].startswith("toy: 2 rows")


def test_where_a_study_goes_by_itself(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--quick"]): assert run(capsys, "study", "toy", "--workers", 1, *more)[0] == 0
    assert sorted(p.name for p in (tmp_path/"runs").iterdir()) == ["toy", "toy-quick"]


def test_a_row_that_fails_is_named_and_the_others_go_on(toy, tmp_path, capsys):
    def fragile(row, work): return dict(share=1/(row.seed - 1))
    again(toy, measure=fragile)
    status, out, err = run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"r")
    assert status == 1 and out.count("ZeroDivisionError") == 2 and "fair seed=0: share -1.000" in out
    assert err == "rulediff study: 2 of 4 rows failed, see above; the same command tries them again\n"
    again(toy)
    status, out, _ = run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"r")
    assert status == 0 and out.startswith("toy: 4 rows, 2 there, 2 to do")


def test_a_row_of_several_lines_says_their_range(toy, tmp_path, capsys):
    def many(row, work): return [dict(share=v) for v in (.25, .75)]
    again(toy, measure=many)
    assert "fair seed=0: share 0.250 to 0.750\n" in run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"r")[1]


def test_a_budget_that_is_spent(toy, tmp_path, capsys):
    def slow(row, work): time.sleep(.3); return share(row, work)
    again(toy, measure=slow)
    status, out, _ = run(capsys, "study", "toy", "--workers", 1, "--budget", .2, "--out", tmp_path/"r")
    assert status == 0 and "no time is left for 3 more: the same command goes on" in out and len(results("toy", tmp_path/"r")) == 1


def test_shipping_and_measuring_again(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "ship_table", functools.partial(ship, folder=tmp_path/"shelf"))
    monkeypatch.setattr("rulediff_nb.study.results", lambda name, folder=tmp_path/"shelf": results(name, folder))
    status, out, _ = run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"r", "--ship")
    assert status == 0 and out.splitlines()[-1] == "4 lines ship now" and table_names(tmp_path/"shelf") == ["toy"]
    assert run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"new")[1].startswith("toy: 4 rows, 4 there")
    assert run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"newer", "--again")[1].startswith("toy: 4 rows, 0 there")
    for wrong in ("--quick", "--only=fair"): assert "--ship wants" in fails(capsys, "study", "toy", "--ship", wrong, "--out", tmp_path/"q")


def test_all_studies(toy, tmp_path, capsys, monkeypatch):
    two = Study("toy_b", "is this one fair?", tosses, share, keys=("coin",), shown=("share",))
    hidden = Study("hidden", "a reader's own", tosses, share, public=False)
    monkeypatch.setattr(cli, "studies", lambda: dict(toy=toy, toy_b=two, hidden=hidden))
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "study", "--all", "--quick", "--workers", 1)
    heads = [v for v in out.splitlines() if ": 2 rows" in v]
    assert status == 0 and heads == [f"{k}: 2 rows, 0 there, 2 to do, without a training" for k in ("toy", "toy_b")]
    def broken(row, work): raise OSError("no disk")
    monkeypatch.setattr(cli, "studies", lambda: dict(toy=Study("toy", "", tosses, broken, version=2), toy_b=two))
    status, out, err = run(capsys, "study", "--all", "--quick", "--workers", 1, "--again")
    assert status == 1 and "toy: 2 of 2 rows failed" in err and "toy_b: 2 rows" in out
    for wrong in (["toy", "--all"], ["--all", "--out", "x"]): assert "--all runs every" in fails(capsys, "study", *wrong)


def test_studies_are_listed_with_their_rows(capsys, toy):
    status, out, _ = run(capsys, "study")
    rows = {v.split()[0]: v for v in out.splitlines() if v}
    assert status == 0 and re.match(r"ruler +10 of 10 +what the ruler", rows["ruler"])
    assert re.match(r"toy +no table ships, 4 rows +is the coin fair\?", rows["toy"])
    for name in table_names(): assert re.match(rf"{name} +\d+ of {len(STUDIES[name].plan(False))} ", rows[name])
    old = ", ".join(k for k, s in studies().items() if k in table_names() and cli.outdated(k))
    said = [v for v in out.splitlines() if "earlier version" in v]
    assert said == ([f"measured by an earlier version: {old}; measured again by: rulediff study NAME"] if old else [])


@pytest.fixture
def aged(toy, tmp_path, monkeypatch):
    "The toy study ships a table, and has been given another version since."
    list(run_study(toy, tmp_path/"first", workers=1)), ship(toy, tmp_path/"first", tmp_path/"shelf")
    for place in ("rulediff_nb.study.results", "rulediff_nb.cli.results"):
        monkeypatch.setattr(place, lambda name, folder=tmp_path/"shelf": results(name, folder if folder != table.RESULTS else tmp_path/"shelf"))
    return again(toy, version=2)


SAID = "4 of 4 lines of the table 'toy' were measured by an earlier version; measured again by: rulediff study toy"


def test_an_outdated_table_is_told_of_by_its_study(aged, tmp_path, capsys):
    out = run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"r")[1].splitlines()
    assert out[:2] == ["toy: 4 rows, 0 there, 4 to do, without a training", SAID] and out[2].startswith("fair seed=0")
    assert SAID not in run(capsys, "study", "toy", "--quick", "--workers", 1, "--out", tmp_path/"q")[1]
    assert re.search("earlier version: (.+, )?toy; measured again", run(capsys, "study")[1])
    again(aged, version=1)
    assert "earlier version" not in run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"r")[1]


def test_a_table_of_a_readers_own_is_not_called_outdated(aged, tmp_path, capsys):
    assert run(capsys, "table", "toy", "--folder", tmp_path/"first")[2] == ""


def test_what_is_wrong_with_a_table_does_not_stop_the_list(monkeypatch):
    for error in (OSError("gone"), ValueError("no table"), KeyError("inputs"), TypeError("odd")):
        monkeypatch.setattr(cli, "outdated", mock.Mock(side_effect=error))
        assert cli.earlier("toy") == ""


def test_unknown_studies_and_tables_name_the_nearest(capsys):
    for command in ("study", "table"): assert "did you mean 'recipes'?" in fails(capsys, command, "recips")


# ---------------------------------------------------------------- tables

@pytest.mark.parametrize("name", table_names())
def test_every_stored_table_can_be_printed(name, capsys):
    status, out, err = run(capsys, "table", name)
    told = f"rulediff table: {said}\n" if (said := cli.outdated(name)) else ""
    lines, _, claims = out.partition("\n\nclaim: ")
    assert status == 0 and err == told and lines.rstrip().endswith(f"{len(results(name))} lines; measured again by: rulediff study {name}")
    assert bool(claims) == (table.find_study(name).claims is not None)
    assert set(cli.shown_table(name).columns) == set(out.splitlines()[0].split())
    status, out, err = run(capsys, "table", name, "--csv")
    assert status == 0 and err == told and out == (table.RESULTS/f"{name}.csv").read_text()


def test_tables_are_listed(capsys):
    status, out, _ = run(capsys, "table")
    assert status == 0 and [v.split()[:2] for v in out.splitlines()[1:]] == [[k, str(len(results(k)))] for k in table_names()]


def test_lines_of_a_table(capsys):
    want = results("curves").query("task in ('two_circles', 'two_squares') and steps == 3200")
    where = ["--where", "task=two_circles,two_squares steps=3200"]
    out = run(capsys, "table", "curves", *where, "--csv")[1].splitlines()
    stored = (table.RESULTS/"curves.csv").read_text().splitlines()
    assert 0 < len(want) < len(results("curves")) and out == [stored[0], *(stored[i + 1] for i in want.index)]
    assert f"\n{len(want)} lines; measured again" in run(capsys, "table", "curves", *where)[1]
    for number in ("3200.0", "3.2e3"):
        out = run(capsys, "table", "curves", "--where", f"steps={number}")[1]
        assert f"{(results('curves').steps == 3200).sum()} lines;" in out


@pytest.mark.parametrize("where,word", [("tsak=two_circles", "did you mean 'task'?"), ("task=moon", "task is one of"),
                                        ("two_circles", "COLUMN=VALUE"), ("task=two_circles steps=7", "no line has steps=7")])
def test_lines_that_do_not_exist(where, word, capsys): assert word in fails(capsys, "table", "curves", "--where", where)


def test_a_table_of_a_readers_own_run(toy, tmp_path, capsys):
    run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"r")
    status, out, _ = run(capsys, "table", "toy", "--folder", tmp_path/"r")
    assert status == 0 and "1.000 [0.500, 1.500]" in out and "1.200 [0.700, 1.700]" in out
    assert "toy" in run(capsys, "table", "--folder", tmp_path/"r")[1]


def test_claims_are_printed_below_their_table(toy, tmp_path, capsys):
    class Claim(NamedTuple):
        claim: str
        rests_on: str
    run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"r")
    assert "claim:" not in run(capsys, "table", "toy", "--folder", tmp_path/"r")[1]
    with pytest.raises(ValueError, match="'toy' states no claims"): table.claims("toy", tmp_path/"r")
    again(toy, claims=lambda df: [Claim(f"{len(df)} lines " + "word "*40, "them")])
    out = run(capsys, "table", "toy", "--folder", tmp_path/"r")[1]
    lines = out[out.index("claim: "):].splitlines()
    assert f"claim: {len(results('toy', tmp_path/'r'))} lines" in lines[0] and lines[1].startswith("    word") and "  rests on: them" in lines
    assert max(map(len, lines)) <= 110 and "claim:" not in run(capsys, "table", "toy", "--folder", tmp_path/"r", "--where", "coin=fair")[1]


def test_a_text_table():
    df = pd.DataFrame(dict(name=["a", "long"], n=[12, 3], gap=[.5, np.nan]))
    assert cli.text_table(df).splitlines() == ["name  n   gap", "a    12 0.500", "long  3     -"] and cli.text_table(df[:0]) == "nothing"


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
    assert {"revision", "dirty", "hardware", "device", "threads", "cores", "system", "python", "package", "versions", "sha256", "torch",
            "diffusers"} <= set(said) and json.dumps(said, allow_nan=False)
    assert not {"floor", "chance"} & set(said["report"]["rows"])


def test_train_says_where_the_weights_are_and_how_to_load_them(tiny, tmp_path, capsys):
    status, out, _ = run(capsys, *TRAIN, "--out", tmp_path/"my 'runs'")
    *_, where, how, sample_it = out.splitlines()
    file = next((tmp_path/"my 'runs'").iterdir())/"two_squares-fixed.safetensors"
    assert status == 0 and where == f"weights: {file}" and file.exists() and how.startswith("load them: load_pretrained(")
    model = eval(how.removeprefix("load them: "), dict(load_pretrained=load_pretrained))
    assert model.manifest["steps"] == 4 and model.recipe.task.name == "two_squares"
    words = shlex.split(sample_it.removeprefix("sample: rulediff "))
    assert run(capsys, *words, "--n", 2, "--steps", 1, "--out", tmp_path/"s.npz")[0] == 0


def test_a_resumed_run_counts_from_where_it_stands(tiny, tmp_path, capsys, monkeypatch):
    begun = []
    def progress(steps, total=None, label="", note=None, delay=0., initial=0):
        if note is None: return steps   # sampling for the report
        begun.append((initial, total))
        return interrupt_after(3)(steps)
    monkeypatch.setattr(cli, "progress", progress)
    for _ in range(2): run(capsys, *TRAIN, "--out", tmp_path)
    assert begun == [(0, 4), (3, 4)]


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
    monkeypatch.setattr(cli, "unet", functools.partial(unet, **SMALL))
    monkeypatch.setattr("rulediff_nb.train.Run.loss", lambda self, *a: torch.tensor(float("nan" if self.step > 9 else ".1"), requires_grad=True))
    assert "learning rate" in fails(capsys, *["20" if a == 4 else a for a in TRAIN], "--out", tmp_path)


# ---------------------------------------------------------------- doctor

@pytest.fixture
def shelf(weights, guide, tmp_path, monkeypatch):
    "Tables of the package beside tiny weights, to be damaged."
    import shutil
    for end in ("ruler.csv", "ruler.json", "certificate.csv", "certificate.json", "brief.npz"): shutil.copy(table.RESULTS/end, tmp_path/end)
    (tmp_path/"brief.npz").rename(tmp_path/"certificate.npz")
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    return tmp_path


NAMES = "two_squares-fixed", "two_squares-fixed-classifier", "table certificate", "table ruler"


def test_doctor(shelf, tmp_path, capsys):
    status, out, err = run(capsys, "doctor", "--out", tmp_path/"d")
    assert status == 0 and err == "" and all(k in out for k in (*cli.LIBRARIES, torch.__version__, "device", "can be written"))
    assert [v.rsplit(None, 1) for v in out.splitlines()[-4:]] == [[k, "ok"] for k in NAMES] and not list((tmp_path/"d").glob("*"))
    assert f"threads         {torch.get_num_threads()}; OMP_WAIT_POLICY is " in out and "PASSIVE helps" in out


def grown(path): path.write_bytes(path.read_bytes() + b"x")
def shrunk(path): path.write_bytes(path.read_bytes()[:-200])
def edited(path): path.write_text(path.read_text().replace("0.", "1.", 1))


@pytest.mark.parametrize("file,name,harm,word", [
    ("weights/two_squares-fixed.safetensors", NAMES[0], grown, "is damaged"), ("weights/two_squares-fixed.json", NAMES[0], edited, "was changed"),
    ("classifiers/two_squares-fixed-classifier.safetensors", NAMES[1], shrunk, "is damaged"),
    ("classifiers/two_squares-fixed-classifier.json", NAMES[1], edited, "was changed"),
    ("certificate.csv", NAMES[2], edited, "was changed"), ("certificate.csv", NAMES[2], shrunk, "was changed"),
    ("certificate.npz", NAMES[2], shrunk, "cannot be read"), ("ruler.json", NAMES[3], shrunk, "cannot be read"),
    ("ruler.json", NAMES[3], Path.unlink, "cannot be read")])
def test_doctor_sees_what_is_wrong(file, name, harm, word, shelf, tmp_path, capsys):
    harm(shelf/file)
    status, out, err = run(capsys, "doctor", "--out", tmp_path/"d")
    lines = {k: v for v in out.splitlines()[-4:] for k in NAMES if v.startswith(f"{k} ")}
    assert status == 1 and word in lines[name] and err == f"rulediff doctor: not as it should be: {name}\n"
    assert all(lines[k].endswith(" ok") for k in NAMES if k != name)


def test_doctor_sees_a_place_that_cannot_be_written(shelf, tmp_path, capsys):
    (tmp_path/"file").write_text("")
    status, out, err = run(capsys, "doctor", "--out", tmp_path/"file"/"d")
    assert status == 1 and "cannot write" in out and str(tmp_path/"file"/"d") in err


def test_doctor_names_a_missing_library(shelf, tmp_path, capsys, monkeypatch):
    plain = meta.version

    def version(name):
        if name == "ipywidgets": raise meta.PackageNotFoundError(name)
        return plain(name)
    monkeypatch.setattr(meta, "version", version)
    monkeypatch.setattr(cli, "version", version)
    status, out, _ = run(capsys, "doctor", "--out", tmp_path/"d")
    assert status == 0 and "ipywidgets      missing" in out and "two_squares-fixed" in out


# ---------------------------------------------------------------- going on from a finished run

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
