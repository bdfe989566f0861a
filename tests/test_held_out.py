"Denoising error of training images over that of fresh ones: by heart near 0, untrained near 1, wrong input refused."
import pytest
import torch

from rulediff_nb.sample import ExactDenoiser
from rulediff_nb.study import held_out_ratio
from rulediff_nb.tasks import get_task
from rulediff_nb.unet import unet

torch.set_num_threads(1)
TASK = get_task("two_squares", size=16)
X = TASK.sample(64, 0)[0]
NET = unet("laptop", TASK, 0, channels=(8, 8, 16), head_dim=8).eval()


def test_by_heart_and_untrained():
    known = held_out_ratio(ExactDenoiser(X, NET.recipe), None, 48)
    blank = held_out_ratio(NET, X, 64)
    assert list(known) == ["sigma", "train", "held_out", "ratio", "low", "high"] and list(known.sigma) == [.2, .5, 1., 2., 5.]
    assert known.ratio.iloc[0] < .01 and (known.ratio < .95).all() and known.ratio.is_monotonic_increasing
    assert (blank.ratio - 1).abs().max() < .15 and ((blank.low < 1) & (1 < blank.high)).all()
    assert ((known.low <= known.ratio) & (known.ratio <= known.high)).all()


def test_the_ratio_is_of_errors_and_has_a_seed():
    said, again, other = (held_out_ratio(NET, X, 16, seed=s) for s in (3, 3, 4))
    assert said.equals(again) and not said.equals(other) and (said.ratio - said.train/said.held_out).abs().max() < 1e-9


def test_a_model_without_a_known_training_set_is_refused():
    with pytest.raises(ValueError, match="training set"): held_out_ratio(NET)
    with pytest.raises(ValueError, match="n"): held_out_ratio(NET, X, 1)
