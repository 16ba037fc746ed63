"""Settings of `learn` for tests: one dict of names, for LearnConfig and for Execution."""

import functools
from dataclasses import fields, replace

from fastppo.core.contracts import EAGER
from fastppo.core.ppo import LearnConfig

SETTINGS = {
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "advantage_estimator": "gae",
    "norm_returns": False,
    "norm_adv": True,
    "clip_reward": False,
    "clip_vloss": True,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
    "target_kl": None,
    "adam_eps": 1e-5,
}
_OF_CONFIG = {field.name for field in fields(LearnConfig)}


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
