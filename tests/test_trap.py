"The blunt ruler on hand-made pictures, bad input, and the crop's own random numbers."
import math
import sys

import numpy as np
import pytest
import torch

from rulediff_nb.core import to_bytes
from rulediff_nb.tasks import TASKS, Task
from rulediff_nb.trap import Choices, blunt_read, crop_and_decode, crop_box, cropped, enlarged, line_fit, outlines, same_bin

YELLOW, BLUE, GREY = (1., 1., -1.), (-1., -1., 1.), (-.2, -.2, -.2)


def picture(*boxes):
    "One white image of 32 pixels with rectangles (top, left, height, width, colour) of whole pixels."
    x = torch.ones(1, 3, 32, 32)
    for top, left, h, w, rgb in boxes: x[0, :, top:top + h, left:left + w] = torch.tensor(rgb)[:, None, None]
    return x


SCENES = {  # task -> picture, a and b as the thresholds must read them at 128 pixels
    "perspective": (picture((8, 4, 16, 4, YELLOW), (12, 20, 8, 4, BLUE)), 16*64/128**2, 80*32/128**2),
    "two_squares": (picture((2, 3, 8, 8, YELLOW), (18, 12, 12, 12, BLUE)), 1.5*32/128, 48/128),
    "sun_shadow": (picture((4, 4, 4, 4, YELLOW), (20, 14, 8, 4, BLUE), (28, 16, 3, 8, GREY)), 41*32/128**2, 40*57/128**2)}


@pytest.mark.parametrize("name", SCENES)
def test_whole_pixels_are_read_as_they_are(name):
    x, a, b = SCENES[name]
    r = blunt_read(TASKS[name], x)
    assert r.detected.all() and r.a.item() == pytest.approx(a) and r.b.item() == pytest.approx(b)


@pytest.mark.parametrize("choice,a,b", [(dict(shadow_from=0.), 41*32, 32*57), (dict(shadow_from=1.), 41*32, 24*57),
                                        (dict(sun_from=-1.), 33*32, 40*57), (dict(foot=1.), 41*44, 40*57)])
def test_a_choice_moves_the_end_that_it_names(choice, a, b):
    r = blunt_read(TASKS["sun_shadow"], SCENES["sun_shadow"][0], Choices(**choice))
    assert r.a.item()*128**2 == pytest.approx(a) and r.b.item()*128**2 == pytest.approx(b)


def test_the_mirror_image_reads_nearly_the_same():
    x = SCENES["sun_shadow"][0]
    one, two = blunt_read(TASKS["sun_shadow"], x), blunt_read(TASKS["sun_shadow"], x.flip(3))
    assert abs(one.a - two.a)*128**2 <= 2*32 + 1e-9 and one.b == two.b   # an outline runs through pixel centres, cut to whole pixels


def test_discs_are_read_to_a_few_pixels_of_the_enlarged_image():
    task = TASKS["two_circles"]
    f = task.factors(50, seed=0)
    f = f._replace(rgb=torch.tensor([[1., 1., 0.], [0., 0., 1.]]).expand(50, -1, -1))
    r = blunt_read(task, task.render(f))
    assert r.detected.double().mean() > .9 and (r.b[r.detected]*128 % 1 == 0).all()
    off = ((r.b - f.r2)*128)[r.detected]
    assert off.abs().median() < 4 and off.abs().max() > .5   # blunt, but not lost


def test_orange_falls_through():
    "The named colours leave out hues 11 to 19: a warm object there is not an object."
    orange = (1., .0, -1.)
    r = blunt_read(TASKS["two_squares"], picture((2, 3, 8, 8, orange), (18, 12, 12, 12, BLUE)))
    assert not r.detected.any() and r.a.isnan().all() and r.b.isnan().all()


@pytest.mark.parametrize("name", ["two_circles", "two_squares"])
def test_a_third_object_is_refused(name):
    two = (2, 3, 8, 8, YELLOW), (18, 12, 12, 12, BLUE)
    assert blunt_read(TASKS[name], picture(*two)).detected.all()
    assert not blunt_read(TASKS[name], picture(*two, (2, 20, 8, 8, (-1., -1., -1.)))).detected.any()


@pytest.mark.parametrize("name", [n for n in TASKS if n != "sun_shadow_free"])
@pytest.mark.parametrize("value", [1., -1., math.nan])
def test_nothing_is_found_in_nothing(name, value):
    assert not blunt_read(TASKS[name], torch.full((2, 3, 32, 32), value)).detected.any()


@pytest.mark.parametrize("name", TASKS)
def test_no_images_give_no_rows(name):
    r = blunt_read(TASKS[name], torch.ones(0, 3, 32, 32))
    assert len(r.a) == len(r.b) == len(r.detected) == 0
    assert crop_and_decode(torch.ones(0, 3, 32, 32), 0).shape == (0, 3, 32, 32)


def test_a_world_without_a_reader_is_named():
    class SixthWorld(Task): pass
    with pytest.raises(TypeError, match="SunShadow, Perspective, TwoCircles, TwoSquares, got SixthWorld"):
        blunt_read(SixthWorld(), torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize("bad,error", [(torch.ones(1, 3, 16, 16), ValueError), (torch.ones(3, 32, 32), ValueError),
                                       (torch.full((1, 3, 32, 32), 255.), ValueError),
                                       (torch.ones(1, 3, 32, 32, dtype=torch.uint8), TypeError), ([1.], TypeError)])
def test_bad_images_are_refused(bad, error):
    with pytest.raises(error, match="images must "): blunt_read(TASKS["two_circles"], bad)


def test_missing_opencv_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"OpenCV.*dev extra.*rulediff_nb\[dev\]"):
        blunt_read(TASKS["two_circles"], torch.ones(1, 3, 32, 32))


def test_outlines_come_largest_first_and_not_below_the_limit():
    hsv = enlarged(to_bytes(picture((2, 2, 4, 4, BLUE), (12, 12, 8, 8, BLUE), (28, 28, 1, 1, BLUE)))[0])
    blue = [((90, 50, 20), (130, 255, 255))]
    assert [len(outlines(hsv, blue, least)) for least in (0, 50, 500, 5000)] == [3, 2, 1, 0]
    assert outlines(hsv, blue)[0].min() == 48


def test_a_crop_depends_on_seed_and_row_alone():
    x = TASKS["two_squares"].sample(6, seed=0)[0]
    whole = crop_and_decode(x, 3)
    assert torch.equal(whole[:2], crop_and_decode(x[:2], 3))
    changed = x.clone()
    changed[0] = 1
    assert torch.equal(whole[1:], crop_and_decode(changed, 3)[1:])
    assert not torch.equal(whole, crop_and_decode(x, 4))
    same = cropped(x[:1].expand(6, -1, -1, -1), 3)
    assert not torch.equal(same[0], same[1])


def test_crops_stay_inside_and_in_range():
    boxes = [crop_box(np.random.default_rng(i), 32) for i in range(500)]
    for top, left, h, w in boxes:
        assert min(top, left) >= 0 and top + h <= 32 and left + w <= 32
        assert .75*32**2 < h*w <= 32**2 and .7 < w/h < 1.43
    assert len(set(boxes)) > 100


def test_decoding_is_clamped_and_keeps_white_white():
    x = torch.ones(2, 3, 32, 32)
    x[1] = -1.
    out = crop_and_decode(x, 0)
    assert (out[0] == 1).all() and (out[1] == -1).all() and out.dtype == x.dtype
    grey = crop_and_decode(torch.zeros(1, 3, 32, 32), 0)[0, :, 0, 0]
    assert torch.allclose(grey, torch.tensor([(.5 - .485)/.229, (.5 - .456)/.224, (.5 - .406)/.225]), atol=1e-6)


def test_a_line_is_found_and_its_r2_is_about_itself():
    a = torch.linspace(.1, .4, 50)
    assert line_fit(a, 2*a + .1) == pytest.approx((2., .1, 1.))
    assert line_fit(a, -a).r2 == pytest.approx(1.)


@pytest.mark.parametrize("a,b", [([], []), ([.1], [.1]), ([.1, .1], [.1, .2]), ([.1, math.nan], [.1, .2]), ([.1, .2], [.1])])
def test_no_line_through_too_little(a, b):
    with pytest.raises(ValueError): line_fit(torch.tensor(a), torch.tensor(b))


def test_bins():
    a = torch.tensor([.01, .049, .06, .30])
    assert same_bin(a, a) == 1 and same_bin(a, a + .05) == 0
    assert same_bin(a, torch.tensor([.049, .051, .09, .26])) == .5
    assert math.isnan(same_bin(a[:0], a[:0]))
