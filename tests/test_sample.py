"Sampling: rows that belong to (seed, i), diffusers' schedulers, the same bits again, weights that load or are refused by name."
import json
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from rulediff_nb import sample as sampling
from rulediff_nb.core import row_noise
from rulediff_nb.sample import WEIGHTS, Denoised, ddim, load_pretrained, sample, sample_batches, sample_steps
from rulediff_nb.store import StoreError, list_releases, save_release
from rulediff_nb.tasks import TASKS, get_task
from rulediff_nb.unet import RuleUNet, unet

torch.set_num_threads(1)
TASK = get_task("two_squares", palette="pure", size=16)
SMALL = dict(channels=(8, 8, 16), head_dim=8, batch=4)
PREDICTIONS = ["v_prediction", "epsilon", "sample"]


def net(prediction="v_prediction", **kw):
    "An untrained network whose last layer is not zero."
    m = unet("laptop", TASK, 0, **(SMALL | dict(prediction=prediction, contrast=.3 if prediction == "v_prediction" else 0.) | kw))
    return m.eval()


NET = net()
every = pytest.mark.parametrize("prediction", PREDICTIONS)


# ---------------------------------------------------------------- rows and seeds

@pytest.mark.parametrize("eta", [0., 1.])
def test_the_same_seed_gives_the_same_bits(eta):
    a, b, c = (sample(NET, 3, steps=5, seed=s, eta=eta) for s in (1, 1, 2))
    assert torch.equal(a, b) and (a - c).abs().amax((1, 2, 3)).min() > .01
    assert a.shape == (3, 3, 16, 16) and a.dtype == torch.float32 and a.abs().max() <= 1 and a.isfinite().all()


@pytest.mark.parametrize("eta", [0., .5, 1.])
@every
def test_a_row_does_not_know_its_batch(prediction, eta):
    m = net(prediction)
    bound = 5e-3 if (prediction, eta) == ("epsilon", 0.) else 1e-3   # x0_hat from epsilon divides by sqrt(abar) = .006 at the last level
    whole = sample(m, 64, steps=10, seed=3, eta=eta)
    for i in (0, 7, 63): assert (list(sample_steps(m, [i], 10, eta, 3))[-1].x.clamp(-1, 1)[0] - whole[i]).abs().max() <= bound
    for batch in (1, 8):
        assert (sample(m, 8, steps=10, seed=3, eta=eta, batch=batch) - whole[:8]).abs().max() <= bound


def test_neighbouring_seeds_share_no_image():
    a, b = (sample(NET, 12, steps=3, seed=s) for s in (0, 1))
    assert torch.cdist(a.flatten(1), b.flatten(1)).min() > .5 < torch.pdist(a.flatten(1)).min()


def states(rows, eta=0., scheduler=None, m=NET):
    "What the network is shown first, and the noise that was added at every step."
    seen = []

    class Noted:
        recipe, parameters = m.recipe, m.parameters
        def predict(self, x, t, y=None): return seen.append(x.clone()) or torch.zeros_like(x)
    list(sample_steps(Noted(), rows, 6, eta, 5, scheduler))
    return torch.stack(seen, 1)


@pytest.mark.parametrize("eta,scheduler", [(0., None), (1., None), (0., DDPMScheduler)])
def test_noise_is_bit_equal_across_batch_sizes(eta, scheduler):
    s = scheduler and scheduler.from_config(NET.recipe.schedule().config)
    whole = states(range(16), eta, s)
    assert torch.equal(whole[:, 0], row_noise(5, range(16), (3, 16, 16), 20))
    for rows in ([0], [15], [3, 9], range(4, 12)): assert torch.equal(states(rows, eta, s), whole[list(rows)])


def test_fresh_noise_is_fresh_at_every_step(monkeypatch):
    streams = []
    monkeypatch.setattr(sampling, "row_noise", lambda seed, rows, shape, stream, *args: (
        streams.append((seed, stream)) or row_noise(seed, rows, shape, stream, *args)))
    states(range(4), 1.)
    assert len(streams) == 7 == len(set(streams)) and {s for s, _ in streams} == {5}


def test_eta_matters():
    a, b, c = (sample(NET, 2, steps=5, seed=1, eta=e) for e in (0., .5, 1.))
    assert min((a - b).abs().max(), (b - c).abs().max(), (a - c).abs().max()) > .01


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    state, a = torch.get_rng_state(), sample(NET, 2, steps=3, eta=1.)
    b = sample(NET, 2, steps=3, scheduler=DDPMScheduler.from_config(NET.recipe.schedule().config))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    assert torch.equal(a, sample(NET, 2, steps=3, eta=1.))
    assert torch.equal(b, sample(NET, 2, steps=3, scheduler=DDPMScheduler.from_config(NET.recipe.schedule().config)))


# ---------------------------------------------------------------- against diffusers' own loop

@torch.no_grad()
def library_loop(m, x, sch, steps):
    "The loop of diffusers' pipelines, with eta 0."
    sch.set_timesteps(steps)
    for t in sch.timesteps: x = sch.step(m(sch.scale_model_input(x, t), t).sample, t, x).prev_sample
    return x.clamp(-1, 1)


@pytest.mark.parametrize("steps", [1, 7, 50])
@every
def test_ddim_is_diffusers(prediction, steps):
    m, r = net(prediction), net(prediction).recipe
    s = DDIMScheduler(num_train_timesteps=r.T, beta_start=r.beta_start, beta_end=r.beta_end, beta_schedule="linear",
                      prediction_type=prediction, timestep_spacing="trailing", clip_sample=True)
    x = row_noise(4, range(3), (3, 16, 16), 20)
    assert (library_loop(m, x, s, steps) - sample(m, 3, steps=steps, seed=4)).abs().max() < 1e-5


def test_ddim_starts_at_the_last_level():
    s = ddim(NET.recipe)
    s.set_timesteps(10)
    assert s.timesteps[0] == NET.recipe.T - 1 and len(s.timesteps) == 10


OTHERS = [DPMSolverMultistepScheduler, PNDMScheduler, EulerDiscreteScheduler, DDIMScheduler]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_other_schedulers(kind, prediction):
    m = net(prediction)
    s = kind.from_config(m.recipe.schedule().config)
    before = dict(s.config)
    a = sample(m, 4, steps=8, seed=2, scheduler=s)
    assert a.isfinite().all() and torch.equal(a, sample(m, 4, steps=8, seed=2, scheduler=s)) and dict(s.config) == before
    assert (sample(m, 4, steps=8, seed=2, scheduler=s, batch=1) - a).abs().max() < 1e-3
    fresh = kind.from_config(m.recipe.schedule().config)
    fresh.set_timesteps(8)
    x = row_noise(2, range(4), (3, 16, 16), 20)*fresh.init_noise_sigma
    assert (library_loop(m, x, fresh, 8) - a).abs().max() < 1e-5


@pytest.mark.parametrize("eta", [0., 1.])
def test_ancestral_sampling_has_noise_of_its_own_per_row(eta):
    s = DDPMScheduler.from_config(NET.recipe.schedule().config)
    a = sample(NET, 6, steps=8, seed=2, scheduler=s, eta=eta)
    assert torch.equal(a, sample(NET, 6, steps=8, seed=2, scheduler=s, eta=eta))
    assert (sample(NET, 6, steps=8, seed=2, scheduler=s, batch=2) - a).abs().max() < 1e-3
    assert (a - sample(NET, 6, steps=8, seed=3, scheduler=s)).abs().amax((1, 2, 3)).min() > .01


@pytest.mark.parametrize("change,word", [
    (dict(prediction_type="epsilon"), "prediction_type='epsilon'.*v_prediction"),
    (dict(num_train_timesteps=500), "num_train_timesteps=500"),
    (dict(beta_schedule="squaredcos_cap_v2"), "beta_schedule"), (dict(beta_start=1e-3), "beta_start"), (dict(beta_end=.1), "beta_end")])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_a_scheduler_of_another_model_is_refused(kind, change, word):
    with pytest.raises(ValueError, match=f"{kind.__name__} has {word}"):
        sample(NET, 2, steps=3, scheduler=kind.from_config(NET.recipe.schedule().config, **change))


def test_a_flow_scheduler_is_refused():
    with pytest.raises(ValueError, match="FlowMatch"): sample(NET, 1, steps=3, scheduler=FlowMatchEulerDiscreteScheduler())


# ---------------------------------------------------------------- the generator, sizes, bad arguments

def test_steps_can_be_watched():
    steps = list(sample_steps(NET, range(2), 5, seed=1))
    assert [s.step for s in steps] == [1, 2, 3, 4, 5] and all(isinstance(s, Denoised) for s in steps)
    assert steps[0].t == 999 and [s.t for s in steps] == sorted({s.t for s in steps}, reverse=True)
    assert all(s.x0_hat.abs().max() <= 1 for s in steps) and not steps[-1].x.requires_grad
    assert torch.equal(steps[-1].x.clamp(-1, 1), sample(NET, 2, steps=5, seed=1))


def test_batches_tell_of_every_step():
    out = list(sample_batches(NET, 5, steps=3, batch=2))
    assert [None if v is None else len(v) for v in out] == [None]*3 + [2] + [None]*3 + [2] + [None]*3 + [1]


def test_no_images(): assert sample(NET, 0, steps=3).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("kw,error,word", [
    (dict(n=-1), ValueError, "n must"), (dict(n=2.), TypeError, "n must"), (dict(n=True), TypeError, "n must"),
    (dict(steps=0), ValueError, "steps"), (dict(steps=1001), ValueError, "steps"), (dict(steps=2.5), TypeError, "steps"),
    (dict(eta=-.1), ValueError, "eta"), (dict(eta=1.1), ValueError, "eta"), (dict(eta=float("nan")), ValueError, "eta"),
    (dict(seed=-1), ValueError, "seed"), (dict(seed=.5), TypeError, "seed"), (dict(seed=True), TypeError, "seed"),
    (dict(batch=0), ValueError, "batch"), (dict(batch=1.), TypeError, "batch")])
def test_wrong_arguments(kw, error, word):
    with pytest.raises(error, match=word): sample(NET, **{**dict(n=2, steps=2), **kw})


@pytest.mark.parametrize("kw,word", [(dict(n=0, steps=0), "steps"), (dict(n=0, eta=2.), "eta"), (dict(n=0, seed=-1), "seed")])
def test_wrong_arguments_are_seen_without_images(kw, word):
    with pytest.raises(ValueError, match=word): sample(NET, **kw)


def test_a_model_keeps_its_weights_and_mode():
    m = net()
    before = [p.clone() for p in m.parameters()]
    sample(m, 2, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, m.parameters())) and not m.training


def test_half_precision_gives_float32_images():
    x = sample(net().to(torch.bfloat16), 2, steps=3)
    assert x.dtype == torch.float32 and x.isfinite().all()


def test_class_labels_are_refused():
    with pytest.raises(ValueError, match="class labels"): NET.predict(torch.zeros(1, 3, 16, 16), torch.tensor([1]), torch.tensor([1]))


def test_a_timestep_may_be_a_number():
    x = row_noise(0, range(3), (3, 16, 16))
    a = NET.predict(x, torch.tensor([500]*3))
    for t in (500, torch.tensor(500), torch.tensor([500])): assert torch.equal(NET(x, t).sample, a)
    assert torch.equal(NET(x, 500, return_dict=False)[0], a)


# ---------------------------------------------------------------- weights

def shipped(folder, name="two_squares-pure"):
    m = net()
    save_release(folder, name, m.state_dict(), dict(recipe=m.recipe.to_dict(), seed=0, steps=1, images_in_set=4))
    return m


def test_weights_round_trip(tmp_path):
    m, again = shipped(tmp_path), load_pretrained("two_squares", folder=tmp_path)
    assert again.recipe == m.recipe and not again.training and again.manifest["steps"] == 1
    for p, q in zip(m.parameters(), again.parameters()): assert torch.equal(p.half().float(), q) and q.dtype == torch.float32
    assert (sample(again, 2, steps=5) - sample(m, 2, steps=5)).abs().max() < .05


@pytest.mark.parametrize("name", ["", "squares", "two_squares-pure", None])
def test_unknown_names_list_the_known_ones(name, tmp_path):
    with pytest.raises(ValueError, match="sun_shadow, .*two_squares"): load_pretrained(name, folder=tmp_path)


def test_missing_weights_list_what_is_there(tmp_path):
    with pytest.raises(StoreError, match="there are: none"): load_pretrained("two_squares", folder=tmp_path/"gone")
    shipped(tmp_path)
    for kw in (dict(name="two_circles"), dict(name="two_squares", palette="paper"), dict(name="two_squares", palette="sepia")):
        with pytest.raises(StoreError, match="there are: two_squares-pure"): load_pretrained(folder=tmp_path, **kw)


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "gone", "manifest"])
def test_damaged_weights_are_refused_by_name(damage, tmp_path):
    shipped(tmp_path)
    f, j = tmp_path/"two_squares-pure.safetensors", tmp_path/"two_squares-pure.json"
    blob = f.read_bytes()
    if damage == "gone": f.unlink()
    elif damage == "manifest": j.write_text(j.read_text()[:-30])
    else: f.write_bytes(dict(cut=blob[:-9], flip=blob[:-9] + b"\x33" + blob[-8:], foreign=b"PK\3\4" + blob[4:])[damage])
    with pytest.raises(StoreError, match="two_squares-pure"): load_pretrained("two_squares", folder=tmp_path)


def test_weights_of_another_world_are_refused(tmp_path):
    "A file that was renamed: its recipe says what it is."
    shipped(tmp_path)
    for e in ("json", "safetensors"): shutil.copy(tmp_path/f"two_squares-pure.{e}", tmp_path/f"two_circles-paper.{e}")
    with pytest.raises((StoreError, ValueError), match="two_circles"): load_pretrained("two_circles", "paper", tmp_path)


@pytest.mark.parametrize("change", [dict(channels=[8, 16, 16]), dict(layers=2), dict(unknown=1), dict(task=None),
                                    dict(task={"name": "moon"})])
def test_weights_that_do_not_fit_their_recipe_are_refused_by_name(change, tmp_path):
    shipped(tmp_path)
    j = tmp_path/"two_squares-pure.json"
    manifest = json.loads(j.read_text())
    j.write_text(json.dumps(manifest | dict(recipe=manifest["recipe"] | change)))
    with pytest.raises(ValueError, match="two_squares-pure"): load_pretrained("two_squares", folder=tmp_path)


def test_a_model_saved_the_diffusers_way_comes_back(tmp_path):
    NET.save_pretrained(tmp_path)
    again = RuleUNet.from_pretrained(tmp_path).eval()
    assert again.recipe == NET.recipe and torch.equal(sample(again, 2, steps=3), sample(NET, 2, steps=3))


SHIPPED = list_releases(WEIGHTS)
pretrained = pytest.mark.skipif(not SHIPPED, reason=f"no weights in {WEIGHTS.name}/ yet")


@pretrained
@pytest.mark.parametrize("key", SHIPPED or ["none"])
def test_shipped_weights(key):
    name, palette = key.rsplit("-", 1)
    m = load_pretrained(name, palette)
    assert m.recipe.world == get_task(name, palette=palette) and (WEIGHTS/f"{key}.safetensors").stat().st_size <= 6_000_000
    assert {"recipe", "seed", "steps", "images_seen", "revision", "sha256", "hardware", "report"} <= set(m.manifest)
    x = sample(m, 4, steps=10, seed=11)
    assert x.isfinite().all() and x.mean() > .2   # mostly white paper
    assert torch.equal(x, sample(m, 4, steps=10, seed=11))


@pretrained
def test_each_world_has_weights(): assert {k.rsplit("-", 1)[0] for k in SHIPPED} == set(TASKS)


def test_names_exported_exist(): assert all(hasattr(sampling, k) for k in sampling.__all__)
