"""Which programs a run has, each in its eager form, in the form for the compiler and, where there is one, in its fused form.

There is `learn`, and beside it `collect` where the environments are functions on tensors, else `act`. One function builds each:
it starts from the program of one seed, and `SeedAxis` makes that the program of all seeds. Knows nothing of how programs are
compiled or called.
"""

from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.compile.selector import ProgramSpec
from fastppo.compile.verification import deviation_of_act, deviation_of_collect, deviation_of_learn, first_minibatches
from fastppo.config import TrainConfig
from fastppo.core import acting, ppo
from fastppo.core.contracts import Execution, Normalization, Policy, obs_of
from fastppo.core.gradient import functional_grad_and_aux
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.halves import NUM_HALVES
from fastppo.fused import mlp_programs
from fastppo.policy.mixed_precision import AutocastPolicy
from fastppo.policy.module_policy import ModulePolicy
from fastppo.policy.rnn import RecurrentActorCritic
from fastppo.rollout.env_step import env_step_of, pack
from fastppo.system.modes import tf32, under
from fastppo.training.setup import ROWS_PER_PASS, Task

MIN_WORKER_ENVS = 64  # for each worker of a compiled `collect`


def build_programs(task: Task, learn_example: tuple[Any, ...], noise: Tensor) -> dict[str, ProgramSpec]:
    """The programs of a run by name: `learn`, and `collect` or `act`.

    Args:
        learn_example: arguments of `learn`. noise: of a whole rollout, as the collector takes it.
    """
    params, _, rollout, *_, normalization = learn_example
    second = {"collect": collect_program} if task.on_device else {"act": act_program}
    others = {name: build(task, params, normalization, rollout, noise) for name, build in second.items()}
    specs = {"learn": learn_program(task, learn_example), **others}
    if task.config.tf32 or task.config.bf16:
        specs = {name: replace(spec, deviation=partial(spec.deviation, rounded=True)) for name, spec in specs.items()}
    if task.config.tf32:
        specs = {name: replace(spec, eager=under(tf32, spec.eager), mode=tf32) for name, spec in specs.items()}
    return specs


def policy_of(task: Task) -> Policy:
    """The network as the programs use it."""
    return AutocastPolicy(task.network) if task.config.bf16 else task.network


def maps_seeds(task: Task) -> bool:
    """Whether vmap takes all seeds at once: not a module of the user's own, nor convolutions."""
    return not isinstance(task.network, ModulePolicy) and not task.obs.has_images


def learn_program(task: Task, example: tuple[Any, ...]) -> ProgramSpec:
    """`learn`.

    Small operations of all seeds as one: an eager update of ten takes 21 ms a seed instead of 36. A compiled one gains none by
    it (5.2 ms instead of 4.9, benchmarks/LOG.md): each core updates a seed at a time. On a GPU the eager program is captured.
    """
    axis, ranks, on_cpu = task.axis, task.ranks, task.device.type == "cpu"
    policy = policy_of(task)
    learn = partial(ppo.learn, policy=policy, config=learn_config(task.local))
    shared = ranks.learn_settings()
    execution = Execution(
        microbatch_size=rows_per_pass(task.config) if task.obs.has_images else None,
        **{name: value for name, value in shared.items() if name != "worker"},
    )
    if axis.shape and maps_seeds(task):
        execution = replace(execution, grad_and_aux=functional_grad_and_aux)
    eager = compiled = partial(learn, worker=shared.get("worker"), execution=execution)
    if on_cpu:
        num_workers = 1 if axis.shape else task.workers
        fast = Execution(microbatch_size=rows_per_pass(task.config), num_ranks=ranks.size, num_workers=num_workers)
        compiled = partial(learn, execution=fast)
    per_call = 1 if on_cpu or not maps_seeds(task) else axis.size
    fused = None
    if on_cpu and mlp_programs.covers(policy):
        fused = partial(mlp_programs.FusedLearn, policy, learn.keywords["config"], task.workers, axis, ranks)
    return ProgramSpec(
        axis.map(eager, maps_seeds(task)),
        compiled,
        example,
        deviation_of_learn,
        axis.calls(per_call, task.workers),
        fused,
        partial(first_minibatches, task.local.rows_per_minibatch // task.local.rows_per_unit),
    )


def rows_per_pass(config: TrainConfig) -> int:
    """Rows of a microbatch. Nature's CNN keeps 100 kB a row of 84 x 84 pixels for its gradient, IMPALA's about 2 MB."""
    return ROWS_PER_PASS // 16 if config.cnn == "impala" else ROWS_PER_PASS


def collect_program(
    task: Task, params: Tensor, normalization: Normalization, rollout: dict[str, Tensor], noise: Tensor
) -> ProgramSpec:
    """`collect`. Compiled, it gains by taking several seeds at once: each worker takes its part of them."""
    axis, made, policy = task.axis, task.made, policy_of(task)
    assert isinstance(made, TorchVectorEnv)
    collect = compiled = partial(acting.collect, policy=policy, env_step=env_step_of(made, task.action))
    if task.device.type == "cpu" and not axis.shape:
        enough = task.local.num_envs >= MIN_WORKER_ENVS * task.workers
        bind_act = partial(mlp_programs.bind_act, policy) if mlp_programs.covers(policy) else None
        compiled = partial(collect, execution=Execution(num_workers=task.workers if enough else 1, bind_act=bind_act))
    running = (*pack(made.running), *(x.contiguous() for x in rnn_inputs(task, rollout)))
    example = (params, normalization, running, noise, made.draw(task.local.num_steps))
    per_call = -(-axis.size // task.workers) if maps_seeds(task) else 1
    eager = axis.map(collect, maps_seeds(task))
    return ProgramSpec(eager, compiled, example, deviation_of_collect, axis.calls(per_call, task.workers))


def act_program(
    task: Task, params: Tensor, normalization: Normalization, rollout: dict[str, Tensor], noise: Tensor
) -> ProgramSpec:
    """`act`. The eager form has its parameters already.

    It enters a mode in each step, since the environments between two steps must see none of ours. Inference mode makes tensors
    that a module of the user's own may keep and cannot learn from. Acting for eight environments takes 20 us under it and 22
    without gradients.
    """
    axis, network, policy = task.axis, task.network, policy_of(task)
    remembers = isinstance(network, RecurrentActorCritic)
    act: Any = acting.act_recurrent_from_params if remembers else acting.act_from_params
    compiled = partial(act, policy=policy)
    eager = partial(axis.map(compiled, maps_seeds(task)), params)
    if not axis.shape:  # the views of the weights are made once
        act = acting.act_recurrent if remembers else acting.act
        eager = partial(act, policy, policy.weights(params))
    mode = torch.no_grad if isinstance(network, ModulePolicy) else torch.inference_mode
    obs = tree_map(partial(first_row, task), obs_of(rollout))
    rows = (obs, noise[0], *rnn_inputs(task, rollout))
    if task.in_halves:
        rows = tree_map(lambda x: x[: task.made.num_envs // NUM_HALVES], rows)
    example = (params, normalization, *rows)
    seeds = axis.calls(axis.size if maps_seeds(task) else 1, 1)
    fused = None
    if task.device.type == "cpu" and mlp_programs.covers(policy):
        fused = partial(mlp_programs.FusedAct, policy, task.workers, axis)
    return ProgramSpec(under(mode, eager), compiled, example, deviation_of_act, seeds, fused)


def first_row(task: Task, x: Tensor) -> Tensor:
    """Row 0 of a rollout's tensor, (N, ...), or (S, N, ...)."""
    return x.select(len(task.axis.shape), 0)


def rnn_inputs(task: Task, rollout: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What acting takes beside the observation: the state of a policy with memory, and where an episode starts."""
    if not isinstance(task.network, RecurrentActorCritic):
        return ()
    return rollout["rnn_state"], first_row(task, rollout["episode_start"])


def learn_config(config: TrainConfig) -> ppo.LearnConfig:
    """The settings of `learn`: those of TrainConfig of the same names, and three that it derives."""
    derived: dict[str, Any] = {"minibatch_size": config.rows_per_minibatch, "advantage_estimator": config.advantage}
    derived["clip_reward"] = config.clip_reward and not config.rnd_coef  # a bonus is added to rewards that are clipped already
    same = {field.name: getattr(config, field.name) for field in fields(ppo.LearnConfig) if field.name not in derived}
    return ppo.LearnConfig(**derived, **same)
