"Commands where files, folders, streams, signals and settings are not as they should be: refused before the work, or named and the rest done."
# ruff: noqa: F811 (fixtures of test_cli)
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import BrokenExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from commands import RULEDIFF, fails, run, shell
from PIL import Image
from test_cli import TASK, release, shelf, tiny, toy, weights  # noqa: F401
from test_cli import guide as guide  # noqa: F401
from tree import ROOT, clean_env

from rulediff_nb import cli, table
from rulediff_nb.core import save_images, to_bytes
from rulediff_nb.metrics import rule_report
from rulediff_nb.store import load_release
from rulediff_nb.table import Study, register_study, results
from rulediff_nb.tasks import TASKS

POSIX = pytest.mark.skipif(os.name != "posix", reason="pipes and signals of POSIX")
REPORT = "report", "--task", "two_squares", "--images"
TRAIN = "train", "two_squares", "--steps", 2, "--n", 8, "--score", 64


@pytest.fixture
def pngs(tmp_path):
    (tmp_path/"png").mkdir()
    for i, p in enumerate(to_bytes(TASKS["two_squares"].sample(6, 0)[0])): Image.fromarray(p).save(tmp_path/"png"/f"{i}.png")
    return tmp_path/"png"


def at_work(*args, **kw): pytest.fail("worked before it looked at the place")


# ---------------------------------------------------------------- places are looked at before any work

def occupied(tmp_path):
    "Places that hold what no file can replace, and how each is named."
    (tmp_path/"file").write_text("x")
    for end in ("csv", "md", "npz", "png"): (tmp_path/f"dir.{end}").mkdir(), (tmp_path/f"dir.{end}"/"mine").write_text("x")
    for end in ("csv", "md", "npz", "png"): os.mkfifo(tmp_path/f"pipe.{end}"), (tmp_path/f"loop.{end}").symlink_to(f"loop.{end}")


@POSIX
@pytest.mark.parametrize("name,word", [("dir.{}", "it is a folder"), ("pipe.{}", "it is a pipe"), ("loop.{}", "Too many levels"),
                                       ("file/x.{}", "cannot write")])
@pytest.mark.parametrize("option,end", [("--out", "csv"), ("--out", "md"), ("--per-image", "csv")])
def test_a_report_looks_at_its_places_first(option, end, name, word, pngs, tmp_path, capsys, monkeypatch):
    occupied(tmp_path)
    monkeypatch.setattr(cli, "read_images", at_work)
    err = fails(capsys, *REPORT, pngs, option, tmp_path/name.format(end))
    assert word in err and name.format(end).split("/")[0] in err


def test_two_files_of_a_report_are_two(pngs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "read_images", at_work)
    err = fails(capsys, *REPORT, pngs, "--out", tmp_path/"r.csv", "--per-image", tmp_path/"png"/".."/"r.csv")
    assert "--out and --per-image must differ" in err


@POSIX
@pytest.mark.parametrize("out,word", [("dir.png", "holds mine"), ("dir.npz", "holds mine"), ("pipe.png", "it is a pipe"), ("loop.npz", "Too many"),
                                      ("file", "cannot write"), (".", "of its own"), ("", "of its own"), ("..", "of its own"),
                                      ("file/x/y", "cannot")])
def test_samples_look_at_their_place_first(out, word, tmp_path, capsys, monkeypatch):
    (tmp_path/"here").mkdir(), occupied(tmp_path)
    monkeypatch.chdir(tmp_path/"here")
    monkeypatch.setattr(cli, "load_pretrained", at_work)
    place = out if out in ("", ".", "..") else tmp_path/out
    assert word in fails(capsys, "sample", "two_squares", "--n", 2, "--steps", 1, f"--out={place}")


@pytest.mark.parametrize("n,names,ok", [(2, ["0000.png"], True), (2, ["0002.png"], False), (3, ["0002.png"], True), (2, ["x.png"], False),
                                        (2, [], True)])
def test_a_folder_of_samples_is_replaced_where_nothing_is_lost(n, names, ok, tmp_path):
    "The command and `save_images` agree."
    (tmp_path/"s").mkdir()
    for k in names: (tmp_path/"s"/k).write_text("x")
    def allowed(f):
        try: f()
        except ValueError as e: return "holds" not in str(e)
        return True
    assert allowed(lambda: cli.check_pictures(str(tmp_path/"s"), n)) == ok
    assert allowed(lambda: save_images(torch.zeros(n, 3, 16, 16), tmp_path/"s")) == ok


@pytest.mark.parametrize("name", ["demo.csv", "demo.txt", "demo.png"])
def test_a_demo_looks_at_its_files_first(name, weights, tmp_path, capsys, monkeypatch):
    (tmp_path/"d"/name).mkdir(parents=True)
    monkeypatch.setattr(cli, "demo_rows", at_work)
    assert f"{name}: it is a folder" in fails(capsys, "demo", "--n", 16, "--out", tmp_path/"d")


@POSIX
@pytest.mark.parametrize("place", ["file", "file/w", "half", "piped", "/proc/none"])
def test_train_looks_at_its_places_first(place, tiny, tmp_path, capsys, monkeypatch):
    (tmp_path/"file").write_text("x"), (tmp_path/"half"/"two_squares-fixed.json").mkdir(parents=True), (tmp_path/"piped").mkdir()
    os.mkfifo(tmp_path/"piped"/"two_squares-fixed.safetensors")
    monkeypatch.setattr(cli, "train_steps", at_work)
    assert "cannot write" in fails(capsys, *TRAIN, "--out", tmp_path/"runs", "--weights", tmp_path/place)
    if place in ("file", "file/w", "/proc/none"): assert "cannot write" in fails(capsys, *TRAIN, "--out", tmp_path/place)


@pytest.mark.parametrize("change,word", [
    ("T=10", "T must be at least 25, which the report takes, got 10"), ("betas=zero_snr prediction=epsilon sigma_data=0", "epsilon"),
    ("channels=16,16,16", "channels must be at least head_dim, 48, where attention is on, got (16, 16, 16)"),
    ("channels=16,16,16 attention=False,False,False", "the last of channels must be at least head_dim, 48"),
    ("betas=linear beta_end=2", ""), ("beta_start=-1 betas=linear", "")])
def test_train_refuses_a_recipe_that_could_not_be_measured(change, word, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "train_steps", at_work)
    assert word in fails(capsys, *TRAIN, "--out", tmp_path/"runs", "--change", change)
    assert not list(tmp_path.rglob("checkpoint.safetensors"))


@POSIX
@pytest.mark.parametrize("args,word", [
    (TRAIN, "runs"), (("study", "toy"), "runs/toy"), (("study", "--all", "--quick"), "runs"), (("sample", "two_squares"), "samples.png"),
    ((*REPORT, "png", "--out", "r.csv"), "r.csv"), (("demo",), "demo"), (("grid", "two_squares"), "runs/grid"), (("doctor",), "demo")])
def test_a_read_only_working_folder_is_told_of_before_any_work(args, word, toy, pngs, tmp_path, capsys, monkeypatch):
    "Rights that hold for root too: nothing can be made anew."
    def read_only(call, making): return lambda path, *more, **kw: refuse(path) if making(more) else call(path, *more, **kw)
    def refuse(path): raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(os, "open", read_only(os.open, lambda more: more[0] & os.O_CREAT))
    monkeypatch.setattr(os, "mkdir", read_only(os.mkdir, lambda more: True))
    monkeypatch.chdir(tmp_path)
    for name in ("read_images", "load_pretrained", "train_steps", "demo_rows", "outlook", "run_study"): monkeypatch.setattr(cli, name, at_work)
    monkeypatch.setattr(type(TASK), "sample", at_work)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(capsys, *args)
    said = out if args == ("doctor",) else err   # among the rest of what it looks at
    assert status == 1 and f"cannot write {word}" in said.replace("write to", "write") and "Permission denied" in said
    assert (args == ("doctor",) or out == "") and err.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before


def test_a_network_that_torch_cannot_compute_is_named_by_its_fields(monkeypatch):
    def broken(*args, **kw): raise RuntimeError("shapes do not fit\nmore")
    monkeypatch.setattr("rulediff_nb.study.sample", broken)
    with pytest.raises(ValueError, match=r"no network can work with channels=\(64, 64, 96\), .*patch=2: RuntimeError: shapes do not fit$"):
        cli.rehearse(cli.unet("laptop", TASK), 2)


def test_train_refuses_a_report_that_is_too_long(tmp_path, capsys):
    assert "score must be in [64, 100000]" in fails(capsys, *TRAIN, "--score", 10**9, "--out", tmp_path/"runs")


def test_a_training_set_of_one_image_is_measured():
    assert rule_report(TASK, TASK.sample(4, 0)[0], TASK.sample(1, 1)[0], draws=2).memorized is not None


# ---------------------------------------------------------------- one bad file among many

def spoil(folder, name): (folder/f"{name}.safetensors").write_bytes((folder/f"{name}.safetensors").read_bytes()[:-1])


def test_a_demo_names_damaged_weights_and_does_the_rest(weights, tmp_path, capsys):
    release(weights, "two_squares-random", TASK.with_(palette="random"))
    spoil(weights, "two_squares-random")
    status, out, err = run(capsys, "demo", "--n", 16, "--steps", 1, "--out", tmp_path/"d")
    assert status == 1 and "written: " in out and set(pd.read_csv(tmp_path/"d"/"demo.csv").palette) == {"fixed"}
    assert "two_squares-random.safetensors is damaged" in err and err.endswith("rulediff demo: 1 of 2 models cannot be used, see above\n")


def test_a_demo_names_a_damaged_classifier(weights, guide, tmp_path, capsys):
    spoil(tmp_path/"classifiers", "two_squares-fixed-classifier")
    assert "two_squares-fixed-classifier.safetensors is damaged" in fails(capsys, "demo", "--n", 16, "--steps", 1, "--out", tmp_path/"d")
    assert run(capsys, "demo", "--n", 16, "--steps", 1, "--scale", 0, "--out", tmp_path/"d")[0] == 0


def test_list_names_damaged_weights(weights, capsys):
    release(weights, "two_squares-random", TASK.with_(palette="random"))
    (weights/"two_squares-random.json").write_text("{")
    status, out, _ = run(capsys, "list")
    assert status == 0 and "two_squares-random (damaged, see rulediff doctor)" in out and "two_squares-fixed " in out


@POSIX
def test_tables_that_cannot_be_read_are_named_among_the_others(tmp_path, capsys):
    for end in ("csv", "json"): (tmp_path/f"ruler.{end}").write_bytes((table.RESULTS/f"ruler.{end}").read_bytes())
    for name in ("a", "b", "c"): (tmp_path/f"{name}.csv").write_text("x,y\n1,2\n")
    (tmp_path/"b.json").write_text("[]"), os.mkfifo(tmp_path/"c.json"), (tmp_path/"d.csv").mkdir()
    status, out, _ = run(capsys, "table", "--folder", tmp_path)
    assert status == 0 and out.count("cannot be read") == 4 and any(v.split()[:2] == ["ruler", "10"] for v in out.splitlines())


@POSIX
def test_doctor_waits_for_no_pipe(shelf, tmp_path, capsys):
    for name in ("ruler.csv", "certificate.json", "certificate.npz"):
        before = (shelf/name).read_bytes()
        (shelf/name).unlink(), os.mkfifo(shelf/name)
        status, out, _ = run(capsys, "doctor", "--out", tmp_path/"d")
        assert status == 1 and "a pipe" in out
        (shelf/name).unlink(), (shelf/name).write_bytes(before)


def test_a_study_says_which_result_is_not_used(toy, tmp_path, capsys):
    args = "study", "toy", "--workers", 1, "--out", tmp_path/"r"
    run(capsys, *args)
    file = next(p for p in (tmp_path/"r").glob("*/result.json") if p.parent.name.startswith("bent-0"))
    file.write_bytes(b"")
    status, out, err = run(capsys, *args)
    assert status == 0 and "3 there, 1 to do" in out and err.startswith(f"rulediff: {file} is empty") and err.count("\n") == 1


def test_a_study_that_wrote_no_table_says_so(toy, tmp_path, capsys):
    def broken(row, work): raise OSError("no disk")
    register_study(Study("toy", "", toy.plan, broken, keys=("coin",)))
    status, out, _ = run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"r")
    assert status == 1 and "no row is measured, so there is no table" in out and "toy.csv" not in out and not (tmp_path/"r"/"toy.csv").exists()
    register_study(Study("toy", "", lambda quick: [], broken))
    assert "toy has no rows" in run(capsys, "study", "toy", "--out", tmp_path/"q")[2] and not (tmp_path/"q").exists()


class Need(NamedTuple):
    "Weights that are damaged."
    key: str = "bad"
    def weights(self, folder): raise cli.StoreError(f"{folder}/bad is damaged")


def test_a_study_counts_rows_that_cannot_be_done(toy, tmp_path, capsys):
    register_study(Study("toy", "", toy.plan, toy.measure, lambda row: (Need(),) if row.coin == "bent" else (), keys=("coin",), shown=("share",)))
    status, out, err = run(capsys, "study", "toy", "--workers", 1, "--out", tmp_path/"r")
    assert status == 1 and "toy: 4 rows, 0 there, 2 to do, without a training, 2 that cannot be done" in out and out.count("bad is damaged") == 2
    assert err == "rulediff study: 2 of 4 rows failed, see above; the same command tries them again\n" and len(results("toy", tmp_path/"r")) == 2


def test_a_column_of_words_has_a_headline(toy):
    for v, want in (("far", "far"), (None, "-"), (2, "2.000")):
        done = cli.Done(toy.plan(True)[0], "measured", [dict(share=v)])
        assert cli.headline(toy, done) == f"fair seed=0: share {want}"


# ---------------------------------------------------------------- a figure that cannot be drawn

def test_a_demo_without_its_figure_keeps_its_table(weights, tmp_path, capsys, monkeypatch):
    def broken(*args): raise RuntimeError("latex\ncould not be found")
    args = "demo", "--n", 16, "--steps", 1, "--out", tmp_path/"d"
    assert run(capsys, *args)[0] == 0 and (tmp_path/"d"/"demo.png").exists()
    monkeypatch.setattr(cli, "plot_panels", broken)
    status, out, err = run(capsys, *args)
    assert status == 0 and sorted(p.name for p in (tmp_path/"d").iterdir()) == ["demo.csv", "demo.txt"]   # no figure of another run beside them
    assert err == f"rulediff demo: {tmp_path/'d'/'demo.png'} cannot be drawn: RuntimeError: latex could not be found\n"
    assert out.rstrip().endswith(f"written: {tmp_path/'d'/'demo.txt'}, {tmp_path/'d'/'demo.csv'}")


# ---------------------------------------------------------------- disks, memory, workers

def test_samples_on_a_full_disk(weights, tmp_path, capsys, monkeypatch):
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    (tmp_path/"s.png").write_bytes(b"old")
    monkeypatch.setattr(cli, "save_images", full)
    assert "cannot write" in (err := fails(capsys, "sample", "two_squares", "--n", 1, "--steps", 1, "--out", tmp_path/"s.png")) and "No space" in err
    assert (tmp_path/"s.png").read_bytes() == b"old"


def test_a_report_is_shown_where_its_file_cannot_be_written(pngs, tmp_path, capsys, monkeypatch):
    def full(*args): raise cli.StoreError("cannot write r.md: No space left on device")
    monkeypatch.setattr(cli, "write_atomic", full)
    status, out, err = run(capsys, *REPORT, pngs, "--out", tmp_path/"r.md")
    assert status == 1 and "rule_gap" in out and err == "rulediff report: cannot write r.md: No space left on device\n"


@pytest.mark.parametrize("error,word", [
    (MemoryError("80 GB"), "there is not enough memory: 80 GB"), (torch.OutOfMemoryError("CUDA"), "there is not enough memory: CUDA"),
    (BrokenExecutor("a worker\nwas killed"), "a worker process was ended, perhaps for want of memory: a worker was killed"),
    (NotImplementedError("no flock"), "no flock"), (OSError(), "OSError"), (ValueError(), "ValueError")])
def test_errors_of_the_machine_are_one_line(error, word, capsys, monkeypatch):
    def broken(argv): raise error
    monkeypatch.setattr(cli, "run_command", broken)
    assert fails(capsys, "list") == f"rulediff list: {word}\n"


# ---------------------------------------------------------------- streams

@pytest.mark.parametrize("stream", [None, "closed"])
def test_streams_that_python_lacks(stream, monkeypatch):
    for name in ("stdout", "stderr"):
        s = io.StringIO() if stream else None
        if s: s.close()
        monkeypatch.setattr(sys, name, s)
    assert cli.main(["--version"]) == 0 and cli.main(["smaple"]) == 2 and cli.main(["train", "moon"]) == 1


@POSIX
@pytest.mark.parametrize("command,line", [
    (RULEDIFF, "study ruler --quick --only task=two_circles --out $PWD/q"),
    (f"{RULEDIFF}.cli", "sample two_squares --n 2 --steps 1 --out $PWD/q/x.png"),
    (RULEDIFF, "train two_squares --steps 2 --n 8 --score 64 --change 'channels=16,16,16 head_dim=8' --out $PWD/q")])
def test_a_command_with_workers_or_bars_and_no_stream(command, line, tmp_path):
    assert shell(f"{command} {line} <&- >&- 2>&-", tmp_path, PYTHONPATH=str(ROOT)) == (0, "", "")
    found = {p.name for p in (tmp_path/"q").rglob("*")}
    assert dict(study="ruler.csv", sample="x.png", train="two_squares-fixed.safetensors")[line.split()[0]] in found


@POSIX
def test_no_file_becomes_a_standard_stream(tmp_path):
    code = ("import os, sys; from rulediff_nb.cli import steady_streams; os.close(0), os.close(1), os.close(2); steady_streams(); "
            f"f = open({str(tmp_path/'f')!r}, 'w'); f.write(str(f.fileno()) + str([os.get_inheritable(k) for k in range(3)]))")
    assert shell(f'{sys.executable} -c "{code}"')[0] == 0
    assert int((tmp_path/"f").read_text()[0]) > 2 and "[True, True, True]" in (tmp_path/"f").read_text()


# ---------------------------------------------------------------- python -OO

def test_help_without_docstrings(tmp_path):
    code = "from rulediff_nb.cli import main; [main(v) for v in (['--help'], ['train', '--help'], ['list'])]"
    status, out, err = shell(f'{sys.executable} -OO -c "{code}"')
    assert status == 0 and err == "" and "None" not in out
    assert "  train   Train a model on a task" in out and "Train a model on a task, resuming" in out.split("usage: rulediff train")[1]


def test_a_docstring_is_read_from_the_source(monkeypatch):
    def f(): "What it does."
    class Own: "Rule a == b."
    f.__doc__ = Own.__doc__ = None
    assert cli.doc(f) == "What it does." and cli.doc(Own) == "Rule a == b." and cli.doc(len) == len.__doc__
    g = eval("lambda: 0")
    assert cli.doc(g) == ""


# ---------------------------------------------------------------- threads that wait

@pytest.mark.parametrize("there,want", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_is_passive_before_torch_is_there(there, want, monkeypatch):
    from rulediff_nb import __main__ as entry
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if there: monkeypatch.setenv("OMP_WAIT_POLICY", there)
    monkeypatch.setattr(cli, "main", lambda: 0)
    assert entry.main() == 0 and os.environ.get("OMP_WAIT_POLICY") == there   # torch is here already: too late
    monkeypatch.delitem(sys.modules, "torch")
    assert entry.main() == 0 and os.environ["OMP_WAIT_POLICY"] == want


# ---------------------------------------------------------------- signals

@POSIX
@pytest.mark.parametrize("name,status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_command_once(name, status, capsys, monkeypatch):
    saved, number = [], getattr(signal, name)
    before = signal.getsignal(number)
    monkeypatch.setattr(signal, "default_int_handler", signal.getsignal(signal.SIGINT))   # whatever a test runner has set counts as plain
    def work(argv):
        try: os.kill(os.getpid(), number), time.sleep(5)
        finally:   # what is saved is saved, however often one presses
            for _ in range(3): os.kill(os.getpid(), number), time.sleep(.01)
            saved.append(1)
    monkeypatch.setattr(cli, "run_command", work)
    found, _, err = run(capsys, "train")
    assert found == status and saved == [1] and "interrupted" in err and err.count("\n") == 1 and signal.getsignal(number) == before


@POSIX
def test_a_signal_that_is_ignored_or_handled_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)   # nohup
    try:
        with cli.one_stop(): assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, before)
    found = []
    def elsewhere():
        with cli.one_stop() as seen: found.append(seen)
    t = threading.Thread(target=elsewhere)
    t.start(), t.join()
    assert found == [[]]


@POSIX
def test_a_training_that_is_terminated_keeps_what_it_has(tmp_path):
    small = "--steps", "100000", "--n", "16", "--change", "channels=16,16,16 head_dim=8"
    args = [*RULEDIFF.split(), "train", "two_squares", *small, "--out", str(tmp_path)]
    p = subprocess.Popen(args, cwd=ROOT, env=clean_env(OMP_NUM_THREADS="1"), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert "step 100 " in next(line for line in p.stdout if line.startswith("step"))
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGINT): p.send_signal(s), time.sleep(.02)
        _, err = p.communicate(timeout=60)
    finally: p.kill()
    assert p.returncode == 143 and "Traceback" not in err and "interrupted; finished files are whole" in err
    folder, = tmp_path.iterdir()
    assert sorted(q.name for q in folder.iterdir()) == [".lock", "checkpoint.safetensors"]
    from rulediff_nb.train import stands_at
    assert stands_at(folder) >= 100


# ---------------------------------------------------------------- two at once

def test_two_trainings_in_one_folder(tiny, tmp_path, capsys):
    from rulediff_nb.train import claim
    args = *TRAIN, "--out", tmp_path/"a"
    assert run(capsys, *args)[0] == 0
    lock = claim(next((tmp_path/"a").iterdir()))
    try: assert "another run is at work in" in fails(capsys, *args)
    finally: lock.release()
    assert run(capsys, *args)[0] == 0 and load_release(next((tmp_path/"a").iterdir()), "two_squares-fixed")


def test_pale_images_of_a_demo_task_are_no_floats(tmp_path, capsys):
    np.savez(tmp_path/"x.npz", np.full((9, 32, 32, 3), 250, np.uint8) - np.arange(32, dtype=np.uint8)[None, :, None, None])
    status, out, err = run(capsys, *REPORT, tmp_path/"x.npz")
    assert status == 0 and "9 images" in out and "[-1,1]" not in err
