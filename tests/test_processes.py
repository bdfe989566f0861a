"Two processes train as one does; precision is the recipe's, whatever ran before; Muon resumes as AdamW does."
import json
import os
import subprocess
import sys

import pytest
import torch
from tree import clean_env

from rulediff_nb.store import load_tensors
from rulediff_nb.tasks import get_task
from rulediff_nb.train import OPTIMIZERS, Run, fit, load_run, save_run, train_steps
from rulediff_nb.unet import unet

TASK = get_task("two_squares", palette="fixed", size=16)
X0 = TASK.sample(40, 0)[0]
SMALL = dict(channels=(8, 8, 16), head_dim=8, batch=4, lr=1e-3)


def net(**kw): return unet("laptop", TASK, **(SMALL | kw))


SCRIPT = """
import json, os, sys, torch
from accelerate import notebook_launcher
from rulediff_nb.tasks import get_task
from rulediff_nb.train import train_steps
from rulediff_nb.unet import unet
torch.set_num_threads(1)
def main(folder, kw):
    task = get_task('two_squares', palette='fixed', size=16)
    m = unet('laptop', task, channels=(8, 8, 16), head_dim=8, batch=4, lr=1e-3, **kw)
    losses = [s.loss for s in train_steps(m, task.sample(40, 0)[0], folder, 8)]
    if os.environ.get('RANK', '0') == '0': print('LOSSES' + json.dumps(losses), flush=True)
folder, kw, launcher = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
if launcher: notebook_launcher(main, (folder, kw), num_processes=1)
else: main(folder, kw)
"""


def losses(tmp_path, processes, kw, *more):
    "Losses of eight steps of a run in its own processes, and its checkpoint."
    script, folder = tmp_path/"script.py", tmp_path/f"{processes}{''.join(more)}"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29541"] if processes > 1 else []
    r = subprocess.run([sys.executable, *launch, str(script), str(folder), json.dumps(kw), *more], capture_output=True, text=True,
                       env=clean_env() | dict(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1"), timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    said = [line for line in r.stdout.splitlines() if "LOSSES" in line]
    assert len(said) == 1, r.stdout
    return torch.tensor(json.loads(said[0].split("LOSSES")[1])), load_tensors(folder/"checkpoint.safetensors")


@pytest.mark.parametrize("kw,bound", [(dict(precision="fp32"), 1e-4), (dict(precision="bf16", optimizer="adamw", min_snr=5.), 2e-3)])
def test_two_processes_do_what_one_does(kw, bound, tmp_path):
    (one, (a, _)), (two, (b, meta)) = (losses(tmp_path, k, kw) for k in (1, 2))
    assert ((one - two).abs()/one).max() < bound and not torch.equal(one, two)   # equal bits would mean that nothing was shared
    assert meta["step"] == 8 and all((a[k].float() - b[k].float()).abs().max() < .02 for k in a if k.startswith("ema."))


def test_the_notebook_launcher_gives_the_same_bits(tmp_path):
    assert torch.equal(losses(tmp_path, 1, {})[0], losses(tmp_path, 1, {}, "launcher")[0])


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    from rulediff_nb import train

    class Three:
        num_processes = 3
    monkeypatch.setattr(train, "accelerator", lambda *a: Three())
    with pytest.raises(ValueError, match="batch of 4 cannot be shared by 3"): Run(net(), 4)


def test_precision_is_the_recipes_whatever_ran_before():
    kinds = "fp32", "bf16"
    fresh = {p: [s.loss for s in fit(net(precision=p), X0, 3)] for p in kinds}
    again = {p: [s.loss for s in fit(net(precision=p), X0, 3)] for p in reversed(kinds)}
    assert fresh == again and fresh["fp32"] != fresh["bf16"]


def test_an_environment_does_not_change_the_recipe(monkeypatch):
    want = [s.loss for s in fit(net(precision="fp32"), X0, 3)]
    monkeypatch.setitem(os.environ, "ACCELERATE_MIXED_PRECISION", "bf16")
    assert [s.loss for s in fit(net(precision="fp32"), X0, 3)] == want


def test_a_trained_model_is_left_as_it_was_built():
    m = net()
    before = type(m).forward
    list(fit(m, X0, 2))
    assert "forward" not in vars(m) and type(m).forward is before and not m.training


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("at", [1, 5])
def test_each_optimizer_resumes_to_the_same_bits(name, at, tmp_path):
    runs = [Run(net(optimizer=name).train(), 7) for _ in range(3)]
    whole = [runs[0].advance(X0).loss for _ in range(7)]
    first = [runs[1].advance(X0).loss for _ in range(at)]
    save_run(runs[1], tmp_path/"a")
    load_run(runs[2], tmp_path/"a")
    assert first + [runs[2].advance(X0).loss for _ in range(7 - at)] == whole
    assert all(torch.equal(p, q) for p, q in zip(runs[0].finish().state_dict().values(), runs[2].finish().state_dict().values()))


def test_every_weight_is_trained():
    for name in OPTIMIZERS:
        m = net(optimizer=name, warmup=0)
        before = {k: p.detach().clone() for k, p in m.named_parameters()}
        run = Run(m.train(), 50)
        for _ in range(2): run.advance(X0)
        assert not [k for k, p in m.named_parameters() if torch.equal(p, before[k])], name


@pytest.mark.slow
def test_compiled_gives_nearly_the_same_losses():
    pytest.importorskip("torch._inductor")
    small = dict(precision="fp32", channels=(8, 8), attention=(False, False))
    a, b = ([s.loss for s in fit(net(**small), X0, 2, compiled=c)] for c in (False, True))
    assert max(abs(x - y) for x, y in zip(a, b)) < 1e-4


def test_labels_travel_with_their_images(tmp_path):
    y = torch.arange(40) % 3
    seen = [s.loss for s in train_steps(net(classes=3), X0, tmp_path, 3, y=y)]
    assert seen == [s.loss for s in fit(net(classes=3), X0, 3, y=y)] != [s.loss for s in fit(net(classes=3), X0, 3, y=(y + 1) % 3)]
    with pytest.raises(ValueError, match="another set"): list(train_steps(net(classes=3), X0, tmp_path, 3, y=(y + 1) % 3))


def test_conditions_are_trained_on():
    y = torch.linspace(-1, 1, 80).view(40, 2)
    assert all(s.loss > 0 for s in fit(net(conditions=2), X0, 3, y=y))
    with pytest.raises(ValueError, match=r"\(40,2\) floats"): next(fit(net(conditions=2), X0, 3, y=y[:, :1]))


def test_min_snr_changes_the_weights_not_the_batches():
    a, b = (list(fit(net(min_snr=g), X0, 3)) for g in (0., 5.))
    assert [s.images for s in a] == [s.images for s in b] and a[0].loss != b[0].loss


def test_a_loss_that_rises_and_stays_up_stops_the_run():
    run = Run(net(), 2000)
    for _ in range(100): run.check(.01, 1e-3)
    for _ in range(30): run.check(.06, 1e-3)   # a bad stretch is let through
    with pytest.raises(FloatingPointError, match="risen from 0.01 to"):
        for _ in range(100): run.check(.06, 1e-3)
