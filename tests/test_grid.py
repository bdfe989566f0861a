"A grid gives one row per job whatever happens: twice, killed, failing, on processes or on a cluster."
import csv
import json
import signal
import subprocess
import sys
import time

import pytest
from tree import clean_env

from rulediff_nb import cli, grid
from rulediff_nb.grid import Job, engine, grid_table, job_recipe, jobs, pace, run_grid, run_job
from rulediff_nb.unet import unet

TINY = dict(channels=(16, 16), attention=(False, False), head_dim=8, batch=8)
WORDS = "channels=16,16 attention=False,False head_dim=8 batch=8"


def plan(**more): return jobs(["two_squares", "two_circles"], changes=[TINY], steps=[2], n=32, **more)


def measures(rows):
    "What must not depend on where and when a job ran."
    kept = ("task", "label", "seed", "steps", "loss", "mse_50", "mse_600", "readable", "rule_gap")
    return sorted([r[k] for k in kept] for r in rows)


def test_jobs_are_all_combinations_seeds_last():
    p = jobs(["two_circles", "two_squares"], ["fixed", "random"], ["laptop", "published"], [{}, dict(lr=1e-3)], [10, 20], [0, 1])
    assert len(set(p)) == len({j.key for j in p}) == 64 and [j.seed for j in p] == [0]*32 + [1]*32


def test_a_jobs_key_is_its_own():
    a = Job("two_circles")
    others = [a._replace(**c) for c in (dict(steps=7), dict(seed=3), dict(n=5), dict(palette="random"), dict(changes=(("lr", .1),)))]
    assert len({j.key for j in [a, *others]}) == 6


@pytest.mark.parametrize("args,word", [
    (dict(tasks=["moon"]), "moon"), (dict(palettes=["sepia"]), "sepia"), (dict(presets=["desktop"]), "desktop"),
    (dict(changes=[dict(colour=1)]), "colour"), (dict(steps=[0]), "steps"), (dict(seeds=[-1]), "seed"), (dict(n=-1), "n ")])
def test_a_job_that_cannot_be_is_refused_before_any_work(args, word):
    with pytest.raises((ValueError, TypeError), match=word): jobs(**(dict(tasks=["two_circles"]) | args))


def test_a_recipe_follows_its_job():
    r = job_recipe(Job("two_circles", "random", changes=(("lr", .5),)))
    assert r.lr == .5 and r.task.palette == "random" and r.preset == "laptop"


def test_a_grid_twice_trains_once(tmp_path, monkeypatch):
    first = list(run_grid(plan(), tmp_path, 1, images=16))
    monkeypatch.setattr(grid, "train_steps", lambda *a, **k: pytest.fail("trained again"))
    assert measures(run_grid(plan(), tmp_path, 1, images=16)) == measures(first)


def test_the_table_holds_every_row(tmp_path):
    rows = list(run_grid(plan(seeds=[0, 1]), tmp_path, 1, images=16))
    table = list(csv.DictReader((tmp_path/"grid.csv").open()))
    assert len(table) == len(rows) == 4 and {t["schema"] for t in table} == {"1"}
    assert [t["task"] for t in table] == ["two_circles"]*2 + ["two_squares"]*2
    assert {"readable", "readable_floor", "rule_gap_low", "rule_gap_high", "mse_100", "label", "revision"} <= set(table[0])


def test_a_failing_job_is_a_row_and_the_others_go_on(tmp_path):
    bad = jobs(["two_squares"], changes=[TINY | dict(optimizer="magic")], steps=[2], n=32)
    rows = list(run_grid([*bad, *plan()], tmp_path, 1, images=16))
    assert len(rows) == 3 and sum("error" in r for r in rows) == 1
    assert "magic" in next(r["error"] for r in rows if "error" in r)
    assert not (tmp_path/bad[0].key/"result.json").exists()   # so it is tried again
    assert "magic" in grid_table(rows)


def test_processes_give_the_rows_of_one(tmp_path):
    one, two = (list(run_grid(plan(), tmp_path/str(k), k, images=16)) for k in (1, 2))
    assert measures(one) == measures(two)


def test_a_dask_cluster_of_two_workers_gives_the_same_rows(tmp_path):
    pytest.importorskip("distributed")
    one, two = list(run_grid(plan(), tmp_path/"a", 1, images=16)), list(run_grid(plan(), tmp_path/"b", 2, "dask", images=16))
    assert measures(one) == measures(two)


def test_a_running_dask_cluster_is_named_by_its_address(tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as c:
        rows = list(run_grid(plan(), tmp_path, 2, "dask", c.scheduler_address, images=16))
    assert len(rows) == 2 and not any("error" in r for r in rows)


def test_unknown_engines_are_named():
    with pytest.raises(ValueError, match="loky, dask or ray, got 'slurm'"), engine("slurm"): pass


def test_an_engine_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"rulediff_nb\[ray\]"), engine("ray"): pass


CHILD = """
import sys
from rulediff_nb.grid import jobs, run_grid
tiny = dict(channels=(16, 16), attention=(False, False), head_dim=8, batch=8)
todo = jobs(['two_squares'], changes=[tiny], steps=[40], seeds=[0, 1, 2], n=32)
for r in run_grid(todo, sys.argv[1], 1, images=16): print(r['seed'], flush=True)
"""


def test_a_killed_grid_goes_on(tmp_path):
    p = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path/"a")], env=clean_env(), stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline().strip() == "0"   # the first job is done
    time.sleep(.5)
    p.send_signal(signal.SIGKILL), p.wait()
    todo = jobs(["two_squares"], changes=[TINY], steps=[40], seeds=[0, 1, 2], n=32)
    stamp = (tmp_path/"a"/todo[0].key/"result.json").stat().st_mtime_ns
    rows = list(run_grid(todo, tmp_path/"a", 1, images=16))
    assert (tmp_path/"a"/todo[0].key/"result.json").stat().st_mtime_ns == stamp
    assert measures(rows) == measures(run_grid(todo, tmp_path/"b", 1, images=16))


def test_a_job_whose_grid_was_killed_stops_and_goes_on_later(tmp_path, monkeypatch):
    job, asked = plan()[0]._replace(steps=6), iter([1, 1, 1])
    with monkeypatch.context() as m:
        m.setattr(grid.os, "getppid", lambda: next(asked, 2))   # after two steps the parent is another
        with pytest.raises(RuntimeError, match="has ended"): run_job(job, tmp_path, 64)
    assert (tmp_path/job.key/"checkpoint.safetensors").exists() and not (tmp_path/job.key/"result.json").exists()
    assert run_job(job, tmp_path, 64)["steps"] == 6


def test_a_result_is_json_with_no_nan(tmp_path):
    job = plan()[0]
    run_job(job, tmp_path, 16)
    json.loads((tmp_path/job.key/"result.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))


def test_pace_is_positive_and_a_wider_network_is_slower():
    slow = unet("laptop", "two_squares", **TINY | dict(channels=(64, 64), batch=32))
    assert 0 < pace(unet("laptop", "two_squares", **TINY), 3) < pace(slow, 3)


def test_the_command(tmp_path, capsys):
    args = ["grid", "two_squares,two_circles", "--changes", WORDS, "--steps", "2", "--seeds", "0", "--n", "32", "--images", "16",
            "--workers", "1", "--out", str(tmp_path)]
    assert cli.main(args) == 0 and capsys.readouterr().out.count("readable") == 2
    assert len(list(csv.DictReader((tmp_path/"grid.csv").open()))) == 2


@pytest.mark.parametrize("args,word", [
    (["moon"], "moon"), (["two_squares", "--steps", "ten"], "steps must be"), (["two_squares", "--changes", "lr=fast"], "lr must be"),
    (["two_squares", "--engine", "slurm"], "slurm")])
def test_the_command_refuses_in_one_line(args, word, tmp_path, capsys):
    assert cli.main(["grid", *args, "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1


def test_the_command_says_when_runs_failed(tmp_path, capsys):
    assert cli.main(["grid", "two_squares", "--changes", WORDS + " optimizer=magic", "--steps", "1", "--seeds", "0", "--n", "32",
                     "--workers", "1", "--out", str(tmp_path)]) == 1
    assert "1 of 1 runs failed" in capsys.readouterr().err


def test_equal_recipes_share_a_key():
    a, b = (jobs(["two_circles"], changes=[c])[0].key for c in (dict(lr=.5, batch=8), dict(batch=8, lr=.5)))
    assert a == b != jobs(["two_circles"], changes=[dict(lr=.25, batch=8)])[0].key
    full = jobs(["two_circles"], n=2000)[0]
    assert full.key == jobs(["two_circles"])[0].key   # n=0 is the study's 2000


def test_other_images_are_measured_again(tmp_path):
    job = plan()[0]
    assert [run_job(job, tmp_path, k)["images"] for k in (16, 24, 24)] == [16, 24, 24]


def test_a_finished_run_without_a_result_does_not_invent_its_time(tmp_path):
    job = plan()[0]
    first = run_job(job, tmp_path, 16)
    (tmp_path/job.key/"result.json").unlink()
    again = run_job(job, tmp_path, 16)
    assert first["cpu_seconds"] > 0 and again["cpu_seconds"] is None is again["loss"] and again["rule_gap"] == first["rule_gap"]


def test_a_second_grid_adds_to_the_table_and_never_runs_beside_the_first(tmp_path):
    a, b = plan()
    list(run_grid([a], tmp_path, 1, images=16))
    grids = run_grid([b], tmp_path, 1, images=16), run_grid([b], tmp_path, 1, images=16)
    next(grids[0])
    with pytest.raises(ValueError, match="another run is at work"): next(grids[1])
    list(grids[0])
    assert len(list(csv.DictReader((tmp_path/"grid.csv").open()))) == 2
