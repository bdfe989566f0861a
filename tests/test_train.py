"Training: a function of recipe and seed, killed and resumed to the same bits, refused where it does not fit."
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tree import ROOT, clean_env

from rulediff_nb.schedule import add_noise, noise_schedule, target
from rulediff_nb.store import StoreError, load_tensors, save_tensors
from rulediff_nb.table import provenance
from rulediff_nb.tasks import TASKS, get_task
from rulediff_nb.train import Batch, Run, draw_batch, fit, label_among, timestep_shares, load_run, save_run, stands_at, train, train_steps
from rulediff_nb.unet import unet

torch.set_num_threads(1)
TASK = get_task("two_squares", palette="fixed", size=16)
X0 = TASK.sample(40, 0)[0]
ALIKE = torch.full((1000,), 1e-3, dtype=torch.float64)
SMALL = dict(channels=(8, 8, 16), head_dim=8, batch=4, lr=1e-3)


def net(seed=0, **kw): return unet("laptop", TASK, seed, **(SMALL | kw))


def bits(model): return [p.detach().clone() for p in model.state_dict().values()]


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- refused before the first step

def test_a_tuple_among_the_remarks_does_not_stop_the_resume(tmp_path):
    "A checkpoint gives it back as a list."
    def steps(): return train_steps(net(), X0, tmp_path/"run", 4, every=0., remarks=dict(a=(1, 2), b=dict(c=("x",))))
    for s in steps():
        if s.step == 2: break
    assert [s.step for s in steps()] == [3, 4]


@pytest.mark.parametrize("remarks,error,said", [
    (dict(a=torch.ones(2)), TypeError, r"remarks\.a is of type Tensor, which JSON cannot hold"), ({1: "a"}, TypeError, "remarks has the key 1"),
    (dict(a=[dict(b=math.nan)]), ValueError, r"remarks\.a\[0\]\.b is nan"), (dict(where=Path("x")), TypeError, r"remarks\.where is of type \w*Path")])
def test_remarks_that_json_cannot_hold_are_refused_before_the_first_step(remarks, error, said, tmp_path):
    run = train_steps(net(), X0, tmp_path/"run", 2, every=1e9, remarks=remarks)
    with pytest.raises(error, match=said): next(run)
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("why,said", [(NotImplementedError("no flock here"), "no flock here"), (OSError("odd"), "odd"),
                                      (OSError(95, "Operation not supported"), "Operation not supported")])
def test_a_folder_that_cannot_be_claimed_is_named(why, said, tmp_path, monkeypatch):
    def refuse(*args, **kw): raise why
    monkeypatch.setattr("rulediff_nb.train.FileLock.acquire", refuse)
    with pytest.raises(StoreError, match=f"cannot write to {tmp_path}: {said}$"): next(train_steps(net(), X0, tmp_path, 2))


# ---------------------------------------------------------------- one run

def test_a_seed_decides_everything():
    logs, nets = zip(*((list(fit(m, X0, 6, seed)), bits(m)) for seed in (0, 0, 1) for m in [net()]))
    assert [s[:4] for s in logs[0]] == [s[:4] for s in logs[1]] and same(nets[0], nets[1])
    assert [s.loss for s in logs[0]] != [s.loss for s in logs[2]] and not same(nets[0], nets[2])


def test_the_first_weights_have_a_seed_of_their_own():
    torch.manual_seed(3)
    a = bits(net(0))
    torch.manual_seed(4)
    assert same(a, bits(net(0))) and not same(a, bits(net(1)))


def test_the_global_generator_is_neither_used_nor_moved():
    def run():
        m = net()
        list(fit(m, X0, 3))
        return bits(m)
    torch.manual_seed(1)
    state, a = torch.get_rng_state(), run()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert same(a, run())


def test_a_log_says_what_happened():
    log = list(fit(net(warmup=2), X0, 5))
    assert [s.step for s in log] == [1, 2, 3, 4, 5] and [s.images for s in log] == [4, 8, 12, 16, 20]
    assert all(math.isfinite(s.loss) and s.loss > 0 for s in log) and all(a.seconds <= b.seconds for a, b in zip(log, log[1:]))
    want = [1e-3*min((k + 1)/2, 1)*(.5 + .5*math.cos(math.pi*k/5)) for k in range(5)]
    assert [s.lr for s in log] == pytest.approx(want)


def test_the_loss_falls():
    log = [s.loss for s in fit(net(batch=8, warmup=0, lr=1e-2), X0, 100)]
    assert sum(log[-10:]) < .8*sum(log[:10])


def test_train_is_fit_to_its_end():
    a, b = net(), net()
    list(fit(a, X0, 4))
    assert train(b, X0, 4) is b and same(bits(a), bits(b)) and not b.training


@pytest.mark.parametrize("ema", [.999, 0.])
def test_the_average_is_left_in_the_model_however_the_loop_is_left(ema):
    runs = []

    class Noted(Run):
        def __init__(self, *args): super().__init__(*args), runs.append(self)

    def broken():
        for s in fit(m, X0, 9, run_type=Noted):
            if s.step == 3: raise RuntimeError("reader's own")
    m = net(ema=ema)
    for how in ("break", "close", "error", "end"):
        m, raw = net(ema=ema), []
        if how == "break":
            for s in fit(m, X0, 9, run_type=Noted):
                raw = bits(m)
                if s.step == 3: break
        if how == "close":
            g = fit(m, X0, 9, run_type=Noted)
            next(g), next(g), next(g)
            raw = bits(m)
            g.close()
        if how == "error":
            with pytest.raises(RuntimeError, match="own"): broken()
        if how == "end": list(fit(m, X0, 3, run_type=Noted))
        assert not m.training, how
        want = runs[-1].ema.shadow_params if ema else None
        if ema: assert same([p.detach() for p in m.parameters()], want) and (not raw or not same(raw, bits(m))), how
        elif raw: assert same(raw, bits(m)), how


def test_while_it_runs_the_model_can_be_looked_at():
    m, seen = net(), []
    for _ in fit(m, X0, 4):
        m.eval()
        with torch.no_grad(): seen.append(m.predict(X0[:1], torch.tensor([500])))
        m.train()
    n = net()
    list(fit(n, X0, 4))
    assert same(bits(m), bits(n)) and not torch.equal(seen[0], seen[-1])


# ---------------------------------------------------------------- the target

def mean_target(run, x0, batch, among):
    "The mean of the targets that the images in question may have set, image by image in float64."
    out, abar = [], run.model.abar.double()
    for row, t, e, some in zip(batch.rows, batch.t, batch.eps.double(), among):
        xt = add_noise(x0[row][None].double(), t[None], e[None], abar)
        s, n = abar[t].sqrt(), (1 - abar[t]).sqrt()
        p = torch.stack([-((xt - s*x)**2).sum()/(2*n*n) if k else torch.tensor(-math.inf) for x, k in zip(x0.double(), some)]).softmax(0)
        out.append(sum(w*target(x[None].double(), (xt - s*x)/n, t[None], abar, run.recipe.prediction)[0] for w, x in zip(p, x0)))
    return torch.stack(out)


def level_batch(labels_hidden=False):
    eps = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    hide = torch.tensor([False, labels_hidden, False, labels_hidden])
    return Batch(torch.tensor([3, 9, 0, 30]), torch.tensor([900, 700, 400, 100]), eps, hide)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("kind", ["none", "classes", "conditions"])
def test_the_exact_target_is_the_mean_of_the_targets_in_question(kind, prediction):
    y = dict(none=None, classes=torch.arange(40) % 2, conditions=(torch.arange(40) % 3)[:, None]*torch.tensor([[.5, 1.]]))[kind]
    extra = dict(none={}, classes=dict(classes=2), conditions=dict(conditions=2))[kind]
    run = Run(net(precision="fp32", prediction=prediction, sigma_data=0., **extra), 10)
    batch = level_batch(labels_hidden=True)
    among = torch.ones(4, 40, dtype=torch.bool)
    if kind != "none": among[[0, 2]] = (y[batch.rows[[0, 2]]][:, None] == y).view(2, 40, -1).all(2)
    asked = []
    run.net = lambda xt, t, label: asked.append(label) or type("Out", (), dict(sample=torch.zeros_like(xt)))
    got = run.loss(X0, batch, y).item()
    want = mean_target(run, X0, batch, among).square().mean().item()
    assert abs(got - want) < 1e-5*want
    every = mean_target(run, X0, batch, torch.ones_like(among)).square().mean().item()
    assert kind == "none" or abs(every - want) > 1e-4*want, "the labels make no difference here: the test cannot fail"


def test_the_exact_target_has_the_gradient_of_the_drawn_ones_on_average():
    m = net(precision="fp32", posterior_mean=False)
    t, abar, x0 = torch.tensor([950]), m.abar, X0[:3]
    xt = add_noise(x0[:1], t, torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)), abar)
    s, n = abar[t].sqrt(), (1 - abar[t]).sqrt()
    eps = (xt - s*x0)/n   # the noise that each image needs to end at xt
    p = (-.5*eps.square().flatten(1).sum(1)).softmax(0)
    assert p.max() < .9, "one image has it all: the test cannot fail"

    def grad(exact, row):
        run = Run(net(precision="fp32", posterior_mean=exact), 10)
        run.loss(x0, Batch(torch.tensor([row]), t, eps[row:row + 1], torch.tensor([False]))).backward()
        return torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
    drawn, exact = torch.stack([grad(False, i) for i in range(3)]), grad(True, 0)
    assert ((p[:, None]*drawn).sum(0) - exact).norm() < 1e-3*exact.norm() < .1*(drawn[0] - exact).norm()


def test_a_run_on_another_set_asks_about_that_set():
    run, batch = Run(net(precision="fp32"), 10), level_batch()
    a, b = (run.loss(x, batch).item() for x in (X0, X0[:31].flip(0)))
    assert run.loss(X0, batch).item() == a != b


def test_labels_that_are_not_given_leave_all_images():
    y = torch.tensor([[0., 1.], [0., 1.], [1., 1.]])
    assert label_among(torch.tensor([[0., 1.], [math.nan, 1.]]), y).tolist() == [[True, True, False], [True, True, True]]
    assert label_among(torch.tensor([1, -1]), torch.tensor([0, 1, -1])).tolist() == [[False, True, False], [True, True, True]]


# ---------------------------------------------------------------- batches

def test_a_batch_is_a_function_of_seed_and_step():
    args = 100, 8, ALIKE, (3, 4, 4)
    a, b = draw_batch(3, 5, *args), draw_batch(3, 5, *args)
    assert same(a, b) and not any(same(a, draw_batch(*key, *args)) for key in ((3, 6), (4, 5), (5, 3)))
    assert a.rows.dtype == a.t.dtype == torch.int64 and a.eps.dtype == torch.float32 and a.eps.shape == (8, 3, 4, 4)
    assert a.rows.max() < 100 and a.t.max() < 1000 and min(a.rows.min(), a.t.min()) >= 0


def test_batches_reach_every_row_and_every_level():
    rows, t = (torch.cat(v) for v in zip(*(draw_batch(0, k, 30, 64, torch.full((50,), .02), (1, 1, 1))[:2] for k in range(40))))
    assert set(rows.tolist()) == set(range(30)) and set(t.tolist()) == set(range(50))


def test_stratified_levels_take_one_of_each_part_and_all_equally_often():
    draws = torch.stack([draw_batch(0, k, 30, 8, ALIKE, (1, 1, 1), stratified=True).t for k in range(500)])
    for t in draws:   # whatever they are moved by, neighbours are an eighth of the timesteps apart
        gaps = (t.roll(-1) - t) % 1000
        assert gaps.min() >= 124 and gaps.max() <= 126
    assert draws.min() < 10 and draws.max() >= 990 and abs(draws.double().mean() - 499.5) < 5
    plain = draw_batch(0, 3, 30, 8, ALIKE, (1, 1, 1))
    assert torch.equal(plain.rows, draw_batch(0, 3, 30, 8, ALIKE, (1, 1, 1), stratified=True).rows)


@pytest.mark.parametrize("betas", ["linear", "cosine", "zero_snr"])
@pytest.mark.parametrize("mean,std", [(.6, .8), (-1.2, 1.2)])
def test_a_normal_law_of_noise_is_drawn_on_every_schedule(betas, mean, std):
    abar = noise_schedule(betas=betas).alphas_cumprod.double()
    shares, ln_sigma = timestep_shares(abar, mean, std), (.5*((1 - abar)/abar).log()).clamp(max=20)
    assert shares.shape == (1000,) and (shares.sum() - 1).abs() < 1e-12 and shares.min() >= 0
    t = torch.cat([draw_batch(0, k, 30, 64, shares, (1, 1, 1), stratified=k % 2 == 0).t for k in range(300)])
    inner = ln_sigma[t].clamp(mean - 2*std, mean + 2*std)
    assert (inner.mean() - mean).abs() < .03 and (inner.std() - .96*std).abs() < .04
    assert torch.equal(timestep_shares(abar), ALIKE) and (timestep_shares(abar, mean, 1e-3) > .9).sum() <= 1


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("x0,error,word", [
    (X0[:0], ValueError, "empty"), (X0.numpy(), TypeError, "Tensor"), (X0[0], ValueError, "shape"), (X0[:, :1], ValueError, "shape"),
    (TASKS["two_squares"].sample(9, 0)[0], ValueError, "16x16.*32x32"), ((X0 + 1)/2, ValueError, "2\\*x - 1"),
    (X0*127.5 + 127.5, ValueError, "127.5"), ((X0*127.5 + 127.5).byte(), TypeError, "uint8")])
def test_wrong_training_sets(x0, error, word, tmp_path):
    before = bits(m := net())
    with pytest.raises(error, match=word): list(fit(m, x0, 2))
    with pytest.raises(error, match=word): list(train_steps(m, x0, tmp_path, 2))
    assert same(before, bits(m)) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kw,error,word", [
    (dict(steps=0), ValueError, "steps"), (dict(steps=-1), ValueError, "steps"), (dict(steps=2.), TypeError, "steps"),
    (dict(steps=True), TypeError, "steps"), (dict(seed=-1), ValueError, "seed"), (dict(seed=1.), TypeError, "seed")])
def test_wrong_lengths_and_seeds(kw, error, word):
    with pytest.raises(error, match=word): list(fit(net(), X0, **{**dict(steps=2, seed=0), **kw}))


@pytest.mark.parametrize("kw,poison", [(dict(lr=1e30, warmup=0), False), (dict(), True)])
def test_a_loss_that_is_no_number_stops_and_says_where(kw, poison):
    x0 = X0.clone()
    if poison: x0[:] = torch.nan
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step \d+, learning rate [\d.e+-]+"):
        list(fit(net(**kw), x0, 8))


@pytest.mark.parametrize("size,kw", [(20, {}), (36, dict(channels=(8, 8, 8, 8), attention=(False,)*4))])
def test_sizes_that_do_not_fit_the_network(size, kw):
    with pytest.raises(ValueError, match=f"size must be a multiple.*{size}"): unet("laptop", TASK.with_(size=size), **(SMALL | kw))


def test_unknown_presets_list_the_known_ones():
    with pytest.raises(ValueError, match="laptop, published"): unet("desktop", TASK)


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("at", [1, 3, 5])
def test_resumed_is_unbroken(at, tmp_path):
    whole = net()
    losses = [s.loss for s in fit(whole, X0, 6)]
    for k, s in enumerate(train_steps(net(), X0, tmp_path, 6)):
        assert s.loss == losses[k]
        if s.step == at: break
    meta = load_tensors(tmp_path/"checkpoint.safetensors")[1]
    assert meta["step"] == at and meta["steps"] == 6 and meta["images_in_set"] == 40
    rest, m = [], net(seed=7)   # other first weights: all must come from the file
    for s in train_steps(m, X0, tmp_path, 6): rest.append(s.loss)
    assert rest == losses[at:] and same(bits(m), bits(whole)) and not m.training


def test_a_finished_run_is_not_repeated(tmp_path):
    a, b = net(), net()
    list(train_steps(a, X0, tmp_path, 3))
    blob = (tmp_path/"checkpoint.safetensors").read_bytes()
    assert list(train_steps(b, X0, tmp_path, 3)) == [] and same(bits(a), bits(b))
    tensors, meta = load_tensors(tmp_path/"checkpoint.safetensors")
    (tmp_path/"x").write_bytes(blob)
    assert all(torch.equal(v, tensors[k]) for k, v in load_tensors(tmp_path/"x")[0].items()) and meta["seconds"] > 0


def test_seconds_add_up(tmp_path):
    for s in train_steps(net(), X0, tmp_path, 6):
        if s.step == 3: break
    first = load_tensors(tmp_path/"checkpoint.safetensors")[1]["seconds"]
    list(train_steps(net(), X0, tmp_path, 6))
    assert load_tensors(tmp_path/"checkpoint.safetensors")[1]["seconds"] > first > 0


@pytest.mark.parametrize("steps,seed,recipe,word", [
    (7, 0, {}, "steps is 6, expected 7"), (6, 1, {}, "seed is 0, expected 1"), (6, 0, dict(lr=5e-3), "recipe"),
    (6, 0, dict(batch=5), "recipe"), (6, 0, dict(channels=(8, 8, 8)), "recipe"), (6, 0, dict(ema=0.), "recipe")])
def test_another_run_is_refused(steps, seed, recipe, word, tmp_path):
    for s in train_steps(net(), X0, tmp_path, 6):
        if s.step == 2: break
    blob = (tmp_path/"checkpoint.safetensors").read_bytes()
    with pytest.raises(StoreError, match=word): list(train_steps(net(**recipe), X0, tmp_path, steps, seed))
    assert (tmp_path/"checkpoint.safetensors").read_bytes() == blob


def test_another_training_set_is_refused(tmp_path):
    for s in train_steps(net(), X0, tmp_path, 6):
        if s.step == 2: break
    with pytest.raises(StoreError, match="set|images"): list(train_steps(net(), X0[:30], tmp_path, 6))


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "empty"])
def test_a_damaged_checkpoint_is_refused_and_kept(damage, tmp_path):
    path = tmp_path/"checkpoint.safetensors"
    for s in train_steps(net(), X0, tmp_path, 6):
        if s.step == 2: break
    blob = path.read_bytes()
    path.write_bytes(dict(cut=blob[:-100], flip=blob[:-50] + b"\x55" + blob[-49:], foreign=b"PK" + blob[2:], empty=b"")[damage])
    bad = path.read_bytes()
    with pytest.raises(StoreError, match="checkpoint.safetensors"): list(train_steps(net(), X0, tmp_path, 6))
    assert path.read_bytes() == bad


@pytest.mark.parametrize("lost", ["model.", "opt.", "ema."])
def test_a_checkpoint_that_lacks_something_is_refused(lost, tmp_path):
    run = Run(net().train(), 6)
    run.advance(X0)
    tensors, meta = load_tensors(save_run(run, tmp_path/"a"))
    gone = next(k for k in tensors if k.startswith(lost))
    save_tensors(tmp_path/"b", {k: v for k, v in tensors.items() if k != gone}, meta)
    with pytest.raises((StoreError, RuntimeError, KeyError), match=gone.removeprefix("model.").replace(".", r"\.")):
        load_run(Run(net(), 6), tmp_path/"b")


def test_an_optimiser_state_is_stored_whole(tmp_path):
    run = Run(net().train(), 6)
    for _ in range(3): run.advance(X0)
    other = Run(net(seed=5).train(), 6)
    load_run(other, save_run(run, tmp_path/"a"))
    for p, q in zip(run.model.parameters(), other.model.parameters()):
        assert torch.equal(p, q) and p.stride() == q.stride()
        mine, theirs = run.opt.state[p], other.opt.state[q]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(v, theirs[k]) and v.stride() == theirs[k].stride() for k, v in mine.items())
    assert same(run.ema.shadow_params, other.ema.shadow_params) and run.step == other.step == 3


def test_an_error_in_training_keeps_the_last_good_state(tmp_path):
    "After a step that failed the file holds the steps before it, all finite."
    m = net(lr=1e30, warmup=0, ema=0.)
    with pytest.raises(FloatingPointError): list(train_steps(m, X0, tmp_path, 50))
    path = tmp_path/"checkpoint.safetensors"
    if path.exists():
        tensors, meta = load_tensors(path)
        assert all(v.isfinite().all() for v in tensors.values()), "a run that blew up must not be resumed from blown-up weights"


def test_a_checkpoint_says_where_it_was_made(tmp_path):
    list(train_steps(net(), X0, tmp_path, 2))
    meta, here = load_tensors(tmp_path/"checkpoint.safetensors")[1], provenance(torch.device("cpu"))
    assert {k: meta[k] for k in here} == here and meta["torch"] == torch.__version__ and {"revision", "versions", "threads"} <= set(here)


def test_where_a_run_stands(tmp_path):
    assert stands_at(tmp_path/"none") == 0
    for s in train_steps(net(), X0, tmp_path, 6):
        if s.step == 4: break
    assert stands_at(tmp_path) == 4 == next(train_steps(net(), X0, tmp_path, 6)).step - 1
    list(train_steps(net(), X0, tmp_path, 6))
    assert stands_at(tmp_path) == 6
    (tmp_path/"checkpoint.safetensors").write_bytes(b"damaged")
    with pytest.raises(StoreError, match="checkpoint.safetensors"): stands_at(tmp_path)


def test_a_trained_model_knows_its_training_set(tmp_path):
    a, b, c = net(), net(), net()
    assert a.trained_on is None
    for _ in fit(a, X0, 2): assert a.trained_on is X0   # while it runs too
    list(train_steps(b, X0, tmp_path, 2)), train(c, X0, 1)
    assert a.trained_on is b.trained_on is c.trained_on is X0
    again = net()
    assert not list(train_steps(again, X0, tmp_path, 2)) and again.trained_on is X0   # a run that was finished already
    with pytest.raises(StoreError): list(train_steps(d := net(), X0[:8], tmp_path, 2))
    assert d.trained_on is None   # refused: it was trained on nothing


CHILD = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_train import TASK, X0, net, train_steps
for s in train_steps(net(), X0, sys.argv[1], 24, every=0.):
    print(s.step, repr(s.loss), flush=True)
"""


def child(folder):
    code = CHILD.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, env=clean_env(OMP_NUM_THREADS="1"),
                            stdout=subprocess.PIPE, text=True)


def kill_at(folder, steps, delay):
    "Start or resume the run, kill it `delay` seconds after it has reported `steps` steps; its lines."
    p, lines = child(folder), []
    try:
        for line in p.stdout:
            lines.append(line)
            if len(lines) == steps: break
        time.sleep(delay)
        os.kill(p.pid, signal.SIGKILL)
        lines += p.stdout.readlines()
    finally: p.kill(), p.wait()
    return lines


@pytest.mark.parametrize("rounds", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_unbroken(rounds, tmp_path):
    whole, rng, seen = net(), random.Random(rounds), {}
    losses = {s.step: s.loss for s in fit(whole, X0, 24)}
    for _ in range(rounds):
        for line in kill_at(tmp_path, rng.randrange(1, 1 + 20//rounds), rng.random()*.05):
            step, loss = line.split()
            seen[int(step)] = float(loss)
    assert not [p.name for p in tmp_path.iterdir() if p.name != "checkpoint.safetensors" and not p.name.startswith(".")]
    start = load_tensors(tmp_path/"checkpoint.safetensors")[1]["step"]
    assert start < 24   # the killing hit a run at work
    m = net(seed=9)
    seen |= {s.step: s.loss for s in train_steps(m, X0, tmp_path, 24)}
    assert seen == losses and same(bits(m), bits(whole))


def test_another_beginning_is_refused(tmp_path):
    list(train_steps(net(), X0, tmp_path, 2, remarks=dict(start_sha256="a")))
    with pytest.raises(StoreError, match="start_sha256 is a, expected b"):
        list(train_steps(net(1), X0, tmp_path, 2, remarks=dict(start_sha256="b")))
