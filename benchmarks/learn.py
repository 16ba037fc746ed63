"""Milliseconds of one update in each of its forms: `python benchmarks/learn.py --workload cartpole8`.

Eager on one thread; compiled by Inductor on one thread, with `--inductor`, which builds it first; fused on one and two threads.
The forms take turns, round by round, on random transitions. The last line of the output is one JSON object.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from sps import WORKLOADS, WorkloadName

from fastppo.compile import library_cache
from fastppo.core import ppo
from fastppo.core.adam import init_adam
from fastppo.core.contracts import Coefficients, Execution, Normalization
from fastppo.fused.kernels import Kernels
from fastppo.fused.mlp_programs import FusedLearn
from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL
from fastppo.policy.mlp import MLPActorCritic

SPACES = {
    "CartPole-v1": (4, 2, CATEGORICAL),
    "Pendulum-v1": (3, 1, DIAGONAL_NORMAL),
    "HalfCheetah-v5": (17, 6, DIAGONAL_NORMAL),
}
CONFIG = ppo.LearnConfig(0, "gae", norm_returns=False, norm_adv=True, clip_reward=False, clip_vloss=True)


@dataclass(frozen=True)
class LearnBenchmarkConfig:
    """Milliseconds of one update in each of its forms; the last line of the output is one JSON object."""

    workload: WorkloadName = "cartpole8"
    """Whose sizes: one without images and without memory."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Units of each hidden layer."""
    layer_norm: bool = False
    """Layer normalisation in the hidden layers."""
    inductor: bool = False
    """The compiled form too; building it takes a minute."""
    rounds: int = 3
    """Turns of each form."""
    calls: int = 20
    """Calls a turn; a tenth of that for the eager form."""


def arguments(config: LearnBenchmarkConfig) -> tuple[MLPActorCritic, ppo.LearnConfig, tuple]:
    """A network, the settings, and the arguments of `learn` with random transitions."""
    workload = WORKLOADS[config.workload]
    if workload.is_atari or workload.recurrent:
        sys.exit(f"--workload {config.workload}: images and memory have no fused update")
    obs_size, action_size, family = SPACES[workload.env_id]
    network = MLPActorCritic(obs_size, action_size, family, config.hidden_sizes, layer_norm=config.layer_norm)
    generator = torch.Generator().manual_seed(1)
    rows = (workload.num_steps + 1, workload.num_envs)
    normal, uniform = (functools.partial(draw, *rows, generator=generator) for draw in (torch.randn, torch.rand))
    discrete = torch.randint(action_size, rows, generator=generator)
    rollout = {
        "obs": normal(obs_size),
        "action": discrete if family is CATEGORICAL else normal(action_size),
        "reward": normal(),
        "terminated": uniform() < 0.02,
        "truncated": uniform() < 0.01,
        "valid": uniform() > 0.02,
    }
    orders = [torch.randperm(workload.batch_size, generator=generator) for _ in range(workload.update_epochs)]
    numbers = Coefficients(*map(torch.tensor, (3e-4, 0.2, 0.0, 0.5, 0.99, 0.95, 0.5, float("inf"), 1e-5)))
    normalization = Normalization(None, None, None, torch.tensor(0.0), torch.tensor(1.0))
    params = network.init(generator)
    settings = ppo.LearnConfig(**{**vars(CONFIG), "minibatch_size": workload.minibatch_size})
    return network, settings, (params, init_adam(params), rollout, torch.stack(orders), numbers, normalization)


def forms(config: LearnBenchmarkConfig) -> dict[str, Callable[[], object]]:
    """The update of these arguments in each form."""
    network, settings, args = arguments(config)
    one, two = FusedLearn(network, settings, 1), FusedLearn(network, settings, 2)
    eager = functools.partial(ppo.learn, policy=network, config=settings)
    timed: dict[str, Callable[[], object]] = {
        "fused, 1 thread": lambda: one.with_threads(1, *args),
        "fused, 2 threads": lambda: two.with_threads(2, *args),
        "eager": lambda: eager(*args),
    }
    if config.inductor:
        from fastppo.compile.inductor import compile_program

        program = functools.partial(eager, execution=Execution(microbatch_size=1024))
        cache_dir = library_cache.cache_dir()
        library_cache.check_cache_dir(cache_dir)
        compiled = compile_program(program, args, cache_dir)
        timed["Inductor"] = lambda: compiled(*args)
    return timed


def main(config: LearnBenchmarkConfig) -> None:
    """Time the forms in turns; print least and median of each, and the JSON line."""
    torch.set_num_threads(1)
    Kernels().ready(wait=True)
    timed = forms(config)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(config.rounds):
        for name, update in timed.items():
            update()
            for _ in range(max(config.calls // 10, 1) if name == "eager" else config.calls):
                started = time.perf_counter()
                update()
                seconds[name].append(time.perf_counter() - started)
    result = {name: [1e3 * min(taken), 1e3 * statistics.median(taken)] for name, taken in seconds.items()}
    for name, (least, median) in result.items():
        print(f"{name:18} {least:9.2f} ms at least, {median:9.2f} median")
    print(json.dumps({"workload": config.workload, **result}))


if __name__ == "__main__":
    main(tyro.cli(LearnBenchmarkConfig))
