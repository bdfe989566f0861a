"The network: what it refuses, what 'not given' means, and what survives a recipe, a file and another precision."
import json
from dataclasses import fields

import pytest
import torch
from torch import nn

from rulediff_nb.core import row_noise
from rulediff_nb.sample import Redrawn, load_pretrained
from rulediff_nb.store import save_release
from rulediff_nb.tasks import SunShadow, get_task
from rulediff_nb.train import fit
from rulediff_nb.unet import PUBLISHED_EPOCHS, PRESETS, Condition, Recipe, RuleUNet, check_labels, grow, recipe, unet

torch.set_num_threads(1)
TASK = get_task("two_squares", palette="fixed", size=16)
SMALL = dict(channels=(8, 8, 16), head_dim=8)
T2 = torch.tensor([3, 900])


def net(seed=0, task=TASK, **kw): return unet("laptop", task, seed, **(SMALL | kw)).eval()


def noise(n=2, size=16): return row_noise(0, range(n), (3, size, size))


@torch.no_grad()
def answer(model, y=None, n=2): return model.predict(noise(n, model.recipe.task.size), T2[:1].expand(n) if n != 2 else T2, y)


def same(a, b): return set(a) == set(b) and all(torch.equal(v, b[k]) for k, v in a.items())


# ---------------------------------------------------------------- recipes

@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_survives_json(preset):
    for task in ("sun_shadow_free", SunShadow(size=64, palette="fixed")):
        r = recipe(preset, task, classes=3, lr=1e-4)
        back = Recipe.from_dict(json.loads(json.dumps(r.to_dict())))
        assert back == r and hash(json.dumps(back.to_dict())) and back.task == get_task(task) and back.classes == 3


@pytest.mark.parametrize("change", [dict(channels=(16, 16, 16)), dict(channels=(96, 40, 96), attention=(False, True, False)), dict(head_dim=97)])
def test_a_width_without_room_for_a_head_is_refused(change):
    with pytest.raises(ValueError, match=r"channels must be at least head_dim, \d+, where attention is on, got \(.*attention=\("):
        recipe("laptop", TASK, **change)


def test_the_middle_needs_room_for_a_head_too():
    off = dict(channels=(16, 16), attention=(False, False))
    with pytest.raises(ValueError, match=r"the last of channels must be at least head_dim, 17, .* got \(16, 16\)"): net(**off, head_dim=17)
    assert answer(net(**off, head_dim=16)).isfinite().all()


def test_a_width_that_heads_do_not_divide_computes():
    "64 channels with heads of 48, as in the preset `laptop`, have one head; what it gives is brought back to 64."
    heads = [(m.heads, m.to_q.out_features, m.to_q.in_features) for m in unet("laptop", TASK).modules() if hasattr(m, "to_q")]
    assert set(heads) == {(1, 48, 64), (2, 96, 96)} and answer(unet("laptop", TASK).eval()).isfinite().all()


LATER = dict(backbone="unet", middle="attention")   # fields that came later


def test_every_field_is_stored():
    "Later fields are left out at the values that earlier networks had, so that these keep their hash."
    for r in (PRESETS["published"], PRESETS["laptop"]):
        assert {*r.to_dict(), *LATER} == {f.name for f in fields(Recipe)} and not LATER.keys() & r.to_dict().keys()
    r = recipe("laptop", TASK, **SMALL, middle="none")
    assert r.to_dict()["middle"] == r.network()["middle"] == "none" and Recipe.from_dict(r.to_dict()) == r


DIT = dict(backbone="dit", channels=(16,), attention=(True,), layers=2, head_dim=8)


def test_a_transformer_draws_trains_and_comes_back(tmp_path):
    m = unet("laptop", TASK, 0, **DIT)
    assert answer(m.eval()).shape == (2, 3, 16, 16) and type(m.net).__bases__[0].__name__ == "DiTTransformer2DModel"
    with torch.no_grad(): begin = m.net(torch.ones(1, 12, 8, 8), torch.tensor([5])).sample
    assert not begin.any(), "it begins as the identity"
    x0, losses = TASK.sample(16, 0)[0], []
    for _ in range(2):   # nothing is dropped at random: the same run gives the same losses
        again = unet("laptop", TASK, 0, **DIT)
        losses.append([s.loss for s in fit(again, x0, 4, 3)])
    assert losses[0] == losses[1] and answer(again).isfinite().all()
    save_release(tmp_path, "dit", again.state_dict(), dict(recipe=again.recipe.to_dict()))
    assert (answer(load_pretrained(tmp_path/"dit.safetensors")) - answer(again)).abs().max() < 5e-3   # weights ship in half precision


@pytest.mark.parametrize("change, word", [(dict(channels=(16, 16), attention=(True, True)), "one width"), (dict(attention=(False,)), "one width"),
                                          (dict(head_dim=12), "multiple of head_dim, 12"), (dict(classes=3), "no labels"),
                                          (dict(backbone="mlp"), "backbone must be one of unet, dit"), (dict(middle=None), "middle must be one of")])
def test_a_transformer_that_cannot_be_is_refused(change, word):
    with pytest.raises(ValueError, match=word): recipe("laptop", TASK, **DIT | change)


@pytest.mark.parametrize("middle, blocks, attends", [("attention", 2, True), ("plain", 2, False), ("none", 0, False)])
def test_a_middle_with_and_without_attention(middle, blocks, attends):
    m = net(attention=(False,)*3, middle=middle)
    assert answer(m).isfinite().all() and any(hasattr(b, "to_q") for b in m.modules()) == attends
    assert len(m.net.mid_block.resnets if m.net.mid_block else ()) == blocks


def test_a_recipe_that_lacks_new_fields_gets_their_defaults():
    old = {k: v for k, v in recipe("laptop", TASK).to_dict().items() if k not in ("classes", "min_snr")}
    assert Recipe.from_dict(old) == recipe("laptop", TASK)


@pytest.mark.parametrize("extra", [dict(widht=3), dict(lr_=1, channel=2)])
def test_unknown_fields_are_named(extra):
    with pytest.raises(ValueError, match=f"unknown recipe fields.*{sorted(extra)[0]}.*known"):
        Recipe.from_dict(recipe("laptop", TASK).to_dict() | extra)
    with pytest.raises(ValueError, match="unknown recipe fields"): RuleUNet(recipe("laptop", TASK).to_dict() | extra)
    with pytest.raises(TypeError): recipe("laptop", TASK, **extra)


def test_the_published_lengths():
    assert {k: recipe("published", k).epochs for k in PUBLISHED_EPOCHS} == PUBLISHED_EPOCHS and recipe("laptop", "two_circles").epochs is None


def test_how_it_was_trained_is_not_the_network():
    a, b = recipe("laptop", TASK), recipe("laptop", TASK, lr=1., batch=3, precision="fp32", label_drop=.5)
    assert a.network() == b.network() != recipe("laptop", TASK, patch=1).network()


# ---------------------------------------------------------------- labels

C, K, NONE = (recipe("laptop", TASK, **kw) for kw in (dict(classes=3), dict(conditions=2), {}))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_class_labels_become_int64(dtype):
    y = check_labels(torch.tensor([0, 1, 2], dtype=dtype), 3, C)
    assert y.dtype == torch.int64 and y.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_conditions_become_float32(dtype):
    y = check_labels(torch.tensor([[.5, torch.nan]], dtype=dtype), 1, K)
    assert y.dtype == torch.float32 and y[0, 0] == .5 and y[0, 1].isnan()


def test_nothing_given():
    assert check_labels(None, 2, C).tolist() == [-1, -1] and check_labels(None, 2, K).isnan().all() and check_labels(None, 2, NONE) is None
    assert check_labels(torch.tensor([-1, 2]), 2, C).tolist() == [-1, 2]
    assert check_labels(torch.zeros(0, dtype=torch.int64), 0, C).shape == (0,) and check_labels(torch.zeros(0, 2), 0, K).shape == (0, 2)


@pytest.mark.parametrize("r,y,error,word", [
    (C, torch.tensor([0, 3]), ValueError, r"\[0,3\).*0 to 3"), (C, torch.tensor([-2, 0]), ValueError, "-2 to 0"),
    (C, torch.tensor([0, 10**12]), ValueError, "10{12}"),
    (C, torch.tensor([0., 1.]), ValueError, "integers.*float32"), (C, torch.tensor([True, False]), ValueError, "integers.*bool"),
    (C, torch.tensor([1j, 0]), ValueError, "integers.*complex"), (C, torch.tensor([0]), ValueError, r"\(2,\) integers.*\(1,\)"),
    (C, torch.tensor([[0], [1]]), ValueError, r"\(2,\) integers.*\(2, 1\)"), (C, torch.tensor(1), ValueError, r"got \(\)"),
    (C, [0, 1], TypeError, "tensor, got list"), (C, 1, TypeError, "tensor, got int"),
    (K, torch.zeros(2), ValueError, r"\(2,2\) floats.*\(2,\)"), (K, torch.zeros(2, 3), ValueError, r"\(2, 3\)"),
    (K, torch.zeros(3, 2), ValueError, r"\(3, 2\)"), (K, torch.zeros(2, 2, dtype=torch.int64), ValueError, "floats.*int64"),
    (K, torch.tensor([[0., torch.inf], [0., 0.]]), ValueError, "infinite"),
    (K, torch.tensor([[-torch.inf, torch.nan]]*2), ValueError, "infinite"),
    (K, [[0., 0.]]*2, TypeError, "tensor, got list"),
    (NONE, torch.tensor([0, 1]), ValueError, r"without class labels.*\(2,\)"), (NONE, [0, 1], TypeError, "list")])
def test_labels_that_do_not_fit(r, y, error, word):
    with pytest.raises(error, match=word): check_labels(y, 2, r)
    model = net(classes=r.classes, conditions=r.conditions)
    with pytest.raises(error, match=word): answer(model, y)


@pytest.mark.parametrize("kw,label,none", [
    (dict(classes=3), torch.tensor([2, 0]), torch.tensor([-1, -1])),
    (dict(conditions=2), torch.tensor([[0., .5], [.3, .1]]), torch.full((2, 2), torch.nan))])
def test_dropped_labels_are_not_given_ones(kw, label, none):
    model = net(**kw)
    plain, given = answer(model), answer(model, label)
    assert torch.equal(plain, answer(model, none)) and (given != plain).flatten(1).any(1).all()
    some = label.clone()
    some[1] = none[1]
    mixed = answer(model, some)
    assert torch.allclose(mixed[0], given[0], atol=1e-6) and torch.allclose(mixed[1], plain[1], atol=1e-6)
    assert torch.equal(some[1].isnan(), none[1].isnan())   # the labels that were handed over are left alone


def test_a_row_with_one_number_missing_is_not_given():
    c = Condition(0, 2, 16)
    out = c(torch.tensor([[.1, torch.nan], [torch.nan, .7], [torch.nan, torch.nan], [0., 0.]]))
    assert all(torch.equal(v, c.table.weight[0]) for v in out[:3]) and not torch.equal(out[0], out[3])


@pytest.mark.parametrize("y,rows", [([0, 2, -1], [0, 2, 3]), ([-1, -1], [3]), ([1], [1])])
def test_a_batch_teaches_the_vectors_that_it_names(y, rows):
    c = Condition(3, 0, 16)
    c(torch.tensor(y)).pow(2).sum().backward()
    assert c.table.weight.grad.abs().sum(1).nonzero().flatten().tolist() == rows


def test_missing_numbers_leave_no_nan_in_the_gradient():
    c = Condition(0, 2, 16)
    c(torch.tensor([[.1, torch.nan], [.2, .3]])).pow(2).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in c.parameters())


def test_close_numbers_are_told_apart():
    c = Condition(0, 1, 16)
    y = torch.linspace(-1, 1, 201)[:, None]
    w = c.waves(y)
    d = torch.cdist(w, w) + 9*torch.eye(201)
    assert w.shape == (201, 32) and d.min() > .5


@pytest.mark.parametrize("kw", [dict(classes=2), dict(conditions=1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_labels_work_in_half_precision(kw, dtype):
    model = net(**kw)
    y = torch.tensor([0, -1]) if "classes" in kw else torch.tensor([[.2], [torch.nan]])
    want = answer(model, y)
    with torch.no_grad(): got = model.to(dtype).predict(noise().to(dtype), T2, y)
    assert got.dtype == dtype and (got.float() - want).abs().max() < .1


# ---------------------------------------------------------------- the network

@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [32, 64])
def test_every_preset_runs(preset, size):
    model = unet(preset, SunShadow(size=size)).eval()
    out = answer(model, n=1)
    assert out.shape == (1, 3, size, size) and out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize("kw,size,step", [({}, 20, 8), (dict(channels=(8, 8, 8, 8), attention=(False,)*4), 24, 16), (dict(patch=4), 24, 16),
                                          (dict(patch=1, channels=(8, 8), attention=(False, False)), 17, 2)])
def test_sizes_that_do_not_fit(kw, size, step):
    with pytest.raises(ValueError, match=f"multiple of {step} .*got {size}"): net(task=TASK.with_(size=size), **kw)


def test_channels_last_is_kept():
    model, seen = net(), []
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convs)
    for m in convs: m.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    answer(model)
    assert len(seen) == len(convs) and all(v.is_contiguous(memory_format=torch.channels_last) for pair in seen for v in pair)


def test_called_as_diffusers_calls_it():
    model, x = net(), noise()
    with torch.no_grad():
        whole, parts = model(x, T2).sample, model(x, T2, return_dict=False)
        assert isinstance(parts, tuple) and len(parts) == 1 and torch.equal(parts[0], whole) and torch.equal(model.predict(x, T2), whole)
        one = model(x, 3).sample
        assert torch.equal(one, model(x, torch.tensor(3)).sample) and torch.equal(one, model(x, torch.tensor([3, 3])).sample)


def test_rows_do_not_meet():
    model = net()
    with torch.no_grad(): alone = torch.cat([model.predict(noise()[i:i + 1], T2[i:i + 1]) for i in range(2)])
    assert torch.allclose(alone, answer(model), atol=1e-5)


@pytest.mark.parametrize("kw", [{}, dict(classes=3), dict(conditions=2), dict(betas="cosine"), dict(prediction="epsilon", sigma_data=0.)])
def test_saved_and_loaded(kw, tmp_path):
    model = net(**kw)
    model.save_pretrained(tmp_path)
    back = RuleUNet.from_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert back.recipe == model.recipe and not back.training and torch.equal(back.abar, model.abar)
    assert same(model.state_dict(), back.state_dict())
    assert torch.allclose(answer(back), answer(model), atol=1e-5)
    small = RuleUNet.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert same(small.state_dict(), {k: v.half() for k, v in model.state_dict().items()}) and torch.equal(small.abar, model.abar)


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    net().save_pretrained(tmp_path)
    config = json.loads((tmp_path/"config.json").read_text())
    config["recipe"]["colour"] = "red"
    (tmp_path/"config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown recipe fields.*colour"): RuleUNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16),
                                  lambda m: m.to(torch.bfloat16).float()])
def test_the_schedule_is_never_rounded(cast):
    model, exact = net(), net().abar
    cast(model)
    assert model.abar.dtype == torch.float32 and torch.equal(model.abar, exact) and "abar" not in model.state_dict()
    assert model.to("meta").abar.device.type == "meta"


def test_small_noise_survives_half_precision():
    model, t = net(), torch.tensor([0, 3])
    with torch.no_grad():
        want = model.predict(noise(), t)
        got = model.bfloat16().predict(noise().bfloat16(), t).float()
    assert (got - want).abs().max() < .05*want.abs().max()


def test_grown_attention_is_silent_and_can_learn():
    less, more = net(1, attention=(False, False, False)), net(2, attention=(False, True, True))
    grow(more, less.state_dict())
    assert torch.allclose(answer(more), answer(less), atol=1e-5)
    more.train().predict(noise(), T2).pow(2).sum().backward()
    assert more.net.down_blocks[1].attentions[0].to_out[0].weight.grad.any()


@pytest.mark.parametrize("kw", [dict(channels=(8, 16, 16)), dict(layers=2), dict(patch=1), dict(classes=2)])
def test_weights_of_another_network_are_not_grown(kw):
    small, before = net(**kw), (big := net(2, attention=(False, True, True))).state_dict()
    before = {k: v.clone() for k, v in before.items()}
    with pytest.raises(ValueError, match="another network"): grow(big, small.state_dict())
    assert same(before, big.state_dict())


@pytest.mark.parametrize("change,word", [
    (dict(prediction="epsilon"), "sigma_data"), (dict(classes=3, conditions=2), "not both"), (dict(batch=-3), "batch"), (dict(ema=7.), "ema"),
    (dict(precision="fp99"), "precision")])
def test_recipes_that_cannot_be_are_refused(change, word):
    with pytest.raises(ValueError, match=word): unet("laptop", "two_squares", **change)


# ---------------------------------------------------------------- the training set as scenes

def test_a_loaded_model_knows_the_scenes_that_it_was_trained_on():
    model = load_pretrained("two_squares")
    want, got = model.task.factors(model.manifest["images_in_set"], model.manifest["set_seed"]), model.trained_scenes
    assert isinstance(got, model.task.Factors) and len(got.rgb) == 2000
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and torch.equal(model.task.render(got)[:5], model.trained_on[:5])


def test_images_alone_have_no_scenes():
    model, x0 = net(), TASK.sample(4, 3)[0]
    assert model.trained_scenes is None
    for known in (x0, lambda: x0):
        model.trained_on = known
        assert model.trained_scenes is None and model.trained_on is x0


def test_another_training_set_takes_the_scenes_place():
    model = load_pretrained("two_squares")
    assert model.trained_scenes is not None
    for x0 in (model.task.sample(4, 3)[0], None):
        model.trained_on = x0
        assert model.trained_scenes is None and model.trained_on is x0
    model.trained_on = Redrawn(model.task, 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.trained_scenes, model.task.factors(4, 3)))
