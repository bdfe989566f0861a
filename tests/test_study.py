"A study trains once, measures once, survives a kill, and measures again what rests on something else; on processes or on a cluster."
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from tree import clean_env

from rulediff_nb import study as module
from rulediff_nb import table
from rulediff_nb.store import StoreError, load_tensors
from rulediff_nb.study import (
    RULE_NOISE,
    Denoiser,
    Shipped,
    chosen,
    grid,
    noisy_rule,
    outdated,
    pace,
    report_mark,
    row_inputs,
    row_key,
    row_states,
    ruler_mark,
    run_study,
    ship,
    use_engine,
)
from rulediff_nb.table import STUDIES, Study, Work, about, arrays, find_study, read_table, register_study, results, studies, summary
from rulediff_nb.tasks import TASKS
from rulediff_nb.unet import unet

TINY = dict(channels=(16, 16), attention=(False, False), head_dim=8, batch=8)
CPU = torch.device("cpu")


class Toss(NamedTuple):
    coin: str
    seed: int


def tosses(quick): return [Toss(c, s) for s in range(1 if quick else 2) for c in ("fair", "bent")]
def share(row, work): return dict(share=row.seed + (.5 if row.coin == "fair" else .7))


TOY = Study("toy", "is the coin fair?", tosses, share, keys=("coin",), shown=("share",))


def states(*args, **more): return [d.state for d in run_study(*args, workers=1, **more)]


def plan(**more): return grid(["two_squares", "two_circles"], changes=[TINY], steps=[2], n=32, images=16, **more)


def measures(folder):
    "What must not depend on where and when a row was measured."
    df = results("grid", folder)[["task", "label", "seed", "steps", "mse_50", "mse_600", "readable", "rule_gap"]]
    return df.sort_values(["task", "seed"]).reset_index(drop=True)


def same(a, b): return pd.testing.assert_frame_equal(measures(a), measures(b), rtol=1e-5)


# ---- rows

def test_a_row_is_measured_once(tmp_path):
    assert states(TOY, tmp_path) == ["measured"]*4 and states(TOY, tmp_path) == ["kept"]*4
    assert results("toy", tmp_path).share.tolist() == [.5, .7, 1.5, 1.7]


@pytest.mark.parametrize("change", [
    dict(version=2), dict(plan=lambda quick: [r._replace(seed=r.seed + 10) for r in tosses(quick)])])
def test_a_row_is_measured_again_where_study_or_plan_changed(change, tmp_path):
    states(TOY, tmp_path)
    assert states(dataclasses.replace(TOY, **change), tmp_path) == ["measured"]*4


MARKS = ruler_mark, report_mark   # the functions, which keep what they gave


def forget():
    for f in MARKS: f.cache_clear()


@pytest.fixture
def marks():
    "Both marks as they are now, computed anew at each call; nothing is kept for another test."
    def fresh():
        forget()
        return ruler_mark(), report_mark()
    yield fresh
    forget()


TRUE_TO_THE_RULER = dataclasses.replace(TOY, reports=False)


@pytest.mark.parametrize("study", [TOY, TRUE_TO_THE_RULER], ids=["with reports", "without"])
def test_a_row_is_measured_again_by_another_ruler(study, tmp_path, monkeypatch, marks):
    states(study, tmp_path)
    forget()
    monkeypatch.setattr(module, "ruler_mark", lambda: "another")
    assert states(study, tmp_path) == ["measured"]*4


def test_only_rows_that_rest_on_reports_are_measured_again_by_another_report(tmp_path, monkeypatch):
    for study, name in (TOY, "a"), (TRUE_TO_THE_RULER, "b"): states(study, tmp_path/name)
    monkeypatch.setattr(module, "report_mark", lambda: "another")
    assert states(TOY, tmp_path/"a") == ["measured"]*4 and states(TRUE_TO_THE_RULER, tmp_path/"b") == ["kept"]*4


@pytest.mark.parametrize("which", ["ruler_readings", "report_readings"])
def test_a_mark_is_what_is_read_and_no_more(which, monkeypatch, marks):
    now, plain, at = marks(), getattr(module, which), which == "report_readings"
    monkeypatch.setattr(module, which, lambda row: {k: v*(1 + 1e-5) for k, v in plain(row).items()})
    assert marks() == now   # another machine's last digits
    monkeypatch.setattr(module, which, lambda row: {k: v*1.02 for k, v in plain(row).items()})
    assert marks()[at] != now[at]


def test_a_threshold_of_the_ruler_changes_both_marks(monkeypatch, marks):
    now = marks()
    monkeypatch.setattr("rulediff_nb.features.LEFT", .005)
    assert all(a != b for a, b in zip(marks(), now))


@pytest.mark.parametrize("place,change", [
    ("gates.ks_distance", lambda f: lambda *a, **kw: f(*a, **kw)*.9), ("metrics.gap", lambda f: lambda *a: f(*a) + .01)], ids=["marginals", "gap"])
def test_a_change_in_gates_or_reports_changes_the_mark_of_reports_alone(place, change, monkeypatch, marks):
    (ruler, report), full = marks(), f"rulediff_nb.{place}"
    assert report.startswith(ruler + "-")
    monkeypatch.setattr(full, change(getattr(sys.modules[full.rpartition(".")[0]], place.split(".")[1])))
    monkeypatch.setattr("rulediff_nb.gates._SPREADS", {})
    again = marks()
    assert again[0] == ruler and again[1] != report


def test_another_plan_leaves_the_other_rows(tmp_path):
    states(TOY, tmp_path)
    longer = dataclasses.replace(TOY, plan=lambda quick: [*tosses(quick), Toss("fair", 9)])
    assert states(longer, tmp_path) == ["kept"]*4 + ["measured"]


def test_a_failing_row_is_named_and_the_others_go_on(tmp_path):
    def fragile(row, work): return dict(share=1/(row.seed - 1))
    done = list(run_study(dataclasses.replace(TOY, measure=fragile), tmp_path, workers=1))
    assert [d.state for d in done] == ["measured"]*2 + ["failed"]*2 and "ZeroDivisionError" in done[-1].error
    assert len(results("toy", tmp_path)) == 2
    assert states(TOY, tmp_path) == ["kept"]*2 + ["measured"]*2


def stored(folder): return folder/row_key(TOY, Toss("fair", 0))/"result.json"


def part(blob, **change): return json.dumps(json.loads(blob) | change).encode()


DAMAGE = {"empty": (lambda b: b"", "is empty"), "blank": (lambda b: b" \n", "is empty"), "brace": (lambda b: b"{", "is not JSON"),
          "list": (lambda b: b"[]", "not of the form"), "other": (lambda b: b'{"task": "two_circles", "images": 16}', "not of the form"),
          "zeros": (lambda b: bytes(40), "is not JSON"), "cut": (lambda b: b[:len(b)//2], "is not JSON"),
          "text": (lambda b: b"\xff\xfe{", "is not JSON"),
          "deep": (lambda b: b"["*100_000, "is not JSON"), "row": (lambda b: part(b, row=[1]), "form"),
          "lines": (lambda b: part(b, lines=[3]), "form"),
          "weights": (lambda b: part(b, weights=None), "form"), "seconds": (lambda b: part(b, seconds="long"), "form")}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_result_is_named_and_measured_again(how, tmp_path):
    states(TOY, tmp_path)
    file, (harm, word) = stored(tmp_path), DAMAGE[how]
    file.write_bytes(harm(file.read_bytes()))
    done = list(run_study(TOY, tmp_path, workers=1))
    assert sorted(d.state for d in done) == ["kept"]*3 + ["measured"]
    said, = [d.error for d in done if d.error]
    assert str(file) in said and word in said and json.loads(file.read_text())["lines"] == [dict(share=.5)]
    assert len(results("toy", tmp_path)) == 4 and states(TOY, tmp_path) == ["kept"]*4


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda p: p.symlink_to(p.name), lambda p: p.symlink_to("/dev/zero")])
def test_a_result_that_is_no_file_is_named_and_the_others_are_measured(make, tmp_path):
    states(TOY, tmp_path)
    stored(tmp_path).unlink(), make(stored(tmp_path))
    done = [d for d in run_study(dataclasses.replace(TOY, version=2), tmp_path, workers=1)]
    assert sorted(d.state for d in done) == ["failed"] + ["measured"]*3 and len(results("toy", tmp_path)) == 3
    assert str(stored(tmp_path)) in [d for d in done if d.state == "failed"][0].error


def test_a_result_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    states(TOY, tmp_path)
    plain = Path.read_bytes

    def refuse(self):
        if self == stored(tmp_path): raise PermissionError(13, "Permission denied")
        return plain(self)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    rows = tosses(False)
    assert module.damaged_rows(TOY, rows, module.Where(str(tmp_path), "t")) == {
        row_key(TOY, rows[0]): f"cannot read {stored(tmp_path)}: Permission denied"}


@pytest.mark.parametrize("harm", [lambda p: p.unlink(), lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes()[:-30]),
                                  lambda p: np.savez(p, other=np.zeros(3))])
def test_a_row_whose_pictures_are_damaged_is_measured_again(harm, tmp_path):
    def many(row, work): return {"share": 1., f"{row.coin}-{row.seed}": np.full((1, 2, 2, 3), 7, np.uint8)}
    study = dataclasses.replace(TOY, measure=many)
    states(study, tmp_path)
    harm(stored(tmp_path).parent/"pictures.npz")
    done = list(run_study(study, tmp_path, workers=1))
    assert sorted(d.state for d in done) == ["kept"]*3 + ["measured"] and "pictures.npz" in [d.error for d in done if d.error][0]
    assert sorted(arrays("toy", tmp_path)) == ["bent-0", "bent-1", "fair-0", "fair-1"]


class Odd(NamedTuple):
    value: object


@pytest.mark.parametrize("value", [np.int64(3), np.float32(1), torch.ones(1), math.nan, math.inf, {1: 2}, Path("x"), (1, np.bool_(True))])
def test_a_row_that_no_file_can_hold_is_refused_before_any_work(value, tmp_path):
    study = Study("odd", "", lambda quick: [Odd(3), Odd(value)], lambda row, work: pytest.fail("worked"))
    with pytest.raises((TypeError, ValueError), match=r"the row\.value"): states(study, tmp_path)


@pytest.mark.parametrize("value", [torch.ones(2), Path("x"), [np.int64(1)], dict(a=math.nan), {3}])
def test_a_column_that_no_file_can_hold_is_named(value, tmp_path):
    def odd(row, work): return dict(share=value if row == Toss("bent", 1) else .5)
    done = list(run_study(dataclasses.replace(TOY, measure=odd), tmp_path, workers=1))
    assert [d.state for d in done] == ["measured"]*3 + ["failed"] and "column 'share'" in done[-1].error


class Need(NamedTuple):
    "Something trained that is damaged."
    key: str
    def weights(self, folder): return module.content_mark(Path(folder)/self.key)


@pytest.mark.parametrize("blob", [b"", b"x"*50, b"\xff"*64, (40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}",
                                  (2).to_bytes(8, "little") + b"[]", None])
def test_damaged_weights_fail_the_rows_that_need_them_alone(blob, tmp_path):
    (tmp_path/"trained").mkdir()
    if blob is None: os.mkfifo(tmp_path/"trained"/"bad")
    else: (tmp_path/"trained"/"bad").write_bytes(blob)
    study = dataclasses.replace(TOY, needs=lambda row: (Need("bad"),) if row == Toss("bent", 0) else ())
    done = list(run_study(study, tmp_path/"s", workers=1))
    assert sorted(d.state for d in done) == ["failed"] + ["measured"]*3 and len(results("toy", tmp_path/"s")) == 3
    assert str(tmp_path/"trained"/"bad") in [d for d in done if d.state == "failed"][0].error


def test_a_shipped_table_that_is_damaged_stops_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "report_mark", lambda: "r")   # not the readings of a missing table, which stay in memory
    for error in (OSError("no disk"), ValueError("no table"), KeyError("inputs")):
        for name in ("results", "about"): monkeypatch.setattr(module, name, Mock(side_effect=error))
        assert states(TOY, tmp_path/type(error).__name__) == ["measured"]*4


# ---- refused before any work

@pytest.mark.parametrize("end", ["csv", "json", "npz"])
def test_a_table_that_cannot_be_written_is_refused_before_any_work(end, tmp_path):
    (tmp_path/f"toy.{end}").mkdir()
    with pytest.raises(StoreError, match=f"toy.{end}: it is a folder"):
        states(dataclasses.replace(TOY, measure=lambda row, work: pytest.fail("worked")), tmp_path)


def test_a_folder_of_trainings_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path/"trained").write_text("")
    with pytest.raises(StoreError, match="cannot write to .*trained"): states(plan(), tmp_path/"g")


@pytest.mark.parametrize("change,word", [
    (dict(optimizer="magic"), "magic"), (dict(precision="fp16"), "fp16 does not train on a CPU"), (dict(classes=3), "with labels"),
    (dict(conditions=2), "with labels"), (dict(betas="zero_snr", prediction="epsilon", sigma_data=0.), "epsilon"),
    (dict(attention=(False,)), "attention must say")])
def test_a_training_that_cannot_be_is_refused_before_any_work(change, word, tmp_path):
    "Among others that can be: none of them begins."
    with pytest.raises((ValueError, TypeError), match=word):
        states(grid(["two_squares"], changes=[TINY, TINY | change], steps=[2], n=16, images=16), tmp_path/"g")
    assert not list((tmp_path/"trained").glob("*/*"))


@pytest.mark.parametrize("need,word", [(dict(marks=(5,)), "a mark must be"), (dict(at=9), "a mark must be"), (dict(steps=0), "steps must be"),
                                       (dict(seed=-1), "seed must be"), (dict(n=-1), "n must be"), (dict(rule="bent"), "rule must be one of"),
                                       (dict(size=8), "size must be")])
def test_a_mark_beyond_the_run_is_refused(need, word):
    with pytest.raises(ValueError, match=word): Denoiser("two_squares", changes=tuple(TINY.items()), **dict(steps=4) | need).check(CPU)
    Denoiser("two_squares", changes=tuple(TINY.items()), steps=4, marks=(2, 4), at=2).check(CPU)


@pytest.mark.parametrize("name", STUDIES)
def test_every_training_of_a_study_has_a_recipe_that_can_be(name):
    study = find_study(name)
    for quick in (True, False): assert all(n.key for r in study.plan(quick) for n in study.needs(r))


@pytest.mark.parametrize("name", ["tasks", "palettes", "presets", "changes", "steps", "seeds"])
def test_a_grid_of_nothing_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must hold at least one, got none"): grid(**dict(tasks=["two_squares"]) | {name: []})
    with pytest.raises(ValueError, match="toy has no rows"): states(dataclasses.replace(TOY, plan=lambda quick: []), tmp_path/"r")
    assert not (tmp_path/"r").exists()


def test_a_report_that_takes_more_evaluations_than_there_are_timesteps():
    with pytest.raises(ValueError, match="T must be at least 50, which the report takes, got 10"): grid(["two_squares"], changes=[TINY, dict(T=10)])


@pytest.mark.parametrize("budget", [math.nan, -1.])
def test_a_budget_that_is_none(budget, tmp_path):
    with pytest.raises(ValueError, match="budget must be"): states(TOY, tmp_path, budget=budget)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*args): raise OSError(95, "Operation not supported")
    monkeypatch.setattr("rulediff_nb.study.FileLock.acquire", refuse)
    with pytest.raises(StoreError, match="cannot lock .*x.lock.*not supported.*another file system"):
        with module._locked(tmp_path/"x.lock"): pytest.fail("went in")


def test_two_at_once_in_one_folder_are_one_run_or_a_sentence(tmp_path):
    def one(k):
        try: return states(TOY, tmp_path)
        except StoreError as e: return str(e)
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(one, range(4)))
    assert any(isinstance(v, list) for v in found) and all("another run is at work" in v for v in found if isinstance(v, str))
    assert states(TOY, tmp_path) == ["kept"]*4


def test_several_lines_and_pictures_of_a_row(tmp_path):
    def many(row, work):
        for k in range(3): yield dict(part=k, share=k/7)
        yield {"part": 9, f"{row.coin}-{row.seed}": np.full((1, 2, 2, 3), 7, np.uint8)}
    states(dataclasses.replace(TOY, measure=many), tmp_path)
    df = results("toy", tmp_path)
    assert len(df) == 16 and df.part.tolist() == [0, 1, 2, 9]*4 and df.share[1] == .142857
    assert sorted(arrays("toy", tmp_path)) == ["bent-0", "bent-1", "fair-0", "fair-1"]


def test_only_what_is_asked_for(tmp_path):
    assert states(TOY, tmp_path, only=["coin=bent", "seed=1,7"]) == ["measured"] and states(TOY, tmp_path, only=["fair"]) == ["measured"]*2
    odd = [Toss("a, b", 0), Toss("a", 1)]
    assert chosen(odd, ["coin=a, b"]) == odd[:1] + odd[1:] and chosen(odd, ["coin=a, b", "seed=0"]) == odd[:1]
    with pytest.raises(ValueError, match="no row fits coin=round; the first is coin='fair'"): chosen(tosses(False), ["coin=round"])


def test_a_budget_that_is_spent_leaves_rows_for_later(tmp_path):
    assert states(TOY, tmp_path, budget=0.) == ["late"]*4 and states(TOY, tmp_path) == ["measured"]*4


def test_two_runs_do_not_share_a_folder(tmp_path):
    run = run_study(TOY, tmp_path, workers=1)
    next(run)
    with pytest.raises(StoreError, match="another run is at work"): list(run_study(TOY, tmp_path, workers=1))
    run.close()
    assert "measured" in states(TOY, tmp_path)


def test_threads_are_as_before(tmp_path):
    before = torch.get_num_threads()
    states(TOY, tmp_path, threads=1)
    assert torch.get_num_threads() == before


# ---- provenance and tables

def test_each_line_says_where_it_comes_from(tmp_path):
    states(TOY, tmp_path)
    df, said = results("toy", tmp_path), about("toy", tmp_path)
    assert list(df)[-4:] == ["seconds", "weights", "inputs", "provenance"] and len(set(df.inputs)) == 4
    here = said["provenance"][df.provenance[0]]
    assert {"hardware", "device", "threads", "python", "versions", "revision", "system"} <= set(here)
    assert here["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0] and "pandas" in here["versions"]
    assert said["lines"] == 4 and said["ruler"] == report_mark() and said["command"] == "rulediff study toy"
    states(TRUE_TO_THE_RULER, tmp_path/"other")
    assert about("toy", tmp_path/"other")["ruler"] == ruler_mark()


def test_a_table_ships_whole_or_not_at_all(tmp_path):
    states(TOY, tmp_path/"run"), ship(TOY, tmp_path/"run", tmp_path/"shelf")
    assert len(results("toy", tmp_path/"shelf")) == 4
    states(TOY, tmp_path/"quick", quick=True)
    with pytest.raises(ValueError, match="lacks 2 rows"): ship(TOY, tmp_path/"quick", tmp_path/"shelf")
    other = dataclasses.replace(TOY, plan=lambda quick: [Toss("odd", 3)] if quick else tosses(quick))
    states(other, tmp_path/"other", quick=True)
    with pytest.raises(ValueError, match="quick form"): ship(other, tmp_path/"other", tmp_path/"shelf")
    assert len(results("toy", tmp_path/"shelf")) == 4


def test_rows_that_ship_are_not_measured_again(tmp_path, monkeypatch):
    states(TOY, tmp_path/"run"), ship(TOY, tmp_path/"run", tmp_path/"shelf")
    monkeypatch.setattr(module, "results", lambda name, folder=None: results(name, tmp_path/"shelf"))
    assert states(TOY, tmp_path/"new") == ["shipped"]*4 and states(TOY, tmp_path/"own", shipped=False) == ["measured"]*4
    assert [d.state for d in row_states(TOY, tosses(False))] == ["shipped"]*4
    assert row_states(dataclasses.replace(TOY, version=3), tosses(False)) == [None]*4


def test_hashes_that_look_like_numbers_stay_text(tmp_path):
    (tmp_path/"x.csv").write_text("a,weights,inputs,provenance\n1,123456789012,1e5,00000012\n2,,0012,7\n")
    df = read_table(tmp_path/"x.csv")
    assert df.weights[0] == "123456789012" and df.inputs.tolist() == ["1e5", "0012"] and df.provenance[0] == "00000012"
    assert pd.isna(df.weights[1])


def test_an_unknown_table_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'guidance'"): results("guidence")
    with pytest.raises(ValueError, match="no study 'guidence', did you mean 'guidance'"): find_study("guidence")
    with pytest.raises(ValueError, match="lower case"): register_study(dataclasses.replace(TOY, name="My study"))


def test_a_summary_keeps_seeds_and_range():
    df = pd.DataFrame(dict(m=["a", "a", "b"], v=[1., 3., np.nan]))
    got = summary(df, ["m"], ["v"])
    assert got.seeds.tolist() == [2, 1] and got.v.tolist()[0] == 2. and got.v_min[0] == 1. and got.v_max[0] == 3. and pd.isna(got.v[1])


@pytest.mark.parametrize("name", table.table_names())
def test_every_table_is_whole(name):
    from rulediff_nb.store import sha256
    path, said, df = table.RESULTS/f"{name}.csv", about(name), results(name)
    assert sha256(path.read_bytes()) == said["sha256"] and said["lines"] == len(df) and said["columns"] == list(df)
    assert set(df.provenance) == set(said["provenance"]) and path.stat().st_size < 200_000
    assert df.inputs.notna().all()


def test_an_outdated_table_says_so(tmp_path, monkeypatch):
    states(TOY, tmp_path/"run"), ship(TOY, tmp_path/"run", tmp_path/"shelf")
    monkeypatch.setattr(module, "results", lambda name: results(name, tmp_path/"shelf"))
    def said(**change):
        monkeypatch.setattr(module, "find_study", lambda name: dataclasses.replace(TOY, **change))
        return outdated("toy")
    assert said() == said(plan=lambda quick: [*tosses(quick), Toss("fair", 9)]) == ""   # a row that is missing makes no line old
    tail = "of 4 lines of the table 'toy' were measured by an earlier version; measured again by: rulediff study toy"
    assert said(version=2) == said(reports=False) == f"4 {tail}" and said(plan=lambda quick: tosses(quick)[1:]) == f"1 {tail}"


PUBLIC = sorted(k for k, s in studies().items() if s.public)
EARLIER = "it rests on reports with the earlier gates, and on images of the earlier sampler"
OPEN = dict(   # table -> why it is outdated, incomplete or not there
    gpu="it needs an accelerator, and ships when one was at hand", verdict="its trainings are under way, and take some thirty hours of one core",
    when="it looks at the verdict's models",
    bumps_published="it needs an accelerator",
    sampling=EARLIER, precision=EARLIER, curves=EARLIER, brief=EARLIER, recipes=EARLIER, sweep=EARLIER, guidance=EARLIER, filters=EARLIER)


def lacking(name):
    "What keeps a study from being complete; empty for a study whose table is that of today's plan, line by line."
    s = STUDIES[name]
    rows = s.plan(False)
    if name not in table.table_names(): return "no table ships"
    missing = [r for r, d in zip(rows, row_states(s, rows)) if d is None]
    if missing: return f"{len(missing)} of {len(rows)} rows are missing, such as {missing[0]}"
    return outdated(name)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_study_is_complete_or_open_with_a_reason(name):
    s, why = STUDIES[name], lacking(name)
    rows = s.plan(False)
    assert len({row_key(s, r) for r in rows}) == len(rows)
    if name in OPEN: assert why, f"{name} is complete: take it off OPEN"
    else: assert not why, f"{name}: {why}; measure it, or list it in OPEN with the reason"
    if not why: assert set(results(name).inputs) == {row_inputs(s, r) for r in rows}


def test_what_is_open_is_a_study(): assert set(OPEN) <= set(PUBLIC) and all(len(v) > 10 for v in OPEN.values())


def test_quick_forms_are_short_and_of_one_type():
    for name, s in studies().items():
        rows = s.plan(True)
        assert 1 <= len(rows) <= 12 and len({type(r) for r in rows}) == 1, name
        assert s.keys and s.shown and s.title, name


@pytest.mark.parametrize("name", PUBLIC)
def test_the_quick_form_runs(name, tmp_path, record):
    start = time.perf_counter()
    done = list(run_study(name, tmp_path/name, quick=True, workers=1))
    assert done and not [d.error for d in done if d.state == "failed"], [d.error for d in done]
    df = read_table(tmp_path/name/f"{name}.csv")
    if (table.RESULTS/f"{name}.csv").exists():
        lost = set(results(name)) - set(df)
        assert not lost - OLD.get(name, set()), f"columns of the stored table that the study does not measure: {sorted(lost)}"
    record(f"rulediff study {name} --quick", f"{time.perf_counter() - start:.1f} s")


OLD = {"recipes": {"cpu_seconds", "loss"}}   # columns of lines that were measured before there was one engine


# ---- trainings

def test_a_grid_twice_trains_once(tmp_path, monkeypatch):
    assert sorted(states(plan(), tmp_path/"a")) == ["measured"]*2 + ["trained"]*2
    monkeypatch.setattr(module, "train_steps", lambda *a, **k: pytest.fail("trained again"))
    assert states(plan(), tmp_path/"a") == ["kept"]*2
    assert states(plan(), tmp_path/"b") == ["measured"]*2   # another folder, the same trainings beside it
    same(tmp_path/"a", tmp_path/"b")


def test_a_row_is_measured_again_with_other_weights(tmp_path):
    one = grid(["two_squares"], changes=[TINY], steps=[2], n=32, images=16)
    states(one, tmp_path/"a")
    row = one.plan(False)[0]
    file = row.denoiser()._file(tmp_path/"trained")
    kept, meta = load_tensors(file)
    module.save_tensors(file, {k: v + .01 if v.is_floating_point() else v for k, v in kept.items()}, meta)
    assert states(one, tmp_path/"a") == ["measured"]
    for f in file.parent.iterdir(): f.unlink()
    assert states(one, tmp_path/"a") == ["kept"]   # weights that are not at hand are taken at the row's word


def test_a_grids_rows_are_all_combinations_seeds_last():
    s = grid(["two_circles", "two_squares"], ["fixed", "random"], ["laptop", "published"], [{}, dict(lr=1e-3)], [10, 20], [0, 1])
    rows = s.plan(False)
    assert len(set(rows)) == len({row_key(s, r) for r in rows}) == 64 and [r.seed for r in rows] == [0]*32 + [1]*32


def test_a_trainings_key_is_its_own():
    a = Denoiser("two_circles")
    changed = (dict(steps=7), dict(seed=3), dict(n=5), dict(palette="random"), dict(changes=(("lr", .1),)), dict(rule="free"), dict(rule="noisy"),
               dict(size=64))
    others = [a._replace(**c) for c in changed]
    assert len({j.key for j in [a, *others]}) == 9
    r = Denoiser("two_circles", "random", changes=(("lr", .5),)).recipe()
    assert r.lr == .5 and r.task.palette == "random" and r.preset == "laptop"


@pytest.mark.parametrize("args,word", [
    (dict(tasks=["moon"]), "moon"), (dict(palettes=["sepia"]), "sepia"), (dict(presets=["desktop"]), "desktop"),
    (dict(changes=[dict(colour=1)]), "colour"), (dict(steps=[0]), "steps"), (dict(seeds=[-1]), "seed"), (dict(n=-1), "n "),
    (dict(images=0), "images")])
def test_a_row_that_cannot_be_is_refused_before_any_work(args, word):
    with pytest.raises((ValueError, TypeError), match=word): grid(**(dict(tasks=["two_circles"]) | args))


@pytest.mark.parametrize("name", TASKS)
def test_a_training_set_breaks_its_rule_as_told(name):
    "The coarse rule and the canvas stay; row i is the same in a larger set."
    need = Denoiser(name, n=600)
    kept, noisy, free = (need._replace(rule=k).scenes() for k in ("", "noisy", "free"))
    def off(f):
        a, b = TASKS[name].sides(f)
        return (b/a).double().log()
    assert off(kept).abs().max() < 1e-4 and abs(off(noisy).std() - RULE_NOISE) < .02 and off(free).std() > 2*RULE_NOISE
    assert TASKS[name].inside(noisy).all() and (need._replace(rule="noisy").images() == TASKS[name].render(noisy)).all()
    assert all(torch.equal(v, w[:600]) for v, w in zip(kept, need._replace(n=900).scenes()))
    with pytest.raises(ValueError, match="do not fit the canvas"): noisy_rule(TASKS[name], 50, 0, float("inf"))


def test_a_training_on_broken_rules_does_not_pass_for_another(tmp_path):
    need = Denoiser("two_squares", changes=tuple(TINY.items()), steps=2, n=32, rule="free")
    list(need.train(tmp_path, CPU))
    m = need.load(tmp_path, CPU)
    assert "set_seed" not in m.manifest and m.manifest["step"] == 2 and need._replace(rule="").weights(tmp_path) == ""


def test_marks_are_those_of_one_run(tmp_path):
    whole = Denoiser("two_squares", changes=tuple(TINY.items()), steps=6, n=32, marks=(2, 5))
    list(whole.train(tmp_path/"a", CPU))
    list(whole._replace(marks=()).train(tmp_path/"b", CPU))
    assert whole.weights(tmp_path/"a") != whole._replace(at=2).weights(tmp_path/"a") != ""
    a, b = (load_tensors(whole._file(tmp_path/k))[0] for k in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)   # leaving a run and going on changes no bit
    m = whole._replace(at=2).load(tmp_path/"a", CPU)
    assert m.manifest["step"] == 2 and not m.training
    whole._file(tmp_path/"a", 2).unlink()
    with pytest.raises(StoreError, match="beyond 2"): list(whole.train(tmp_path/"a", CPU))


def test_shipped_weights_are_named_by_their_hash():
    need = Shipped("two_circles")
    assert need.weights() in need.key and list(need.train(Path("."), CPU)) == [] and need.load(None, CPU).recipe.task.name == "two_circles"


def test_processes_give_the_rows_of_one(tmp_path):
    for k in (1, 2): list(run_study(plan(), tmp_path/str(k)/"g", workers=k))
    same(tmp_path/"1/g", tmp_path/"2/g")


def test_a_dask_cluster_of_two_workers_gives_the_same_rows(tmp_path):
    pytest.importorskip("distributed")
    list(run_study(plan(), tmp_path/"a/g", workers=1)), list(run_study(plan(), tmp_path/"b/g", workers=2, engine="dask"))
    same(tmp_path/"a/g", tmp_path/"b/g")


def test_a_running_dask_cluster_is_named_by_its_address(tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as c:
        done = list(run_study(plan(), tmp_path/"g", workers=2, engine="dask", address=c.scheduler_address))
    assert sorted(d.state for d in done) == ["measured"]*2 + ["trained"]*2


@pytest.mark.slow
def test_ray_gives_the_same_rows(tmp_path):
    pytest.importorskip("ray")
    list(run_study(plan(), tmp_path/"a/g", workers=1)), list(run_study(plan(), tmp_path/"b/g", workers=2, engine="ray"))
    same(tmp_path/"a/g", tmp_path/"b/g")


def test_unknown_engines_are_named():
    with pytest.raises(ValueError, match="loky, dask or ray, got 'slurm'"), use_engine("slurm"): pass


def test_an_engine_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"rulediff_nb\[ray\]"), use_engine("ray"): pass


CHILD = """
import sys
from rulediff_nb.study import grid, run_study
tiny = dict(channels=(16, 16), attention=(False, False), head_dim=8, batch=8)
todo = grid(['two_squares'], changes=[tiny], steps=[40], seeds=[0, 1, 2], n=32, images=16)
for d in run_study(todo, sys.argv[1], workers=1): print(d.state, flush=True)
"""


@pytest.mark.parametrize("wait", [.05, .6])
def test_a_killed_study_goes_on(wait, tmp_path):
    p = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path/"a/g")], env=clean_env(), stdout=subprocess.PIPE, text=True)
    while (line := p.stdout.readline()).strip() != "measured": assert line, f"the child has ended: {p.wait()}"   # until the first row is done
    time.sleep(wait)
    os.kill(p.pid, signal.SIGKILL), p.wait()
    todo = grid(["two_squares"], changes=[TINY], steps=[40], seeds=[0, 1, 2], n=32, images=16)
    file = tmp_path/"a/g"/row_key(todo, todo.plan(False)[0])/"result.json"
    stamp = file.stat().st_mtime_ns
    assert states(todo, tmp_path/"a/g").count("kept") >= 1 and file.stat().st_mtime_ns == stamp
    states(todo, tmp_path/"b/g")
    same(tmp_path/"a/g", tmp_path/"b/g")


def test_a_training_stops_with_its_study_and_not_with_the_shell_that_began_it(tmp_path, monkeypatch):
    one = grid(["two_squares"], changes=[TINY], steps=[40], n=32, images=16)
    needs, parents = one.needs(one.plan(False)[0]), iter(range(1000))
    monkeypatch.setattr(module.os, "getppid", lambda: next(parents))   # the parent ends all the time
    with pytest.raises(RuntimeError, match="has ended"): module._train_needs(needs, module.Where("", str(tmp_path), "cpu"))
    module._train_needs(needs, module.Where("", str(tmp_path), "cpu", owner=os.getpid()))


def test_a_budget_stops_a_training_which_resumes(tmp_path):
    one = grid(["two_squares"], changes=[TINY], steps=[400], n=32, images=16)
    assert "late" in states(one, tmp_path/"a/g", budget=2.) and not (tmp_path/"a/g/grid.csv").exists()
    check = next((tmp_path/"a/trained").glob("*/checkpoint.safetensors"))
    stands = load_tensors(check)[1]["step"]
    assert 0 < stands < 400
    assert states(one, tmp_path/"a/g")[-1] == "measured"
    states(one, tmp_path/"b/g")
    same(tmp_path/"a/g", tmp_path/"b/g")


def test_the_pace_of_a_wider_network_is_slower():
    tiny = dict(layers=1, attention=(False, False), head_dim=8, batch=8)
    narrow, wide = (min(pace(unet("laptop", "two_squares", channels=c, **tiny), 4) for _ in range(2)) for c in ((16, 16), (96, 96)))
    assert narrow < wide


def test_work_knows_what_is_left(tmp_path):
    seen = []
    def look(row, work):
        seen.append(work)
        return dict(share=0.)
    states(dataclasses.replace(TOY, measure=look), tmp_path, budget=1e6)
    assert isinstance(seen[0], Work) and 0 < seen[0].left < 1e6 and seen[0].device.type in ("cpu", "cuda", "mps") and "toy" not in STUDIES
