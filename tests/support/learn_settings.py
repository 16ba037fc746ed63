"""Settings of `learn` for tests: one dict of names, for Coefficients, LearnConfig and Execution."""

import functools
import math
from dataclasses import fields, replace

import torch

from fastppo.core.contracts import EAGER, Coefficients
from fastppo.core.ppo import LearnConfig

SETTINGS = {
    "advantage_estimator": "gae",
    "norm_returns": False,
    "norm_adv": True,
    "clip_reward": False,
    "clip_vloss": True,
}
NUMBERS = {
    "learning_rate": 3e-3,
    "clip_coef": 0.2,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "max_grad_norm": 0.5,
    "target_kl": None,
    "adam_eps": 1e-5,
}
_OF_CONFIG = {field.name for field in fields(LearnConfig)}


def split(options):
    """(those that are names of Coefficients, the others)."""
    numbers = {name: value for name, value in options.items() if name in NUMBERS}
    return numbers, {name: value for name, value in options.items() if name not in NUMBERS}


def coefficients(dtype=torch.float32, device="cpu", **numbers):
    """NUMBERS with these in their place. A target_kl of None is none, as in TrainConfig."""
    values = NUMBERS | numbers
    if values["target_kl"] is None:
        values["target_kl"] = math.inf
    return Coefficients(**{name: torch.tensor(value, dtype=dtype, device=device) for name, value in values.items()})


def learn_settings(**options):
    """SETTINGS with these options, as keywords of `learn`: a name of LearnConfig, of Execution, or `worker`."""
    config = {name: value for name, value in options.items() if name in _OF_CONFIG}
    execution = {name: value for name, value in options.items() if name not in _OF_CONFIG | {"worker"}}
    keywords = {"config": LearnConfig(**(SETTINGS | config)), "execution": replace(EAGER, **execution)}
    return keywords | ({"worker": options["worker"]} if "worker" in options else {})


def with_settings(program, **options):
    """The `learn` or `collect` of a functools.partial with some settings changed."""
    config = {name: value for name, value in options.items() if name in _OF_CONFIG}
    execution = {name: value for name, value in options.items() if name not in _OF_CONFIG}
    keywords = {"execution": replace(program.keywords.get("execution", EAGER), **execution)}
    if config:
        keywords["config"] = replace(program.keywords["config"], **config)
    return functools.partial(program, **keywords)
