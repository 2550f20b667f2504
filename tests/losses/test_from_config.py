"""A run's loss from its settings."""

from __future__ import annotations

import pytest

from fastclr.config import ConfigError, LossConfig
from fastclr.losses import LOSSES, MarginTriplet, NTLogistic, NTXent, from_config

SETTINGS = [
    LossConfig(),
    LossConfig(temperature=0.5, normalize=False, exchange="ring"),
    LossConfig("nt_logistic", temperature=0.2),
    LossConfig("nt_logistic", semi_hard=True, negatives="other_view"),
    LossConfig("margin_triplet"),
    LossConfig("margin_triplet", margin=0, semi_hard=True, exchange="ring"),
]


@pytest.mark.parametrize("config", SETTINGS)
def test_every_setting_arrives(config):
    assert config.problems() == []
    loss = from_config(config)
    assert type(loss) is LOSSES[config.name]
    assert loss.options == {
        "negatives": config.negatives,
        "exchange": config.exchange,
        "equal_ranks": True,
    }
    if isinstance(loss, MarginTriplet):
        margin = 0.8 if config.margin is None else config.margin
        assert (loss.margin, loss.semi_hard) == (margin, config.semi_hard)
    if isinstance(loss, NTLogistic):
        assert (loss.temperature, loss.semi_hard) == (config.temperature, config.semi_hard)
    if isinstance(loss, NTXent):
        assert (loss.temperature, loss.normalize) == (config.temperature, config.normalize)


def test_each_loss_has_settings_here():
    assert {config.name for config in SETTINGS} == set(LOSSES)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="loss 'simclr' is unknown: choose from nt_xent, nt_log"):
        from_config(LossConfig("simclr"))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (LossConfig(temperature=0), "loss.temperature is 0: give 0 < t <= 100."),
        (LossConfig(temperature=float("nan")), "loss.temperature is nan: give 0 < t <= 100."),
        (LossConfig(temperature=101), "loss.temperature is 101: give 0 < t <= 100."),
        (
            LossConfig("margin_triplet", margin=-0.1),
            "loss.margin is -0.1: cosines differ by 0 to 2.",
        ),
        (LossConfig("margin_triplet", margin=2.1), "loss.margin is 2.1: cosines differ by 0 to 2."),
        (LossConfig(margin=0.4), "loss.margin does nothing for nt_xent: leave it out."),
        (
            LossConfig("nt_logistic", margin=0.4),
            "loss.margin does nothing for nt_logistic: leave it out.",
        ),
        (LossConfig(semi_hard=True), "loss.semi_hard does nothing for nt_xent: leave it out."),
        (
            LossConfig("margin_triplet", normalize=False),
            "loss.normalize off does nothing for margin_triplet: leave it out.",
        ),
    ],
)
def test_what_cannot_work_is_said(config, problem):
    assert config.problems() == [problem]


def test_all_problems_are_said_at_once():
    config = LossConfig(temperature=-1, margin=3, semi_hard=True)
    assert len(config.problems()) == 4
