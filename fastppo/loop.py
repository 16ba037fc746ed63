"""Training, from top to bottom: collect a rollout, learn from it, move the statistics, log, repeat.

`train(config)` is the whole job. What a step or an update computes is in core/; what an iteration means for a run, its counters
and checkpoints and logs, is in agent_run.py. With --num-seeds S there are S runs, whose environments and programs are one.
"""

import contextlib
import math
import os
import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.agent_run import (
    AgentRun,
    Note,
    TrainResult,
    gather_environments,
    make_directory,
    named_after,
    reopen,
    schedule_at,
    share_environments,
)
from fastppo.callbacks import Callback
from fastppo.config import TrainConfig, flag
from fastppo.core import programs
from fastppo.core.gradient import functional_grad_and_aux
from fastppo.core.minibatches import draw_permutation
from fastppo.core.programs import obs_of
from fastppo.core.seeds import Seeds, of_seed, one_by_one, over_seeds, stack
from fastppo.envs.atari import atari_settings
from fastppo.envs.autoreset import AutoresetEnvs, ResetSeed
from fastppo.envs.backends import engine_name, make_envs
from fastppo.envs.check import check_envs
from fastppo.envs.deadline import Deadline
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.drawn import make_drawn
from fastppo.envs.probe import choose_vectorization
from fastppo.envs.seeds import many
from fastppo.errors import ENVIRONMENT_ERRORS, RankLost, TrainingFault, UsageError
from fastppo.policy.agent import Agent, make_network
from fastppo.policy.networks import ActorCritic, MLPActorCritic, ModuleFactory, ModulePolicy, Network
from fastppo.policy.spaces import ActionSpec, ObsSpec, action_spec, obs_spec
from fastppo.presets import describe
from fastppo.ranks import TIMEOUT_SECONDS, Ranks, check_shares, start_ranks
from fastppo.reproducibility import guarantees, made_with, versions
from fastppo.rollout import Collector, Outcomes, allocate_rollout, env_step_of, pack, start_collector, states_of
from fastppo.run.directory import RunDirectory
from fastppo.run.display import Display, NoDisplay, make_display
from fastppo.run.signals import StopSignals
from fastppo.run.tracking import check_installed
from fastppo.seeds import joint_row, keep_joint, make_directories, of_each_seed, reopen_all
from fastppo.state import TrainState, checkpoint_of, init_state, normalization_of
from fastppo.tiers import Job, Tiers
from fastppo.video import Recorder

# Compiled loops stream what a pass leaves behind through memory; parts that stay in the cache take half the time at minibatches
# of 8192 rows and two threads (57 to 73 ms an epoch of 65,536 rows instead of 114), and the same at 256.
ROWS_PER_PASS = 1024
MIN_WORKER_ROWS = 32  # of a minibatch, for each worker of a compiled `learn`; with 16 nothing is gained (benchmarks/LOG.md)
MIN_WORKER_ENVS = 64  # for each worker of a compiled `collect`
ENDLESS_SECONDS = 86_400.0  # --env-timeout 0, for ranks that wait for one another


def train(
    config: TrainConfig,
    policy: ModuleFactory | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    envs: VectorEnv | None = None,
) -> TrainResult:
    """Train an agent as `config` says and keep everything in its run directory; with num_seeds S agents at once.

    Args:
        policy: `policy(inputs, num_outputs) -> torch.nn.Module`, a network of your own instead of ours: see
            fastppo.policy.networks.ModulePolicy for what it is given and returns.
        callbacks: called in their order between iterations, see fastppo.callbacks; for each seed by itself.
        envs: a vector environment of your own instead of one made from env_id, trained and evaluated on, and left open. The run
            is named after the id it was registered with, or its class, unless env_id is set.

    Raises:
        UsageError: a setting that cannot be; nothing has been written.
        TrainingFault: an environment failed or a number was not finite; a checkpoint from before it has been written.
        KeyboardInterrupt: after SIGINT, once the iteration is finished and a checkpoint written.
        SystemExit: likewise after SIGTERM, or when stdout is a pipe that its reader has closed; 128 + SIGTERM or SIGPIPE.
    """
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(torch.set_num_threads, torch.get_num_threads())
        return _train(config, policy, callbacks, envs, cleanup)


def _train(
    config: TrainConfig,
    policy: ModuleFactory | None,
    callbacks: Sequence[Callback],
    given: VectorEnv | None,
    cleanup: contextlib.ExitStack,
) -> TrainResult:
    # --- what is trained, where: everything that can be refused is refused before anything is written
    if given is not None and config.num_seeds > 1:
        raise UsageError(f"--num-seeds {config.num_seeds} makes environments from --env-id, which yours were not: leave it off")
    device = choose_device(config.device)
    if config.track is not None:
        check_installed(config.track)
    ranks = start_ranks(device, TIMEOUT_SECONDS + (config.env_timeout or ENDLESS_SECONDS))
    cleanup.callback(ranks.close)
    device = torch.device(ranks.device) if ranks.size > 1 else device
    with checked(ranks):
        check_same(config, ranks.agree(config), ranks)
    config, strata_note = with_strata(config, ranks)
    local = share_of(config, ranks)
    deadline = cleanup.enter_context(contextlib.closing(Deadline(config.env_timeout)))
    with checked(ranks):
        if given is None:
            made, backend, why = make_own(local, device, deadline)
            envs = AutoresetEnvs(made, deadline)
            cleanup.callback(envs.close)
        else:
            made, backend, why = given, "given", "a vector environment of your own"
            envs = AutoresetEnvs(made, deadline)
            config = named_after(given, config)
        if made.num_envs != config.num_seeds * local.num_envs:
            raise UsageError(f"--num-envs {local.num_envs}: {config.env_id} comes with {made.num_envs} environments")
        if isinstance(made, TorchVectorEnv):
            made.share = (ranks.rank, ranks.size)
            if made.device != device:
                raise UsageError(f"--device {device}: the environments given are on {made.device}")
        obs_space = made.single_observation_space
        action = action_spec(made.single_action_space, config.squash_actions)
        obs = obs_spec(obs_space, info_mask_size(envs), action)
        on_device = isinstance(made, TorchVectorEnv)
        findings = []
        if config.check_env and not config.resume:
            findings = check_envs(made, config.env_id, config.env_kwargs, backend, deadline)
    drawn = None
    if config.record_every is not None and ranks.is_main:
        drawn = make_recorded(config, given, deadline)
        cleanup.callback(drawn.close)
    several = config.num_seeds > 1
    configs = of_each_seed(config)
    seeds = [derive_seeds(own.seed) for own in configs]
    networks = [
        make_network(obs, action, own, policy, own_seeds["parameters"]) for own, own_seeds in zip(configs, seeds, strict=True)
    ]
    network = networks[0]
    if not all(alike(network, other) for other in networks[1:]):
        raise UsageError("policy: its buffers or frozen weights differ by seed, and --num-seeds shares them: train one by one")
    states = [
        init_state(own, net, obs, device, own_seeds) for own, net, own_seeds in zip(configs, networks, seeds, strict=True)
    ]
    workers = choose_workers(local, obs)
    torch.set_num_threads(choose_threads(local, network))
    provenance = made_with(device, torch.get_num_threads(), workers)
    data_of = partial(checkpoint_of, network, obs_space, obs, action, {**provenance, **versions()})
    # environments on the device are kept in checkpoints as they stand; others can only be restarted at them
    restarts = config.exact_resume and not on_device
    if isinstance(made, TorchVectorEnv):
        made.reset(seed=0)  # for the form of its state; start_collector resets it again
        if config.resume:
            for state, environments in zip(states, states_of(made), strict=True):  # for their form
                state.environments = gather_environments(environments, ranks)

    # --- its directory, or those of all seeds in one
    top: RunDirectory | None = None
    fresh = [data_of(state) for state in states]
    if several:
        if config.resume:
            top, directories, notes = reopen_all(config, configs, states, network, fresh, cleanup)
        else:
            (top, directories), notes = make_directories(config, configs, fresh, cleanup), [describe(config)]
    elif config.resume:
        directory, notes = reopen(config, restarts, states[0], network, fresh[0], cleanup, ranks)
        directories = [directory]
    else:
        directories, notes = [make_directory(config, fresh[0], ranks)], [describe(config)]
        cleanup.callback(directories[0].unlock)
    named = f"seeds {configs[0].seed} to {configs[-1].seed}" if several else f"seed {config.seed}"
    title = f"fastppo · {config.env_id} · {named}"
    display: Display = make_display(config.plain, title) if ranks.is_main else NoDisplay()
    cleanup.callback(display.close)  # whatever happens: a terminal gets its cursor back
    display.note(f"run directory {(top or directories[0]).path}")
    for line in (*notes, strata_note):
        if line is not None:
            display.note(line)
    each = f"{max(config.num_seeds, ranks.size)} x {local.num_envs}" if several or ranks.size > 1 else str(config.num_envs)
    display.note(f"{config.env_id}: {each} environments, {backend} ({why})")
    for line in findings:
        display.note(line)
    threads = f"{torch.get_num_threads()} eager, {workers} compiled"
    here = f"{ranks.size} processes, of which this is on {device}" if ranks.size > 1 else f"device {device}"
    display.note(f"{here}, {network.num_params:,} parameters; CPU threads: {threads}")
    if not ranks.is_main:
        callbacks = ()
    elif drawn is not None and config.record_every is not None:
        callbacks = (*callbacks, Recorder(drawn, config.record_every, display.note))
    params = stack([state.params for state in states]) if several else states[0].params
    if several:
        for state, own_params in zip(states, params, strict=True):
            state.params = own_params  # a view: what acts and learns is one tensor

    def agent_of(state: TrainState) -> Agent:
        return Agent(obs_space, obs, action, network, state.params, normalization_of(state))

    def note_of(own: TrainConfig) -> Note:
        return (lambda line: display.note(f"seed {own.seed}: {line}")) if several else display.note

    runs = []
    for own, state, directory in zip(configs, states, directories, strict=True):
        runs.append(AgentRun(own, state, directory, data_of, agent_of, callbacks, restarts, note_of(own), top, ranks))
        cleanup.callback(runs[-1].close)

    # --- the programs, and the buffers that they live in
    num_seeds = config.num_seeds if several else None
    rollout = allocate_rollout(config.num_steps, local.num_envs, obs, action, envs.keeps_final_obs, device, num_seeds)
    rollout_tensors: dict[str, Tensor] = dict(rollout.items())
    rollouts = [of_seed(rollout_tensors, index) for index in range(len(runs))] if several else [rollout_tensors]
    steps = [{key: rows[key][:-1] for key in ("reward", "terminated", "truncated", "valid")} for rows in rollouts]
    permutations = torch.empty(len(runs), config.update_epochs, local.batch_size, dtype=torch.int64, device=device)
    permutation = permutations if several else permutations[0]
    minibatches = partial(
        draw_permutation,
        num_steps=config.num_steps,
        num_envs=config.num_envs,
        minibatch_size=config.rows_per_minibatch,
        strata=config.minibatch_strata or 1,
        rank=ranks.rank,
        num_ranks=ranks.size,
    )
    adam = stack([state.adam for state in states]) if several else states[0].adam
    noise_shape = action.noise_shape(config.num_steps, config.num_envs)
    noise_dim = 0 if on_device else 1  # of the seeds: environments on the device are stepped seed by seed, others step by step
    schedule, normalization = schedule_at(0.0, config, device), normalization_of(states[0])
    goes_by = [(normalization, schedule)] * len(runs)
    if several:
        normalization, schedule = stack([normalization] * len(runs)), stack([schedule] * len(runs))
    example = (params, adam, rollout_tensors, permutation, schedule, normalization)
    draws = [action.distribution.noise(noise_shape, torch.Generator(device))] * len(runs)
    noise = torch.stack(draws, noise_dim) if several else ranks.share(draws[0], 1).contiguous()
    jobs = make_jobs(local, network, obs, action, made, example, noise, workers, ranks)
    tiers = Tiers(config.compile, jobs, 1 if workers > 1 else torch.get_num_threads(), display.note, ranks)
    promises = guarantees(device, tiers.may_change, restarts or on_device)
    for line in promises:
        display.note(line)

    start_seconds = first_update_seconds = math.nan
    stop, stopped_by = StopSignals(), 0  # the latter as all ranks see it
    # of this process's environments; those on the device draw what those of all draw, and take what is theirs
    offset = 0 if on_device else ranks.rank * local.num_envs
    collector: Collector | None = None
    try:
        with checked(ranks):
            collector = start_collector(envs, rollout, obs, action, environment_seeds(runs, offset))
        assert collector is not None
        kept = [share_environments(state.environments, ranks) for state in states if state.environments is not None]
        if len(kept) == len(runs):
            collector.load_state_dicts(kept)
        start_seconds = process_age()
        mark, iterations = time.perf_counter(), 0
        while not (stopped_by := ranks.highest(stop.received or 0)[0]):
            running = [index for index, run in enumerate(runs) if not run.over]
            if not running:
                break
            before = collector.state_dicts()
            for index in running:
                goes_by[index] = runs[index].begin(None if before is None else before[index])
                minibatches(permutations[index], states[index].generators["minibatches"])
                draws[index] = action.distribution.noise(noise_shape, states[index].generators["actions"])
            normalization, schedule = stack(goes_by) if several else goes_by[0]
            noise = torch.stack(draws, noise_dim) if several else ranks.share(draws[0], 1).contiguous()

            # collect: T steps of N environments under frozen parameters and statistics
            iteration, checkpoints = states[0].iteration, runs[0].checkpoints  # only a run alone restarts at checkpoints
            restart = checkpoints.restarts_at(iteration + 1)
            with torch.inference_mode(), checked(ranks):
                if iterations > 0 and checkpoints.restarts_at(iteration):
                    collector.reset(environment_seeds(runs, offset))
                elif config.reset_each_rollout and iteration > 0 and not checkpoints.restarts_at(iteration):
                    collector.reset(None)
                phases = collector.collect(tiers.act(normalization), noise, cut=config.reset_each_rollout or restart)

            # learn: E epochs of minibatches, one call
            learn_started = time.perf_counter()
            with torch.no_grad():
                learned = tiers.learn(params, adam, rollout_tensors, permutation, schedule, normalization)
            adam = learned.adam
            outcomes = of_all(collector.outcomes(), ranks)
            metrics = {}  # of the seeds that go on
            for index in running:
                update = of_seed(learned, index) if several else learned
                everyones = steps[index] if ranks.size == 1 else tensors_of(outcomes, device)
                with faults_of(runs[index], rollouts[index], several):
                    metrics[index] = runs[index].learn(update, rollouts[index], everyones)
            learn_seconds = time.perf_counter() - learn_started

            # account: from account to account, what logging and checkpoints take is in the next iteration's time
            now = time.perf_counter()
            seconds, mark = now - mark, now
            if iterations == 0:
                first_update_seconds = process_age()
            iterations += 1
            for index in metrics:
                own_outcomes = Outcomes(*(rows[..., index, :] for rows in outcomes)) if several else outcomes
                runs[index].account(own_outcomes, metrics[index], goes_by[index][1], phases, learn_seconds, seconds)
                with faults_of(runs[index], rollouts[index], several):
                    runs[index].tell(partial(state_dict_of, collector, index))
            shown = [run for run in runs if run.row]
            eta = max((run.eta for run in runs), default=0.0)
            if shown:
                display.update(joint_row(shown), sum(min(run.progress, 1.0) for run in runs) / len(runs), eta)
            if display.reader_gone:  # `| head -3`: the end is that of a signal
                stop.received = signal.SIGPIPE
            tiers.update(iterations, eta)
            for index in metrics:
                with faults_of(runs[index], rollouts[index], several):
                    runs[index].keep(partial(state_dict_of, collector, index))
            for index in running:
                if runs[index].over:
                    runs[index].rest(state_dict_of(collector, index))
        for index, run in enumerate(runs):
            if not run.over:
                run.rest(state_dict_of(collector, index))
            if run.enough:
                run.note(f"training ends here: {run.enough}")
    except TrainingFault as fault:
        ended = reported(fault, runs, {} if collector is None else collector.kept())
        if not isinstance(fault, RankLost):
            leave_together(ranks)
        raise ended from fault
    except KeyboardInterrupt:
        for run in runs:
            run.note(f"stopped at once; iterations up to {run.checkpoints.iteration} are kept, {run.checkpoints.go_on}")
        raise
    finally:
        display.close()
        for run in runs:
            run.close()
        if given is None:
            envs.close()  # evaluation has the machine to itself
        tiers.close()
        stop.restore()

    # --- what came out
    if ranks.size > 1:
        stop.received = stopped_by or None
    about = {
        "start_seconds": start_seconds,
        "first_update_seconds": first_update_seconds,
        "compile_seconds": tiers.compile_seconds,
        "tier": tiers.name,
        "backend": backend,
        "device": str(device),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "reproducibility": promises,
        "made_with": provenance,
        "versions": versions(),
    }
    if several:  # what one of them cannot write is no reason to lose another's last state
        for run in runs:
            with contextlib.suppress(TrainingFault):
                run.checkpoints.finish(run.state)
    results = [
        run.finish(about, stop.name, policy, given, not stop.received, own["evaluation"])
        for run, own in zip(runs, seeds, strict=True)
        if run.fault is None
    ]
    failed = [run for run in runs if run.fault is not None]
    if top is not None and results:
        result = keep_joint(top, config, results, [run.config.seed for run in failed], display.note)
    elif results:
        (result,) = results
    if results:
        steps, sps = result.summary["global_step"], result.summary["sps"]
        note_of_end = f"{steps:,} steps in {result.summary['seconds']:.1f} s, {sps:,.0f} steps/s; results in {result.run_dir}"
        display.note(note_of_end)
    if stop.received:
        display.note(f"stopped by {stop.name}; {runs[0].checkpoints.go_on}")
        leave_together(ranks)
        raise stop.exception()
    if failed:
        told = "\n".join(f"seed {run.config.seed}: {run.fault}" for run in failed)
        raise TrainingFault(told)
    return result


@contextlib.contextmanager
def faults_of(run: AgentRun, rollout: Mapping[str, Tensor], several: bool) -> Iterator[None]:
    """A fault of one of several seeds ends that one: it is kept and told, and the others go on. rollout: its own."""
    try:
        yield
    except TrainingFault as fault:
        if not several:
            raise
        if run.fault is None:
            run.fault = run.report(fault, {key: rows.cpu() for key, rows in rollout.items()})
            run.note(f"{fault}; the other seeds go on")


def reported(fault: TrainingFault, runs: Sequence[AgentRun], kept: Mapping[str, Tensor]) -> TrainingFault:
    """Keep what all runs have reached; the fault as the user is told it. kept: the rollout as far as it came."""
    told = fault
    for index, run in enumerate(runs):
        if run.over:
            with contextlib.suppress(TrainingFault):
                run.checkpoints.finish(run.state)
        else:
            told = run.report(fault, kept if len(runs) == 1 else {key: rows[:, index] for key, rows in kept.items()})
    return told


def leave_together(ranks: Ranks) -> None:
    """Wait for the one that writes: torchrun ends all processes once one of them has left with an exit code."""
    with contextlib.suppress(RankLost):
        ranks.barrier()


def alike(one: Network, other: Network) -> bool:
    """Whether what training leaves as it is is the same in both."""
    if not isinstance(one, ModulePolicy) or not isinstance(other, ModulePolicy):
        return True
    return all(torch.equal(tensor, other.fixed[name]) for name, tensor in one.fixed.items())


@contextlib.contextmanager
def checked(ranks: Ranks) -> Iterator[None]:
    """A fault or wrong use in one process, raised in all of them once they are here."""
    failed: TrainingFault | UsageError | None = None
    try:
        yield
    except RankLost:
        raise
    except (TrainingFault, UsageError) as error:
        failed = error
    ranks.check(failed)


def check_same(config: TrainConfig, first: TrainConfig, ranks: Ranks) -> None:
    """Refuse settings that are not those of rank 0; raises UsageError."""
    for spec in fields(TrainConfig):
        own, other = getattr(config, spec.name), getattr(first, spec.name)
        if own != other:
            raise UsageError(
                f"rank {ranks.rank} was started with {flag(spec.name)} {own}, rank 0 with {other}: "
                "give torchrun the same command on all machines"
            )


def with_strata(config: TrainConfig, ranks: Ranks) -> tuple[TrainConfig, str | None]:
    """`config` with its groups of environments (core/minibatches.py), and a line where they are not those of before.

    Raises UsageError for what cannot be shared out.
    """
    if ranks.size > 1 and config.num_seeds > 1:
        raise UsageError(
            f"--num-seeds {config.num_seeds} is for one process, and torchrun has started {ranks.size}: use one of them"
        )
    strata, note = config.minibatch_strata or ranks.size, None
    if config.resume and strata % ranks.size:
        note = f"minibatches have equal shares of {ranks.size} groups of environments from here on; before: of {strata}"
        strata = ranks.size
    check_shares(config.num_envs, config.num_steps, config.rows_per_minibatch, strata, ranks.size)
    return replace(config, minibatch_strata=strata), note


def share_of(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The settings of this process's part: N / K environments, M / K rows of a minibatch."""
    if ranks.size == 1:
        return config
    minibatch_size = None if config.minibatch_size is None else config.minibatch_size // ranks.size
    return replace(config, num_envs=config.num_envs // ranks.size, minibatch_size=minibatch_size)


def of_all(outcomes: Outcomes, ranks: Ranks) -> Outcomes:
    """What the rollouts of all processes brought: (T, N)."""
    if ranks.size == 1:
        return outcomes
    rows = ranks.gather(np.stack([x.astype(np.float32) for x in outcomes[:-1]]), 2)  # (5, T, N): one exchange
    terminated, truncated, valid, episode_end = rows[1:] > 0
    return Outcomes(rows[0], terminated, truncated, valid, episode_end, ranks.gather(outcomes.cut))


def tensors_of(outcomes: Outcomes, device: torch.device) -> dict[str, Tensor]:
    """`reward terminated truncated valid`, (T, N), by key of the rollout."""
    keys = ("reward", "terminated", "truncated", "valid")
    return {key: torch.from_numpy(rows).to(device) for key, rows in zip(keys, outcomes, strict=False)}


def make_jobs(
    config: TrainConfig,
    network: Network,
    obs: ObsSpec,
    action: ActionSpec,
    made: VectorEnv,
    example: tuple[Any, ...],
    noise: Tensor,
    workers: int,
    ranks: Ranks,
) -> dict[str, Job]:
    """The programs of a run, eager and for the compiler; with several seeds, all of them over seeds.

    Args:
        example: arguments of `learn`. noise: of a whole rollout, as the collector takes it.
        workers: threads of a compiled `learn`.
        ranks: the processes that share an update.
    """
    params, _, rollout, *_, normalization = example
    on_cpu = params.device.type == "cpu"
    learn = partial(programs.learn, policy=network, **learn_settings(config))
    if obs.has_images:  # what a CNN leaves behind for its gradient is 100 kB a row
        learn = partial(learn, rows_per_pass=ROWS_PER_PASS)
    fast_learn = partial(learn, rows_per_pass=ROWS_PER_PASS) if on_cpu else learn
    if ranks.size > 1:
        learn = partial(learn, **ranks.learn_settings())
        fast_learn = partial(fast_learn, num_ranks=ranks.size) if on_cpu else learn
    act = partial(programs.act_from_params, policy=network)
    first_obs: Any = obs_of(rollout)
    number = config.num_seeds
    if number == 1:
        fast_learn = partial(fast_learn, num_workers=workers)
        jobs = {"learn": Job(learn, fast_learn, example)}
        if isinstance(made, TorchVectorEnv):
            collect = partial(programs.collect, policy=network, env_step=env_step_of(made, action))
            fast_collect = partial(collect, num_workers=workers if config.num_envs >= MIN_WORKER_ENVS * workers else 1)
            collect_example = (params, normalization, pack(made.running), noise, made.draw(config.num_steps))
            return {**jobs, "collect": Job(collect, fast_collect if on_cpu else collect, collect_example)}
        eager = partial(programs.act, network, network.weights(params))
        return {**jobs, "act": Job(eager, act, (params, normalization, tree_map(lambda x: x[0], first_obs), noise[0]))}

    # Small operations of all seeds as one: an eager update of ten takes 21 ms a seed instead of 36. A compiled one gains none
    # by it (5.2 ms instead of 4.9, benchmarks/LOG.md): each core updates a seed at a time. Steps on the device do gain.
    mapped = isinstance(network, MLPActorCritic | ActorCritic) and not obs.has_images
    over = over_seeds if mapped else partial(one_by_one, number=number)
    eager_learn = partial(learn, grad_and_aux=functional_grad_and_aux) if mapped else learn
    jobs = {"learn": Job(over(eager_learn), fast_learn, example, Seeds(number, 1, workers))}
    if isinstance(made, TorchVectorEnv):
        collect = partial(programs.collect, policy=network, env_step=env_step_of(made, action))
        each = Seeds(number, -(-number // workers) if mapped else 1, workers)
        collect_example = (params, normalization, pack(made.running), noise, made.draw(config.num_steps))
        return {**jobs, "collect": Job(over(collect), collect, collect_example, each)}
    act_example = (params, normalization, tree_map(lambda x: x[:, 0], first_obs), noise[0])
    together = Seeds(number, number if mapped else 1, 1)
    return {**jobs, "act": Job(partial(over(act), params), act, act_example, together)}


def make_own(config: TrainConfig, device: torch.device, deadline: Deadline) -> tuple[VectorEnv, str, str]:
    """The environments that `config` names, which engine runs them, and why that one; raises UsageError."""
    vectorization, why = "auto", f"as --backend {config.backend} asks"
    if config.backend in ("auto", "gymnasium"):
        vectorization, why = choose_vectorization(
            config.env_id,
            config.num_envs * config.num_seeds,
            config.vectorization,
            config.env_kwargs,
            config.num_threads,
            deadline,
        )

    def make(num_envs: int) -> VectorEnv:
        return make_envs(
            config.env_id,
            num_envs,
            config.backend,
            vectorization,
            config.env_kwargs,
            device,
            atari_settings(config),
            config.num_threads,
            deadline,
        )

    made = make(config.num_envs) if config.num_seeds == 1 else many(make, config.num_envs, config.num_seeds)
    return made, engine_name(made, config.env_id, config.backend, vectorization), why


def make_recorded(config: TrainConfig, given: VectorEnv | None, deadline: Deadline) -> AutoresetEnvs:
    """The one environment that --record-every draws; raises UsageError where there is none."""
    if given is not None:
        raise UsageError("--record-every makes an environment of its own from --env-id, which yours were not: leave it off")
    return make_drawn(config.env_id, config.backend, config.env_kwargs, atari_settings(config), deadline)


def choose_device(wanted: str) -> torch.device:
    """The device that --device names; auto is the GPU when there is one. Raises UsageError for one that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    return device


def choose_threads(config: TrainConfig, network: Network) -> int:
    """Threads of eager programs: --num-threads, or one for a minibatch of fewer than 16 M multiplications.

    Below that handing over costs more than it gives: with 9,155 parameters on two cores one thread is faster at 256 rows, two
    are at 4096 (benchmarks/LOG.md).
    """
    if config.num_threads is not None:
        return config.num_threads
    return 1 if config.rows_per_minibatch * network.num_params < 2**24 else torch.get_num_threads()


def choose_workers(config: TrainConfig, obs: ObsSpec) -> int:
    """Threads of a compiled `learn`, each with a part of the environments and of each minibatch (core/team.py), or with a seed.

    As many as there are cores, or --num-threads, as long as each has MIN_WORKER_ROWS rows of a minibatch and parts are equal.
    """
    if obs.has_images:  # large convolutions share themselves out better
        return 1
    cores = config.num_threads or torch.get_num_threads()
    if config.num_seeds > 1:
        return min(cores, config.num_seeds)
    most = min(cores, config.rows_per_minibatch // MIN_WORKER_ROWS)
    return max(k for k in range(1, max(most, 1) + 1) if config.num_envs % k == 0 and config.rows_per_minibatch % k == 0)


def learn_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of programs.learn."""
    return {
        "minibatch_size": config.rows_per_minibatch,
        "gamma": config.gamma,
        "gae_lambda": config.gae_lambda,
        "advantage_estimator": config.advantage,
        "norm_returns": config.norm_returns,
        "norm_adv": config.norm_adv,
        "clip_reward": config.clip_reward,
        "clip_vloss": config.clip_vloss,
        "vf_coef": config.vf_coef,
        "max_grad_norm": config.max_grad_norm,
        "target_kl": config.target_kl,
        "adam_eps": config.adam_eps,
    }


def process_age() -> float:
    """Seconds since this process was started, imports included; nan where /proc does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return math.nan
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def environment_seed(seed: int, iteration: int) -> int:
    """Seed of the environments of a run that starts, or goes on, at `iteration`."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0]) % 2**31


def derive_seeds(seed: int) -> dict[str, int]:
    """Independent streams from one seed: each random generator has its own."""
    names = ("parameters", "actions", "minibatches", "evaluation")
    numbers = np.random.SeedSequence(seed).generate_state(len(names))
    return {name: int(number) % 2**31 for name, number in zip(names, numbers, strict=True)}


def info_mask_size(envs: AutoresetEnvs) -> int | None:
    """Numbers in each environment's info["action_mask"]; None where there is none. Resets the environments."""
    if isinstance(envs.envs, TorchVectorEnv):
        return None
    with contextlib.suppress(*ENVIRONMENT_ERRORS):  # one that fails here fails when training starts, where it is reported
        _, mask = envs.reset_and_mask(None)  # a seed would have EnvPool make all its environments anew
        return None if mask is None else math.prod(mask.shape[1:])
    return None


def environment_seeds(runs: Sequence[AgentRun], offset: int) -> ResetSeed:
    """What the environments are reset with where the runs start, go on or restart: of several, one each.

    offset: number of this process's first environment, among those of all.
    """
    each = [environment_seed(run.config.seed, run.state.iteration) + offset for run in runs]
    return each if len(runs) > 1 else each[0]


def state_dict_of(collector: Collector, index: int) -> dict[str, Any] | None:
    """That seed's environments as they stand, see Collector.state_dicts."""
    states = collector.state_dicts()
    return None if states is None else states[index]
