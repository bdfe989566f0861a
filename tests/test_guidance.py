"The study of guidance: what it chooses, compares and counts, on rows that are made up."
import math

import guidance
import pytest
import torch
from guidance import FILTERS, GUIDES, PULLS, Setting, best, chosen, compared


def row(method, scale, gap, seed=100, when="all", gradients=24., **more):
    said = dict(task="two_squares", palette="fixed", method=method, scale=scale, when=when, seed=seed, images=8, rule_gap=gap)
    return said | dict(gradients=gradients, cpu_seconds=2., marginals=.05, marginals_real_high=.07) | more


SWEPT = [row("none", 0., .3, gradients=0.), row("classifier", 1., .2), row("classifier", 4., .1, when="high"), row("oracle", 1., .05),
         row("shuffled labels", 2., .29), row("classifier-free", 0., .01, gradients=0.), row("classifier-free", 2., .2, gradients=0.),
         row("classifier, 250 steps", 2., .02), row("filter: verdict", 1., .01, gradients=0.)]


def test_best_settings_are_those_of_the_sweep():
    got = list(best(SWEPT, "two_squares", "fixed"))
    assert got == [Setting("classifier", 4., "high"), Setting("oracle", 1.), Setting("shuffled labels", 4., "high"),
                   Setting("classifier-free", 2.)]   # not scale 0, which pushes nothing; no filter; controls as the classifier
    assert not list(best(SWEPT, "two_circles", "fixed"))


@pytest.mark.parametrize("beyond", [.2, ""])
def test_where_coverage_is_lost_the_best_that_keeps_it_is_measured_too(beyond):
    rows = [row("none", 0., .3, gradients=0., marginals=.09), row("classifier", 2., .2, marginals=.08),
            row("classifier", 4., .1, marginals=beyond), row("classifier", 1., .25), row("shuffled labels", 2., .29),
            row("oracle", 1., .05, marginals=beyond)]
    both = [Setting("classifier", 4.), Setting("classifier", 2.)]
    got = list(best(rows, "two_squares", "fixed"))
    assert got == [*both, *(s._replace(method="shuffled labels") for s in both), Setting("oracle", 1.)]   # no other oracle was tried


def test_gains_are_shares_of_the_oracle_s_on_the_same_images():
    rows = [row("none", 0., .3, 1), row("classifier", 4., .2, 1, cpu_seconds=3.), row("oracle", 1., .1, 1), row("classifier", 4., .2, 2)]
    got = list(compared(rows))
    assert [r["relative"] for r in got[:3]] == [1., 1.5, 1.] and math.isnan(got[3]["relative"]) and math.isnan(got[3]["of_oracle"])
    assert torch.allclose(torch.tensor([r["of_oracle"] for r in got[:3]]), torch.tensor([0., .5, 1.]))


def test_filters_choose_among_the_pool():
    x = torch.arange(16.).view(16, 1, 1, 1).expand(16, 3, 2, 2)
    scorers = {"filter: verdict": lambda x: (x[:, 0, 0, 0] % 3 == 0).float(),
              "filter: ruler, best of": lambda x: -(x[:, 0, 0, 0] % 4 - 1).abs()}
    none, verdict, two, four = (chosen(s, x, scorers, 4) for s in FILTERS)
    assert none[0].tolist() == [0, 1, 2, 3] and none[1] == 4
    assert verdict[0].tolist() == [0, 3, 6, 9] and verdict[1] == 10
    assert two[0].tolist() == [1, 2, 5, 6] and two[1] == 8 and four[0].tolist() == [1, 5, 9, 13] and four[1] == 16
    with pytest.raises(RuntimeError, match="raise POOL"): chosen(FILTERS[1], x, scorers, 8)


def test_rows_of_other_weights_are_measured_again():
    rows = [row("none", 0., .3, weights=guidance.shipped("two_squares", "fixed"), steps=guidance.STEPS)]
    assert guidance.current(rows) == rows
    assert not guidance.current([rows[0] | dict(weights="0"*12)]) and not guidance.current([rows[0] | dict(steps=50)])


def test_seeds_of_the_table_are_not_those_of_the_sweep_nor_of_the_shipped_networks():
    assert not set(guidance.SWEEP[1]) & set(guidance.TABLE[1]) and 0 not in guidance.TABLE[1]


def test_every_method_can_be_made():
    others = {"oracle", "classifier-free"}
    assert {s.method for s in GUIDES} == set(PULLS) | others and {s.when for s in GUIDES} <= set(guidance.COURSES)
