"A task that the package has never heard of goes through sampling, ruler, metrics, violations, training and files."
import functools
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from tree import NBS, ROOT, clean_env, read_nb, source

from rulediff_nb import cli
from rulediff_nb.core import to_8bit, to_bytes
from rulediff_nb.metrics import ROWS, rule_report
from rulediff_nb.sample import load_pretrained, sample
from rulediff_nb.store import StoreError, save_release
from rulediff_nb.tasks import TASKS, VIOLATE, Disc, Rect, Task, check_task, get_task, register
from rulediff_nb.train import fit, run_weights, train_steps
from rulediff_nb.unet import RuleUNet, unet

torch.set_num_threads(1)
SMALL = dict(channels=(8, 8, 16), head_dim=8, batch=4)


class WheelFactors(NamedTuple):
    "What draws a wheel and its track; canvas side 1, y up."
    r1: Tensor
    l2: Tensor
    x1: Tensor
    y1: Tensor
    x2: Tensor
    rgb: Tensor


@dataclass(frozen=True)
class Wheel(Task):
    "Rule l2 == pi*r1: a bar as long as half the way round the disc; coarse: the bar is longer than the disc is wide."
    name = "wheel"
    colours = "warm", "cool"
    Factors = WheelFactors
    length = "l2"
    n_uniform = 4
    thick: float = .1   # a field of its own, in canvas sides

    def draw(self, u, rgb):
        r1 = .08 + .08*u[:, 0]
        return WheelFactors(r1, math.pi*r1, .2 + .6*u[:, 1], .5 + .3*u[:, 2], .3 + .4*u[:, 3], rgb)

    def inside(self, f): return (f.l2 > 0) & ((f.x2 - .5).abs() + f.l2/2 <= .5)

    def shapes(self, f):
        low = torch.full_like(f.l2, .1)
        return Disc(f.x1, f.y1, f.r1), Rect(f.x2 - f.l2/2, f.x2 + f.l2/2, low, low + self.thick)

    def sides(self, f): return math.pi*f.r1, f.l2
    def dependent(self, f): return f.l2, math.pi*f.r1
    def coarse(self, f): return f.l2 > 2*f.r1
    def with_dependent(self, f, length): return f._replace(l2=length)
    def break_coarse(self, f): return f._replace(l2=1.5*f.r1)


@pytest.fixture
def wheel():
    yield register(Wheel())
    del TASKS["wheel"]


settings = pytest.mark.parametrize("changes", [{}, dict(palette="fixed", size=48), dict(thick=.13, size=24)], ids=str)


@settings
def test_it_is_sampled(changes):
    task = check_task(Wheel(**changes))
    for v in VIOLATE:
        x, f = task.sample(40, 3, violate=v)
        assert x.shape == (40, 3, task.size, task.size) and x.min() >= -1 and x.max() <= 1 and x.isfinite().all()
        few, g = task.sample(5, 3, violate=v)
        assert torch.equal(few, x[:5]) and all(torch.equal(a[:5], b) for a, b in zip(f, g))
        got, want = task.dependent(f)
        off = {None: 0., "up": 1/32, "down": -1/32}.get(v)
        if off is not None: assert (got - want - off).abs().max() < 1e-5
        if v != "free": assert (task.coarse(f) == (v != "coarse")).all()
        else: assert (got - want).abs().median() > .02


@settings
def test_the_ruler_reads_it(changes):
    task = Wheel(**changes)
    assert task.fitted() == ("r1", "l2", "x1", "y1", "x2") and task.features(task.sample(0, 0)[0]).why.shape == (0,)
    for v in VIOLATE:
        x, f = task.sample(60, 4, violate=v)
        ft = task.features(to_8bit(x))
        ok = ft.readable
        assert ok.float().mean() > .95
        for k in task.fitted(): assert ((getattr(ft, k) - getattr(f, k)).abs()*task.size)[ok].quantile(.9) < .05, (v, k)
        assert (ft.rgb - f.rgb).abs()[ok].max() < .05 and torch.equal(task.coarse(ft)[ok], task.coarse(f)[ok])
    wrong = x.clone()
    wrong[:, :, 2:9, 2:9] = -1.   # a black block
    assert not task.features(wrong).readable.any()


def test_it_has_a_gradient():
    task = Wheel(palette="random")
    x = task.sample(4, 0)[0].requires_grad_()
    a, b = task.sides(task.features(x))
    (b - a).sum().backward()
    assert x.grad.isfinite().all() and (x.grad.flatten(1).abs().sum(1) > 0).all()


def test_it_is_measured():
    task, n = Wheel(palette="random"), 128
    real, up, coarse, free = (rule_report(task, task.sample(n, 7, violate=v)[0]) for v in (None, "up", "coarse", "free"))
    assert tuple(real.rows) == ROWS and real.readable > .98 and abs(real.rule_gap) < .02 and real.coarse == real.readable
    assert abs(up.error_px - 1) < .05 and up.bias > .02 and coarse.coarse == 0 and abs(free.rule_gap - 1) < .3
    assert real.rows["marginals"].value < real.rows["marginals"].more["bound"] and real.flags == () and "near" not in real.rows["rule_gap"].more
    copied = rule_report(task, task.sample(32, 9)[0], train=task.sample(64, 9)[0])
    assert copied.memorized == 1 and copied.flags == ("memorized",)
    assert json.dumps(real.to_dict(), allow_nan=False) and "wheel" in str(real)


@pytest.mark.parametrize("preset", ["laptop", "published"])
def test_it_is_trained_on_stored_and_found_again(preset, wheel, tmp_path):
    task = wheel.with_(palette="fixed", size=16, thick=.12)
    small = SMALL | (dict(channels=(8, 8, 8, 16), attention=(False,)*3 + (True,)) if preset == "published" else {})
    model, x0 = unet(preset, task, **small), task.sample(12, 0)[0]
    assert model.recipe.task == task and model.recipe.to_dict()["task"] == dict(name="wheel", palette="fixed", size=16, thick=.12)
    assert [s.step for s in train_steps(model, x0, tmp_path/"run", 2, 0)] == [1, 2]
    x = sample(model, 4, 3, seed=1)
    assert x.shape == (4, 3, 16, 16) and x.isfinite().all() and rule_report(task, x, train=x0).n == 4
    model.save_pretrained(tmp_path/"hub")
    again = RuleUNet.from_pretrained(tmp_path/"hub").eval()
    assert again.recipe.task == task and (sample(again, 4, 3, seed=1) - x).abs().max() < 1e-4
    kept, meta = run_weights(tmp_path/"run")
    save_release(tmp_path/"w", "wheel-fixed", kept, dict(recipe=meta["recipe"]))
    assert load_pretrained("wheel", folder=tmp_path/"w").recipe.task == task


def test_a_model_of_an_unknown_world_says_so(wheel, tmp_path):
    model = unet("laptop", wheel.with_(size=16), **SMALL)
    for _ in fit(model, wheel.with_(size=16).sample(4, 0)[0], 2): pass
    model.save_pretrained(tmp_path/"hub")
    save_release(tmp_path/"w", "wheel-random", model.state_dict(), dict(recipe=model.recipe.to_dict()))
    (tmp_path/"w/two_squares-random.json").write_text((tmp_path/"w/wheel-random.json").read_text())
    (tmp_path/"w/two_squares-random.safetensors").write_bytes((tmp_path/"w/wheel-random.safetensors").read_bytes())
    del TASKS["wheel"]
    said = "unknown task 'wheel'.*register"
    with pytest.raises(ValueError, match=said): unet("laptop", Wheel())
    assert sample(model, 1, 1).shape == (1, 3, 16, 16)   # a model in hand holds its task itself
    with pytest.raises(ValueError, match=said): RuleUNet.from_pretrained(tmp_path/"hub")
    with pytest.raises(ValueError, match=said): load_pretrained("wheel", "random", folder=tmp_path/"w")
    with pytest.raises(StoreError, match=f"two_squares-random.*{said}"): load_pretrained("two_squares", "random", folder=tmp_path/"w")
    register(wheel)
    assert sample(model, 1, 1).shape == (1, 3, 16, 16)


def test_the_commands_find_it(wheel, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "unet", functools.partial(unet, **SMALL, prediction="sample", sigma_data=0.))
    monkeypatch.setitem(cli.REPORT, "steps", 1)
    cli.train("wheel", steps=2, n=8, score=64, out=str(tmp_path), weights=str(tmp_path/"w"))
    assert load_pretrained("wheel", folder=tmp_path/"w").manifest["steps"] == 2
    np.savez(tmp_path/"x.npz", to_bytes(wheel.sample(8, 0)[0]))
    assert cli.main(["report", "--task", "wheel", "--images", str(tmp_path/"x.npz"), "--per-image", str(tmp_path/"i.csv")]) == 0
    assert "name=wheel" in capsys.readouterr().out and len((tmp_path/"i.csv").read_text().splitlines()) == 9


PROCESS = """
import sys
sys.path[:0] = {path!r}
from test_sixth_world import Wheel
from rulediff_nb.tasks import register
from rulediff_nb.unet import RuleUNet
try: RuleUNet.from_pretrained(sys.argv[1])
except ValueError as e: assert 'wheel' in str(e) and 'register' in str(e), e
else: raise SystemExit('found what was not registered')
register(Wheel())
print(RuleUNet.from_pretrained(sys.argv[1]).recipe.task)
"""


def test_another_process_finds_it_once_it_is_registered(wheel, tmp_path):
    unet("laptop", wheel.with_(size=16, palette="random"), **SMALL).save_pretrained(tmp_path)
    code = PROCESS.format(path=[str(ROOT), str(ROOT/"tests")])
    env = clean_env(OMP_NUM_THREADS="1")
    r = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert r.returncode == 0 and "Wheel(size=16, palette='random', thick=0.1)" in r.stdout, r.stderr[-2000:]


def test_nothing_stays_behind(): assert "wheel" not in TASKS and get_task("two_circles").name == "two_circles"


# ---------------------------------------------------------------- what the notebook says of itself

def test_the_notebooks_world_is_forty_lines():
    cells = [source(c) for c in read_nb(NBS/"91_sixth_world.ipynb")["cells"] if c["cell_type"] == "code"]
    task = next(c for c in cells if "class Lever(Task)" in c).split("\nlever = ")[0]
    assert 30 <= sum(bool(line.strip()) for line in task.splitlines()) <= 45
