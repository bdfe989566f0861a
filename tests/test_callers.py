"Other people's programs: their global settings change none of our numbers, ours change nothing of theirs, and what was promised is saved."
import hashlib
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from rulediff_nb.classifier import RuleClassifier, classifier, fit_pixels, load_classifier, noised_outputs, pixel_classifier
from rulediff_nb.core import check_images, explore, own_settings, progress, to_bytes
from rulediff_nb.features import layout
from rulediff_nb.guide import Oracle, guided
from rulediff_nb.metrics import measure, real_images, rule_report
from rulediff_nb.sample import ExactDenoiser, load_pretrained, sample, sample_steps
from rulediff_nb.study import Denoiser
from rulediff_nb.tasks import SunShadow, TwoCircles
from rulediff_nb.train import fit, train_steps
from rulediff_nb.unet import Recipe, RuleUNet, unet

T, S = TwoCircles(), SunShadow(heights="free", palette="random")
SMALL = dict(channels=(16, 16), attention=(False, True), head_dim=16, warmup=2)


def bits(*values):
    "A hash of dtypes and bits."
    h = hashlib.sha256()
    def add(v):
        if isinstance(v, torch.Tensor): h.update(str(v.dtype).encode() + np.ascontiguousarray(v.detach().numpy()).tobytes())
        elif isinstance(v, (tuple, list)): [add(w) for w in v]
        else: h.update(repr(v).encode())
    add(values)
    return h.hexdigest()


@contextmanager
def put(set_, value, back):
    set_(value)
    try: yield
    finally: set_(back)


SETTINGS = dict(
    float64=lambda: put(torch.set_default_dtype, torch.float64, torch.float32),
    half=lambda: put(torch.set_default_dtype, torch.float16, torch.float32),
    meta=lambda: put(torch.set_default_device, "meta", None), within_meta=lambda: torch.device("meta"), no_grad=torch.no_grad,
    inference=torch.inference_mode, autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    products=lambda: put(torch.set_float32_matmul_precision, "medium", "highest"), no_onednn=lambda: torch.backends.mkldnn.flags(enabled=False),
    deterministic=lambda: put(torch.use_deterministic_algorithms, True, False), numpy_raises=lambda: np.errstate(all="raise"))


@pytest.fixture(scope="module")
def made():
    return dict(x=T.sample(24, 0)[0], s=S.sample(12, 3)[0], y=torch.zeros(24, dtype=torch.long), m=load_pretrained("two_circles"),
                c=load_classifier("two_circles"))


OPS = dict(
    draw=lambda k: [S.sample(3, 1), T.sample(3, 1), S.sample(3, 1, violate="free")],
    read=lambda k: [tuple(S.features(k["s"])), tuple(T.features(k["x"]))],
    report=lambda k: str(rule_report(T, k["x"], draws=20, train=k["x"]).to_dict()),
    network=lambda k: list(unet("laptop", T, classes=2, **SMALL).state_dict().values()) + list(classifier("laptop", T).state_dict().values()),
    load=lambda k: list(load_pretrained("two_circles").state_dict().values()),
    train=lambda k: [s.loss for s in fit(unet("laptop", T, **SMALL), k["x"], 3)],
    labels=lambda k: [s.loss for s in fit(unet("laptop", T, classes=2, precision="fp32", **SMALL), k["x"], 2, y=k["y"])],
    pixels=lambda k: list(fit_pixels(pixel_classifier("resnet8"), k["x"], k["y"], 1)),
    sample=lambda k: [sample(k["m"], 2, 2, 1.), sample(ExactDenoiser(k["x"], k["m"].recipe), 2, 2)],
    guide=lambda k: [sample(guided(k["m"], k["c"], 2.), 2, 2), sample(guided(k["m"], Oracle(T), 1.), 2, 2)],
    classify=lambda k: noised_outputs(k["c"], k["x"], 300))


@pytest.fixture(scope="module")
def plain(made): return {name: bits(f(made)) for name, f in OPS.items()}


def state():
    return (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision(), torch.get_num_threads())


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_callers_setting_changes_no_bit_and_stays(setting, made, plain):
    layout.cache_clear(), real_images.cache_clear()
    with SETTINGS[setting]():
        before = state()
        found = {name: bits(f(made)) for name, f in OPS.items()}
        assert state() == before
    assert [k for k in OPS if found[k] != plain[k]] == []


def test_what_was_made_in_inference_mode_serves_afterwards(made):
    layout.cache_clear()
    with torch.inference_mode():
        T.features(made["x"][:2])
        inside, own = load_classifier("two_circles"), T.sample(4, 0)[0]
    T.features(own.clone().requires_grad_()).r2.sum().backward()
    assert sample(guided(made["m"], inside, 2.), 2, 2).isfinite().all()
    assert next(fit(unet("laptop", T, **SMALL), own, 1)).loss > 0


def test_settings_hold_between_the_steps_of_a_generator(made):
    with torch.no_grad():
        for _ in fit(unet("laptop", T, **SMALL), made["x"], 2): assert not torch.is_grad_enabled()
    for _ in sample_steps(made["m"], range(2), 2): assert torch.is_grad_enabled()


def test_own_settings_end_with_an_error():
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(KeyError), own_settings(): raise KeyError
        assert torch.get_default_dtype() == torch.float64
    finally: torch.set_default_dtype(torch.float32)


def test_accelerate_keeps_the_callers_state(made, monkeypatch):
    mine = Accelerator(mixed_precision="no", cpu=True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = [s.loss for s in fit(unet("laptop", T, **SMALL), made["x"], 3)]
    assert mine.mixed_precision == "no" and Accelerator(mixed_precision="no", cpu=True).mixed_precision == "no"
    monkeypatch.undo()
    assert found == [s.loss for s in fit(unet("laptop", T, **SMALL), made["x"], 3)]


def test_looking_at_trainings_leaves_the_callers_state():
    small = (("channels", (16, 16)), ("attention", (False, False)), ("head_dim", 16))
    for precision in ("fp32", "bf16"):
        Denoiser("two_circles", steps=4, n=16, changes=(*small, ("precision", precision))).check(torch.device("cpu"))
    assert Accelerator(mixed_precision="no", cpu=True).mixed_precision == "no"


def test_another_way_of_sharing_is_refused(made, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="ACCELERATE_USE_FSDP"): next(fit(unet("laptop", T, **SMALL), made["x"], 1))


BAD = dict(warmup=-5, clip=-1., min_snr=-1., label_drop=2., lr=float("nan"), beta_end=2., beta_start=-1., classes=-1, noise_mean=float("inf"),
           patch=0, channels=(), T=1, layers=0, head_dim=0, batch=0, ema=1., noise_std=-1., sigma_data=-1., weight_decay=float("inf"), conditions=-1,
           betas="none", prediction="none", precision="fp64", stratified=1, attention=(True,), epochs=0)


@pytest.mark.parametrize("field", BAD)
def test_every_field_of_a_recipe_has_a_range(field):
    with pytest.raises(ValueError, match=field): Recipe(**{field: BAD[field]})


@pytest.mark.parametrize("part", ["conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out"])
def test_frozen_parts_train_stay_and_resume(part, made, tmp_path):
    "A frozen first layer once ended the interpreter: torch's group norm has no backward pass there."
    def net():
        m = unet("laptop", T, **SMALL)
        getattr(m.net, part).requires_grad_(False)
        return m
    whole, before = net(), [p.clone() for p in getattr(net().net, part).parameters()]
    list(fit(whole, made["x"], 4))
    for s in train_steps(net(), made["x"], tmp_path, 4):
        if s.step == 2: break
    again = net()
    list(train_steps(again, made["x"], tmp_path, 4))
    assert bits(list(whole.state_dict().values())) == bits(list(again.state_dict().values()))
    assert bits(before) == bits(list(getattr(again.net, part).parameters()))


def test_a_frozen_classifier_trains(made):
    c = classifier("laptop", T, channels=(8, 8, 8))
    c.first.requires_grad_(False)
    c.features(made["x"][:4], 100).sum().backward()


@pytest.mark.parametrize("change, said", [
    (lambda m: m.requires_grad_(False), "frozen"), (lambda m: m.half(), "float32"), (lambda m: m.to("meta"), "meta"),
    (lambda m: setattr(m.net, "conv_out", torch.nn.Sequential(torch.nn.Dropout(.1), m.net.conv_out)), "drops at random"),
    (lambda m: setattr(m.net, "conv_norm_out", torch.nn.BatchNorm2d(16)), "running statistics")])
def test_a_network_that_cannot_be_trained_or_resumed_is_refused(change, said, made):
    m = unet("laptop", T, **SMALL)
    change(m)
    with pytest.raises(ValueError, match=said): next(fit(m, made["x"], 1))


SCRIPT = """
import sys, os, signal
from rulediff_nb.tasks import TwoCircles
from rulediff_nb.train import train_steps
from rulediff_nb.unet import unet
t = TwoCircles()
run = train_steps(unet('laptop', t, channels=(16, 16), attention=(False, False), head_dim=16), t.sample(16, 0)[0], sys.argv[1], 500)
for s in run:
    if s.step == 5: break
"""
ENDS = dict(end="", exit="sys.exit()", error="1/0", term="os.kill(os.getpid(), signal.SIGTERM)", interrupt="os.kill(os.getpid(), signal.SIGINT)")


@pytest.mark.parametrize("how", ENDS)
def test_a_run_left_open_is_saved_at_any_end(how, tmp_path):
    p = subprocess.run([sys.executable, "-c", SCRIPT + ENDS[how], tmp_path], capture_output=True, text=True)
    assert (tmp_path/"checkpoint.safetensors").exists() and "Exception ignored" not in p.stderr
    assert p.returncode == dict(end=0, exit=0, error=1, term=143, interrupt=-signal.SIGINT)[how]


def test_two_interrupts_in_a_step_lose_no_step(tmp_path, made):
    run, seen = train_steps(unet("laptop", T, **SMALL), made["x"], tmp_path, 500), 0
    with pytest.raises(KeyboardInterrupt):
        for s in run:
            seen = s.step
            if seen == 3: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): run.close() or signal.raise_signal(signal.SIGINT)
    assert next(train_steps(unet("laptop", T, **SMALL), made["x"], tmp_path, 500)).step == seen + 1


def test_term_is_the_callers_again(tmp_path, made):
    before = signal.getsignal(signal.SIGTERM)
    run = train_steps(unet("laptop", T, **SMALL), made["x"], tmp_path, 5)
    next(run), run.close()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("make, net", [(lambda: unet("laptop", T, **SMALL), RuleUNet), (lambda: load_pretrained("two_squares"), RuleUNet),
                                       (lambda: classifier("laptop", T, channels=(8, 8, 8)), RuleClassifier),
                                       (lambda: load_classifier("two_squares"), RuleClassifier)])
def test_diffusers_round_trips(make, net, tmp_path):
    m = make()
    assert net.from_config(m.config).recipe == m.recipe
    EMAModel(m.parameters(), model_cls=net, model_config=m.config).save_pretrained(tmp_path/"ema")
    m.save_pretrained(tmp_path/"own")
    again = net.from_pretrained(tmp_path/"own")
    assert again.recipe == m.recipe and bits(list(again.state_dict().values())) == bits(list(m.state_dict().values()))


PALE = torch.linspace(.05, 1, 9*3*32*32).view(9, 3, 32, 32)
DOORS = dict(report=lambda: rule_report(T, PALE, draws=2), train=lambda: rule_report(T, T.sample(9, 0)[0], draws=2, train=PALE),
             features=lambda: T.features(PALE), measure=lambda: measure("two_circles", PALE), check=lambda: check_images(PALE),
             bytes=lambda: to_bytes(PALE), partial=partial(measure, T, PALE))


@pytest.mark.parametrize("door", DOORS)
def test_a_warning_of_pale_images_names_the_callers_line(door):
    with pytest.warns(UserWarning, match="as images in 0..1 do") as heard: DOORS[door]()
    f = DOORS[door].__code__.co_firstlineno if door != "partial" else None
    assert {w.filename for w in heard} == {__file__} and (f is None or abs(heard[0].lineno - f) <= 2)


@pytest.mark.parametrize("test", [True, False])
@pytest.mark.parametrize("values", [[(0, 10), (10, 20)], [torch.zeros(2), torch.ones(2)], [None, 1], [1], ["a", "a"], [{}, []], np.arange(3),
                                    range(2)])
def test_explore_takes_the_same_values_live_and_under_test(values, test, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1") if test else monkeypatch.delenv("IN_TEST", raising=False)
    seen = []
    explore(lambda k: seen.append(k), k=values)
    assert str(seen[0]) == str(values[0])


@pytest.mark.parametrize("test", [True, False])
@pytest.mark.parametrize("values", [{1, 2}, iter([1]), 3, "ab", []])
def test_explore_refuses_the_same_values_live_and_under_test(values, test, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1") if test else monkeypatch.delenv("IN_TEST", raising=False)
    with pytest.raises(ValueError, match="'k'"): explore(lambda k: None, k=values)


def test_progress_without_a_stream(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress(range(3))) == [0, 1, 2]


@pytest.mark.parametrize("rows, error", [([], ValueError), ([1.5], TypeError), ([-1], ValueError)])
def test_rows_that_are_none(rows, error, made):
    with pytest.raises(error, match="row"): next(sample_steps(made["m"], rows, 1))


def test_the_largest_seed_serves(made): assert rule_report(T, made["x"], draws=5, seed=2**63 - 1).rule_gap < .01
