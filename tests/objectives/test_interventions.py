from dataclasses import asdict

import pytest

from entropy_pl.objectives import INTERVENTIONS, WITHOUT_MOMENTUM, LossSettings, counterfactual_names, intervened

BASE = LossSettings("dapo", clip_low=0.1, clip_high=0.15, kl_coefficient=0.02)

# Figures of the papers that each name is from.
CHANGES = {
    "entropy_bonus": {"entropy_coefficient": 0.01},
    "clip_higher": {"clip_high": 0.28},
    "clip_cov": {"clip_cov_fraction": 0.0002, "clip_cov_bounds": (1.0, 5.0)},
    "kl_cov": {"kl_cov_fraction": 0.002, "kl_cov_coefficient": 1.0},
    "positive_only": {"advantage_sign": "positive"},
    "negative_only": {"advantage_sign": "negative"},
    "no_momentum": {},
    "unchanged": {},
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_name_is_one_change(name):
    assert asdict(intervened(BASE, name)) == asdict(BASE) | CHANGES[name]


def test_names():
    assert counterfactual_names() == list(CHANGES)
    assert WITHOUT_MOMENTUM == "no_momentum"
    assert all("arXiv" in one.source and one.description for one in INTERVENTIONS.values())


def test_bad_names():
    with pytest.raises(ValueError, match=r"expected an intervention out of .*'clp_cov'; did you mean 'clip_cov'\?"):
        intervened(BASE, "clp_cov")
    with pytest.raises(ValueError, match="expected Clip-Cov or KL-Cov, got both"):
        intervened(LossSettings(kl_cov_fraction=0.1), "clip_cov")
