"""Tests for lora_from_scratch/config.py."""

import copy
import math
from dataclasses import FrozenInstanceError

import pytest

from lora_from_scratch import LoRAConfig


def test_defaults_are_those_of_the_book():
    config = LoRAConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.0)
    assert config.target_modules == "all-linear"
    assert not config.use_rslora
    assert not config.use_dora
    assert config.modules_to_save is None
    assert config.init_lora_weights is True


@pytest.mark.parametrize("r", [0, -1, 2.0, True, "8", None])
def test_a_rank_that_is_no_positive_int_is_an_error(r):
    with pytest.raises(ValueError, match="r must be an int of at least 1"):
        LoRAConfig(r=r)


@pytest.mark.parametrize(
    "alpha", [math.nan, math.inf, -math.inf, 0, -16, True, "16", None]
)
def test_an_alpha_that_is_not_positive_and_finite_is_an_error(alpha):
    with pytest.raises(ValueError, match="lora_alpha must be a positive"):
        LoRAConfig(lora_alpha=alpha)


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, math.nan, "0.1"])
def test_a_dropout_outside_its_range_is_an_error(dropout):
    with pytest.raises(ValueError, match=r"lora_dropout must be in \[0, 1\)"):
        LoRAConfig(lora_dropout=dropout)


@pytest.mark.parametrize("targets", ["", [], [""], [3]])
def test_empty_targets_are_an_error(targets):
    with pytest.raises(ValueError, match="target_modules must"):
        LoRAConfig(target_modules=targets)


def test_a_string_for_modules_to_save_is_an_error():
    with pytest.raises(ValueError, match="got the string 'score'"):
        LoRAConfig(modules_to_save="score")


def test_patterns_are_checked_and_name_the_key():
    with pytest.raises(ValueError, match=r"rank_pattern\['c_fc'\] .* got 0"):
        LoRAConfig(rank_pattern={"c_fc": 0})
    with pytest.raises(ValueError, match=r"alpha_pattern\['c_fc'\] .* nan"):
        LoRAConfig(alpha_pattern={"c_fc": math.nan})


def test_dora_does_not_combine_with_pissa():
    assert LoRAConfig(use_dora=True).use_dora
    with pytest.raises(ValueError, match="use_dora=True does not combine"):
        LoRAConfig(use_dora=True, init_lora_weights="pissa")


@pytest.mark.parametrize("init", [False, None, "olora", "pissa_niter_4"])
def test_an_unknown_start_is_an_error(init):
    with pytest.raises(ValueError, match="init_lora_weights must be True or"):
        LoRAConfig(init_lora_weights=init)


def test_a_config_is_frozen_and_keeps_no_list_of_the_caller():
    targets, pattern = ["c_fc"], {"c_fc": 4}
    config = LoRAConfig(target_modules=targets, rank_pattern=pattern)
    targets.append("c_attn")
    pattern["c_attn"] = 2
    assert config.target_modules == ("c_fc",)
    assert config.rank_pattern == {"c_fc": 4}
    with pytest.raises(FrozenInstanceError):
        config.r = 4
    assert copy.deepcopy(config) == config
    assert isinstance(hash(config), int)
