"A training that is killed, interrupted, starved of disk, raced or poisoned: what is on the disk can be resumed to the same bits."
import errno
import gc
import math
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from rulediff_nb import store
from rulediff_nb import train as training
from rulediff_nb.core import row_noise
from rulediff_nb.metrics import bootstrap, gap, interval, measure, real_images, statistics
from rulediff_nb.sample import load_pretrained, sample
from rulediff_nb.store import StoreError, load_tensors, save_tensors
from rulediff_nb.tasks import get_task
from rulediff_nb.train import claim, fit, train_steps
from rulediff_nb.unet import unet

torch.set_num_threads(1)
TASK = get_task("two_squares", palette="fixed", size=16)
X0 = TASK.sample(40, 0)[0]
SMALL = dict(channels=(8, 8, 16), head_dim=8, batch=4, lr=1e-3)
STEPS = 30
FILE = "checkpoint.safetensors"
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


def net(seed=0, **kw): return unet("laptop", TASK, seed, **(SMALL | kw))


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def bits(model): return {k: v.detach().clone() for k, v in model.state_dict().items()}


def stored(folder): return load_tensors(Path(folder)/FILE)


# ---------------------------------------------------------------- processes
# A server imports everything once and forks a fresh process per run: a kill costs a fraction of a second, not an import.

@pytest.fixture(scope="module")
def spawn():
    ctx, started = multiprocessing.get_context("forkserver"), []
    ctx.set_forkserver_preload(["pytest", "psutil", "pytorch_optimizer", "rulediff_nb.metrics", "rulediff_nb.sample", "rulediff_nb.train"])

    def start(work, *args):
        mine, theirs = ctx.Pipe()
        p = ctx.Process(target=work, args=(theirs, *args), daemon=True)
        started.append(p)
        p.start()
        theirs.close()
        return p, mine
    yield start
    for p in started: p.kill(), p.join()


def heard(pipe):
    "All that a process sent until it ended."
    out = []
    try:
        while True: out.append(pipe.recv())
    except (EOFError, ConnectionResetError): return out


def work(pipe, folder, every=0., limit=None, pace=0.):
    "A training run that tells of each step; `limit`: bytes that a file may have from here on."
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell in the background may have it ignored
    if limit is not None:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    model = net()
    try:
        for s in train_steps(model, X0, folder, STEPS, every=every):
            pipe.send((s.step, s.loss))
            time.sleep(pace)
    except (StoreError, FloatingPointError, KeyboardInterrupt) as e: pipe.send((type(e).__name__, str(e)))
    pipe.send(("model", float(sum(v.double().abs().sum() for v in model.state_dict().values())), model.training))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "Losses and last checkpoint of a run that nothing disturbed."
    folder = tmp_path_factory.mktemp("whole")
    losses = {s.step: s.loss for s in train_steps(net(), X0, folder, STEPS)}
    return losses, stored(folder)[0]


def resumed(folder, unbroken, seen=None):
    "Run what is there to its end: it must be the unbroken run's, bit for bit."
    losses, tensors = unbroken
    seen = dict(seen or {})
    first = 9 if (Path(folder)/FILE).exists() else 0   # other first weights: all must come from the file
    for s in train_steps(net(first), X0, folder, STEPS):
        assert seen.setdefault(s.step, s.loss) == s.loss
    assert all(losses[k] == v for k, v in seen.items()) and same(stored(folder)[0], tensors)


# ---------------------------------------------------------------- killed

@posix
@pytest.mark.parametrize("every,rounds", [(0., 10), (1e9, 2)])
def test_killed_at_ten_random_moments(every, rounds, spawn, unbroken, tmp_path):
    "Saving after each step, many of the kills hit a write; before the first save nothing is there, and the run starts anew."
    rng, seen, died = random.Random(1), {}, 0
    for _ in range(rounds):
        p, pipe = spawn(work, tmp_path, every)
        want = rng.randrange(1, 3)
        lines = [pipe.recv() for _ in range(want)]
        time.sleep(rng.random()*.02)
        p.kill(), p.join()
        seen |= {k: v for k, v, *_ in lines + heard(pipe) if isinstance(k, int)}
        died += p.exitcode == -signal.SIGKILL
        if p.exitcode == 0: break   # a fast machine may come to the end
    assert died >= rounds//2 and {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} <= {FILE}
    resumed(tmp_path, unbroken, seen)


@posix
def test_what_a_killed_run_left_half_written_is_cleared(spawn, unbroken, tmp_path):
    for name in (f".{FILE}.a1b2", f".{FILE}.zz"): (tmp_path/name).write_bytes(b"half")
    (tmp_path/"notes.txt").write_text("mine")
    (tmp_path/".hidden").write_text("mine too")
    resumed(tmp_path, unbroken)
    assert {p.name for p in tmp_path.iterdir()} - {".lock"} == {FILE, "notes.txt", ".hidden"}


# ---------------------------------------------------------------- two at once

@posix
def test_a_second_run_is_refused_and_the_first_goes_on(spawn, unbroken, tmp_path):
    p, pipe = spawn(work, tmp_path, 0., None, .05)
    first = [pipe.recv()]
    half = tmp_path/f".{FILE}.at-work"
    half.write_bytes(b"of the first")
    told = heard(spawn(work, tmp_path)[1])
    assert told[0][0] == "StoreError" and "another run is at work in" in told[0][1] and str(tmp_path) in told[0][1]
    assert half.exists(), "a refused run must not clear what the first is writing"
    with pytest.raises(StoreError, match="another run"): list(train_steps(net(), X0, tmp_path, STEPS))
    first += heard(pipe)
    assert {k: v for k, v, *_ in first if isinstance(k, int)} == unbroken[0] and same(stored(tmp_path)[0], unbroken[1])


@posix
def test_the_lock_of_a_killed_run_does_not_block(spawn, unbroken, tmp_path):
    p, pipe = spawn(work, tmp_path, 0., None, .05)
    pipe.recv()
    p.kill(), p.join()
    assert (tmp_path/".lock").exists()
    resumed(tmp_path, unbroken)


@pytest.mark.parametrize("left", ["break", "error", "end"])
def test_the_lock_is_given_back(left, tmp_path):
    def loop():
        for s in train_steps(net(), X0, tmp_path, 4):
            if s.step == 2 and left == "break": break
            if s.step == 2 and left == "error": raise RuntimeError
    try: loop()
    except RuntimeError: pass
    claim(tmp_path).release()


def test_two_runs_in_one_process_are_two_runs(tmp_path):
    g = train_steps(net(), X0, tmp_path, 4)
    next(g)
    with pytest.raises(StoreError, match="another run"): next(train_steps(net(), X0, tmp_path, 4))
    g.close()
    claim(tmp_path).release()


# ---------------------------------------------------------------- the disk

@posix
def test_a_file_that_may_not_grow_leaves_the_last_good_checkpoint(spawn, unbroken, tmp_path):
    "The system itself refuses the write half way, as a full disk or a quota does."
    for s in train_steps(net(), X0, tmp_path, STEPS):
        if s.step == 5: break
    blob = (tmp_path/FILE).read_bytes()
    told = heard(spawn(work, tmp_path, 0., len(blob)//2)[1])
    assert told[0][0] == 6 and told[1][0] == "StoreError" and told[2][2] is False   # one step, refused, model in eval mode
    assert f"cannot write {tmp_path/FILE}" in told[1][1] and "what stood there is untouched" in told[1][1]
    assert (tmp_path/FILE).read_bytes() == blob and {p.name for p in tmp_path.iterdir()} == {FILE, ".lock"}
    resumed(tmp_path, unbroken)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_stops_the_run_and_says_so(call, unbroken, tmp_path, monkeypatch):
    done = []

    def full(*args):
        if len(done) >= 5: raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*args)
    plain = getattr(os, call)
    monkeypatch.setattr(store.os, call, full)
    with pytest.raises(StoreError, match=f"cannot write .*{FILE}: No space left on device; what stood there is untouched"):
        for s in train_steps(net(), X0, tmp_path, STEPS, every=0.): done.append(s.step)
    monkeypatch.undo()
    assert stored(tmp_path)[1]["step"] == 4 and len(done) == 5
    resumed(tmp_path, unbroken)


# ---------------------------------------------------------------- damage

def read_or_refused(path, tensors, meta):
    "Whether a file was refused by its name; if not, it must hold just what was saved."
    try: t, m = load_tensors(path)
    except StoreError as e: return str(path) in str(e)
    assert same(t, tensors) and m == meta
    return False


def test_a_small_file_at_every_offset(tmp_path):
    tensors, meta = dict(a=torch.arange(5.), b=torch.ones(2, 3).half(), n=torch.arange(4)), dict(step=3, recipe=dict(lr=.1))
    good, path = save_tensors(tmp_path/"good", tensors, meta).read_bytes(), tmp_path/"bad"
    for i in range(len(good)):
        path.write_bytes(good[:i])
        assert read_or_refused(path, tensors, meta), f"cut at {i}"
        for change in (0x01, 0x20, 0x80, 0xff):
            path.write_bytes(good[:i] + bytes([good[i] ^ change]) + good[i + 1:])
            read = read_or_refused(path, tensors, meta)
            assert read or good[i] in b" \t\n\r", f"byte {i} ^ {change:#x}"   # white space around JSON is nothing that is returned


def test_a_checkpoint_at_many_offsets(tmp_path):
    for s in train_steps(net(), X0, tmp_path, STEPS):
        if s.step == 2: break
    path, rng = tmp_path/FILE, random.Random(0)
    good, before = path.read_bytes(), stored(tmp_path)
    head = 8 + int.from_bytes(good[:8], "little")
    places = [*range(0, head, 499), *(rng.randrange(head, len(good)) for _ in range(30)), len(good) - 1]
    for i in places:
        path.write_bytes(good[:i])
        assert read_or_refused(path, *before), f"cut at {i}"
        path.write_bytes(good[:i] + bytes([good[i] ^ (1 << rng.randrange(8))]) + good[i + 1:])
        assert read_or_refused(path, *before), f"bit at {i}"
    for i in rng.sample(places, 3):   # and the trainer passes the refusal on, and leaves the file for its owner to look at
        path.write_bytes(bad := good[:i] + bytes([good[i] ^ 4]) + good[i + 1:])
        with pytest.raises(StoreError, match=FILE): list(train_steps(net(), X0, tmp_path, STEPS))
        assert path.read_bytes() == bad


def test_what_was_checked_is_what_is_returned(tmp_path):
    "A file that changes after the check, in place, must not reach into tensors that were handed out."
    path = save_tensors(tmp_path/"f", dict(w=torch.ones(1000)), {})
    tensors, _ = load_tensors(path)
    with path.open("r+b") as f: f.seek(path.stat().st_size - 4000), f.write(bytes(4000))
    assert torch.equal(tensors["w"], torch.ones(1000))
    tensors["w"].zero_()
    with pytest.raises(StoreError): load_tensors(path)


# ---------------------------------------------------------------- another run

@pytest.mark.parametrize("change,words", [
    (dict(lr=5e-3), ["recipe.lr is 0.001, expected 0.005"]), (dict(batch=5), ["recipe.batch is 4, expected 5"]),
    (dict(ema=0.), ["recipe.ema is 0.999, expected 0.0"]), (dict(precision="fp32"), ["recipe.precision is bf16, expected fp32"]),
    (dict(lr=5e-3, batch=5), ["recipe.lr", "recipe.batch"]),
    (dict(channels=(8, 8, 8)), ["recipe.channels is [8, 8, 16], expected [8, 8, 8]"])])
def test_another_recipe_is_named(change, words, tmp_path):
    refused(words, tmp_path, lambda: train_steps(net(**change), X0, tmp_path, 6))


@pytest.mark.parametrize("task,words", [
    (dict(name="two_circles"), ["recipe.task.name is two_squares, expected two_circles"]),
    (dict(palette="random"), ["recipe.task.palette is fixed, expected random"]), (dict(size=32), ["recipe.task.size is 16, expected 32"])])
def test_another_task_is_named(task, words, tmp_path):
    task = get_task(**dict(name="two_squares", palette="fixed", size=16) | task)
    refused(words, tmp_path, lambda: train_steps(unet("laptop", task, 0, **SMALL), task.sample(40, 0)[0], tmp_path, 6))


@pytest.mark.parametrize("x0", [X0[:30], X0.flip(0), torch.cat([X0[:39], -X0[39:]])])
def test_another_training_set_is_named(x0, tmp_path):
    refused(["another set of 40 images", f"got {len(x0)}"], tmp_path, lambda: train_steps(net(), x0, tmp_path, 6))


@pytest.mark.parametrize("kw,words", [(dict(steps=7), ["steps is 6, expected 7"]), (dict(steps=6, seed=1), ["seed is 0, expected 1"]),
                                      (dict(steps=7, seed=1), ["steps is 6", "seed is 0"])])
def test_another_length_or_seed_is_named(kw, words, tmp_path):
    refused(words, tmp_path, lambda: train_steps(net(), X0, tmp_path, **kw))


def refused(words, folder, run):
    for s in train_steps(net(), X0, folder, 6):
        if s.step == 2: break
    blob = (folder/FILE).read_bytes()
    with pytest.raises(StoreError) as e: list(run())
    assert all(w in str(e.value) for w in [*words, FILE]), str(e.value)
    assert "channels is" in str(e.value) or "expected {" not in str(e.value)   # fields, not whole recipes
    assert (folder/FILE).read_bytes() == blob


# ---------------------------------------------------------------- no number

def poisoned(monkeypatch, at, what):
    "From step `at` on the loss, or its gradient, is no number."
    plain = training.Run.loss

    def loss(self, *args):
        out = plain(self, *args)
        if self.step < at: return out
        if what == "loss": return out*math.nan
        out.register_hook(lambda g: g*math.nan)
        return out
    monkeypatch.setattr(training.Run, "loss", loss)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("every,good", [(0., 5), (1e9, 0)])
def test_no_number_stops_and_the_checkpoint_is_from_before(what, every, good, unbroken, tmp_path, monkeypatch):
    "A gradient that is no number spoils the weights while the loss still is one: these weights must not be saved either."
    poisoned(monkeypatch, 5, what)
    with pytest.raises(FloatingPointError) as e: list(train_steps(net(clip=0.), X0, tmp_path, STEPS, every=every))
    said = str(e.value)
    kept = f"the last good checkpoint is {tmp_path/FILE}, step {good}" if good else "no checkpoint was written yet"
    assert said.endswith(kept) and "step" in said and (what == "gradient" or "loss is nan at step 5, learning rate " in said)
    assert (tmp_path/FILE).exists() == bool(good)
    if good:
        tensors, meta = stored(tmp_path)
        assert meta["step"] == 5 and all(v.isfinite().all() for v in tensors.values())
    monkeypatch.undo()
    if good: list(train_steps(net(clip=0.), X0, tmp_path, STEPS))   # the way on is open


@pytest.mark.parametrize("how", ["break", "end"])
def test_weights_that_are_no_number_are_not_saved_on_the_way_out(how, tmp_path, monkeypatch):
    poisoned(monkeypatch, 5, "gradient")

    def loop():
        for s in train_steps(net(clip=0.), X0, tmp_path, STEPS if how == "break" else 6):
            if s.step == 6 and how == "break": break
    if how == "break": loop()
    else:
        with pytest.raises(FloatingPointError, match="not finite after step 6; no checkpoint"): loop()
    assert not (tmp_path/FILE).exists()


# ---------------------------------------------------------------- Ctrl-C

def interrupted(monkeypatch, owner, name, at, before=False):
    "KeyboardInterrupt in the `at`-th call of a method, after it did its work or before."
    plain, calls = getattr(owner, name), []

    def call(*args, **kw):
        calls.append(0)
        if before and len(calls) == at: raise KeyboardInterrupt
        out = plain(*args, **kw)
        if not before and len(calls) == at: raise KeyboardInterrupt
        return out
    monkeypatch.setattr(owner, name, call)


WHERE = {"draw": (training, "draw_batch"), "loss": (training.Run, "loss"), "ema": (training.EMAModel, "step"),
         "save": (training, "save_run"), "write": (store, "write_atomic"), "fsync": (store.os, "fsync")}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("where", WHERE)
def test_ctrl_c_anywhere_leaves_a_checkpoint_that_resumes_to_the_same_bits(where, before, unbroken, tmp_path, monkeypatch):
    interrupted(monkeypatch, *WHERE[where], 4, before)
    model = net()
    with pytest.raises(KeyboardInterrupt): list(train_steps(model, X0, tmp_path, STEPS, every=0.))
    monkeypatch.undo()
    assert not model.training and 3 <= stored(tmp_path)[1]["step"] <= 4
    assert {p.name for p in tmp_path.iterdir()} == {FILE, ".lock"}
    resumed(tmp_path, unbroken)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("where", ["loss", "ema"])
def test_ctrl_c_in_the_middle_of_an_update_saves_no_half_update(where, before, unbroken, tmp_path, monkeypatch):
    "Weights that moved without their average or their count must not be resumed from; what was saved earlier stays."
    interrupted(monkeypatch, *WHERE[where], 4, before)
    with pytest.raises(KeyboardInterrupt): list(train_steps(net(), X0, tmp_path, STEPS, every=1e9))
    monkeypatch.undo()
    assert (tmp_path/FILE).exists() == (where == "loss")
    resumed(tmp_path, unbroken)


@pytest.mark.parametrize("where", ["draw", "loss"])
def test_ctrl_c_leaves_the_average_in_the_model(where, tmp_path, monkeypatch):
    want = net()
    for s in fit(want, X0, STEPS):
        if s.step == 3: break
    interrupted(monkeypatch, *WHERE[where], 4)
    model = net()
    with pytest.raises(KeyboardInterrupt): list(train_steps(model, X0, tmp_path, STEPS))
    tensors, meta = stored(tmp_path)
    assert same(bits(model), bits(want)) and meta["step"] == 3 and not model.training
    assert all(torch.equal(tensors[f"ema.{k}"], p) for k, p in model.named_parameters())
    assert not all(torch.equal(tensors[f"model.{k}"], p) for k, p in model.named_parameters())
    assert sample(model, 2, steps=3).isfinite().all()


@posix
def test_a_real_sigint(spawn, unbroken, tmp_path):
    p, pipe = spawn(work, tmp_path, 0., None, .002)
    told, rng = [pipe.recv() for _ in range(3)], random.Random(2)
    time.sleep(rng.random()*.05)
    os.kill(p.pid, signal.SIGINT)
    told += heard(pipe)
    p.join()
    assert told[-2][0] == "KeyboardInterrupt" and told[-1][0] == "model" and told[-1][2] is False and p.exitcode == 0
    assert math.isfinite(told[-1][1]) and 3 <= stored(tmp_path)[1]["step"] < STEPS
    resumed(tmp_path, unbroken, {k: v for k, v, *_ in told if isinstance(k, int)})


# ---------------------------------------------------------------- the same bits

def test_another_process_gives_the_same_bits(spawn, unbroken, tmp_path):
    told = heard(spawn(work, tmp_path)[1])
    assert {k: v for k, v, *_ in told if isinstance(k, int)} == unbroken[0] and same(stored(tmp_path)[0], unbroken[1])


def drawn(pipe, steps):
    torch.set_num_threads(1)
    pipe.send(sample(load_pretrained("two_squares"), 2, steps=steps, seed=3, eta=1.).numpy().tobytes())


def test_another_process_draws_the_same_images(spawn):
    told = heard(spawn(drawn, 4)[1])
    assert told == [sample(load_pretrained("two_squares"), 2, steps=4, seed=3, eta=1.).numpy().tobytes()]


@pytest.mark.parametrize("stream", [0, 20])
def test_noise_does_not_know_its_batch(stream):
    whole = row_noise(5, range(70), (3, 8, 8), stream)
    for batch in range(1, 71):
        parts = [row_noise(5, range(i, min(i + batch, 70)), (3, 8, 8), stream) for i in range(0, 70, batch)]
        assert torch.equal(torch.cat(parts), whole), batch


@pytest.mark.parametrize("n,batches", [(3, (1, 2)), pytest.param(24, (1, 5, 8), marks=pytest.mark.slow)])
def test_images_agree_across_batch_sizes_after_fifty_steps(n, batches, record):
    "A trained network in float32: the order of additions may differ with the batch, and no more than 1e-3 may come of it."
    model = load_pretrained("two_squares")
    whole = sample(model, n, steps=50, seed=11, batch=n)
    off = {b: (sample(model, n, steps=50, seed=11, batch=b) - whole).abs().max().item() for b in batches}
    record(f"largest difference between batch sizes, {n} images, 50 steps", off)
    assert max(off.values()) <= 1e-3


# ---------------------------------------------------------------- devices

@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=cuda)])
def test_tensors_come_back_on_the_cpu_whatever_the_default_device(device, tmp_path):
    t = dict(w=torch.arange(6.).view(2, 3), h=torch.ones(4).half())
    with torch.device(device): back, meta = load_tensors(save_tensors(tmp_path/"f", t, dict(step=1)))
    assert same(back, t) and meta == dict(step=1) and {v.device.type for v in back.values()} == {"cpu"}


def test_a_run_is_resumed_with_another_default_device(unbroken, tmp_path):
    "As on a machine whose default device is an accelerator: what comes from the file must not land on another device than the model."
    for s in train_steps(net(), X0, tmp_path, STEPS):
        if s.step == 3: break
    run = training.Run(net(seed=5).train(), STEPS)
    with torch.device("meta"): training.load_run(run, tmp_path/FILE)
    moments = (v for s in run.opt.state.values() for v in s.values() if torch.is_tensor(v))
    tensors = [*run.model.parameters(), *run.ema.shadow_params, *moments]
    assert {v.device.type for v in tensors} == {"cpu"} and run.step == 3


@cuda
@pytest.mark.parametrize("first,second", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_moves_to_another_device(first, second, tmp_path):
    for s in train_steps(net(precision="fp32").to(first), X0, tmp_path, 6):
        if s.step == 3: break
    before = stored(tmp_path)[0]
    run = training.Run(net(seed=5, precision="fp32").to(second).train(), 6)
    training.load_run(run, tmp_path/FILE)
    assert all(torch.equal(p.cpu(), before[f"model.{k}"]) and p.device.type == second for k, p in run.model.named_parameters())
    assert [s.step for s in train_steps(net(seed=5, precision="fp32").to(second), X0, tmp_path, 6)] == [4, 5, 6]


# ---------------------------------------------------------------- long and slow

@pytest.mark.slow
@pytest.mark.parametrize("saving", [False, True])
def test_memory_does_not_grow_over_two_thousand_steps(saving, tmp_path, record):
    "Resident memory after step 2000 within 4 MB of that after step 500: 3 kB lost per step would show."
    me, at = psutil.Process(), {}
    steps = train_steps(net(), X0, tmp_path, 2000, every=.1) if saving else fit(net(), X0, 2000)
    for s in steps:
        if s.step in (500, 1000, 1500, 2000): gc.collect(), at.setdefault(s.step, me.memory_info().rss/2**20)
    record(f"MB resident at step, saving={saving}", {k: round(v, 1) for k, v in at.items()})
    assert at[2000] - at[500] < 4, at


def twin(model, seed=0):
    "Full-precision weights that round to the model's half-precision ones: uniform within half a step around each."
    rng = torch.Generator().manual_seed(seed)
    out = load_pretrained(model.recipe.task.name, model.recipe.task.palette)
    with torch.no_grad():
        for p in out.parameters():
            h = p.half()
            step = (h - torch.nextafter(h, torch.zeros_like(h))).abs().float()
            p.add_((torch.rand(p.shape, generator=rng) - .5)*.998*step)
            assert torch.equal(p.half(), h)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_squares", "sun_shadow"])
def test_half_precision_gives_a_rule_gap_as_good(name, record):
    "Paired over images from the same noise: the 95 % interval of the difference lies within .02."
    model, n = load_pretrained(name), 512
    task = model.recipe.task
    real = real_images(task, n)
    e, c = statistics(real.floor, task.size), statistics(real.chance, task.size)["rule_error"]

    def f(m):
        s = statistics(m, task.size)
        return dict(g=gap(s["rule_error"], s["readable"], e["rule_error"], e["readable"], c))
    a, b = (measure(task, sample(m, n, steps=25, seed=2)) for m in (model, twin(model)))
    diff, (lo, hi) = (f(a)["g"] - f(b)["g"]).item(), interval(bootstrap(a, f)["g"] - bootstrap(b, f)["g"])
    record(f"rule_gap of {name}, half less full precision, {n} images", f"{diff:+.4f} [{lo:+.4f}, {hi:+.4f}] at {f(b)['g']:.3f}")
    assert -.02 < lo <= hi < .02


