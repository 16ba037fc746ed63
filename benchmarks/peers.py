"""Time the peers on fastppo's workloads: PPO of Stable-Baselines3, recurrent PPO of sb3-contrib, and a PPO made with torchrl.

Settings are the same. Each peer follows its own documentation and shares no code with fastppo. The first iteration of every run
is a warm-up and not timed. A step is one transition; rows in which an environment is only reset do not count. The peers for
environments on the device are those of jax_peers.py. Peers and fastppo run in turn, round by round:
python benchmarks/peers.py --workload cartpole8 --total-timesteps 20000 --rounds 3
python benchmarks/peers.py --workload device8 --jax-python jaxenv/bin/python --purejaxrl purejaxrl
"""

import importlib.util
import json
import logging
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import torch
import tyro
from rich.console import Console
from rich.table import Table
from sps import WORKLOADS, Workload, WorkloadName, run_fastppo
from torch.distributions import Categorical, Distribution

LEARNING_RATE, ADAM_EPS = 2.5e-3, 1e-5  # Adam's step size falls linearly to 0 over the run
GAMMA, GAE_LAMBDA, CLIP_COEF, VF_COEF, MAX_GRAD_NORM = 0.99, 0.95, 0.2, 0.5, 0.5


def run_sb3(workload: Workload, num_iterations: int, seed: int) -> float:
    """Seconds of Stable-Baselines3's PPO for all iterations but the first.

    Its documentation advises DummyVecEnv (the default of make_vec_env) and the CPU for PPO with an MLP. The rest are the
    defaults of MlpPolicy: 64 64 tanh for actor and critic each, orthogonal weights, Adam's epsilon 1e-5. Atari is set up as in
    the RL Zoo: make_atari_env, four stacked frames, CnnPolicy. A recurrent workload uses sb3-contrib's RecurrentPPO. Its
    minibatches are contiguous rows, which continue over environments and episodes.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    starts: list[float] = []  # of each rollout; the second starts when the update of the first iteration has ended

    class Stopwatch(BaseCallback):
        def _on_rollout_start(self) -> None:
            starts.append(time.perf_counter())

        def _on_step(self) -> bool:
            return True

    if workload.is_atari:
        import ale_py

        gym.register_envs(ale_py)
        game = workload.env_id.removeprefix("ALE/").partition("-")[0] + "NoFrameskip-v4"
        envs = VecFrameStack(make_atari_env(game, n_envs=workload.num_envs, seed=seed), n_stack=4)
    else:
        envs = make_vec_env(workload.env_id, n_envs=workload.num_envs, seed=seed)
        envs = VecNormalize(envs) if workload.normalized else envs
    algorithm: Callable[..., Any] = PPO
    if workload.recurrent:
        from sb3_contrib import RecurrentPPO

        memory = {"lstm_hidden_size": 64, "shared_lstm": False, "enable_critic_lstm": True}
        algorithm = partial(RecurrentPPO, policy_kwargs=memory)
    model = algorithm(
        "MlpLstmPolicy" if workload.recurrent else "CnnPolicy" if workload.is_atari else "MlpPolicy",
        envs,
        learning_rate=lambda remaining: remaining * (2.5e-4 if workload.is_atari else LEARNING_RATE),
        n_steps=workload.num_steps,
        batch_size=workload.minibatch_size,
        n_epochs=workload.update_epochs,
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
        clip_range=CLIP_COEF,
        vf_coef=VF_COEF,
        max_grad_norm=MAX_GRAD_NORM,
        seed=seed,
        device="cpu",
    )
    model.learn(num_iterations * workload.batch_size, callback=Stopwatch())
    seconds = time.perf_counter() - starts[1]
    envs.close()
    return seconds


def run_torchrl(workload: Workload, num_iterations: int, seed: int) -> float:
    """Seconds of a torchrl PPO for all iterations but the first.

    It follows ppo_mujoco.py and ppo_atari.py of torchrl's sota-implementations, which are eager by default. The differences are
    due to the fixed setting or make torchrl faster: advantages are computed once a rollout, not once an epoch; continuous
    actions are Gaussian and clipped by the environment, not tanh-squashed; the N environments of gymnasium run in this process
    behind GymWrapper, not in N processes. Autoreset is off, as GymWrapper prefers: it refuses next-step autoreset, and so
    CartPole's own vector environment.
    """
    from tensordict import TensorDict
    from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
    from torchrl.collectors import Collector  # the newer name of SyncDataCollector
    from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
    from torchrl.envs import Compose, GymWrapper, RewardSum, StepCounter, TransformedEnv
    from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it prints a line to stdout for every allocation of a storage
    torch.manual_seed(seed)
    disabled = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    vector_env = gym.make_vec(workload.env_id, workload.num_envs, vectorization_mode="sync", vector_kwargs=disabled)
    wrapped = GymWrapper(vector_env, categorical_action_encoding=True, device="cpu")
    env = TransformedEnv(wrapped, Compose(RewardSum(), StepCounter()))
    env.set_seed(seed)

    obs_size = env.observation_spec["observation"].shape[-1]
    discrete = isinstance(vector_env.single_action_space, gym.spaces.Discrete)
    num_outputs = env.action_spec.space.n if discrete else env.action_spec.shape[-1]

    def mlp(out_features: int, last_gain: float) -> torch.nn.Module:
        net: torch.nn.Module = MLP(obs_size, out_features, num_cells=[64, 64], activation_class=torch.nn.Tanh)
        linears = [layer for layer in net.modules() if isinstance(layer, torch.nn.Linear)]
        for layer in linears:
            torch.nn.init.orthogonal_(layer.weight, last_gain if layer is linears[-1] else math.sqrt(2))
            torch.nn.init.zeros_(layer.bias)
        return net

    policy_net = mlp(num_outputs, 0.01)
    policy_net = policy_net if discrete else torch.nn.Sequential(policy_net, AddStateIndependentNormalScale(num_outputs))
    parameters = ["logits"] if discrete else ["loc", "scale"]
    module = TensorDictModule(policy_net, in_keys=["observation"], out_keys=parameters)
    distribution, spec = Categorical if discrete else IndependentNormal, env.full_action_spec_unbatched
    actor = ProbabilisticActor(module, parameters, spec=spec, distribution_class=distribution, return_log_prob=True)
    critic = ValueOperator(mlp(1, 1.0), in_keys=["observation"])

    frames = {"frames_per_batch": workload.batch_size, "total_frames": num_iterations * workload.batch_size}
    collector = Collector(env, actor, **frames, device="cpu", max_frames_per_traj=-1, auto_register_policy_transforms=False)
    storage = LazyTensorStorage(workload.batch_size, device="cpu")
    buffer = TensorDictReplayBuffer(storage=storage, sampler=SamplerWithoutReplacement(), batch_size=workload.minibatch_size)
    advantage = GAE(gamma=GAMMA, lmbda=GAE_LAMBDA, value_network=critic, average_gae=False)
    coefficients = {"clip_epsilon": CLIP_COEF, "critic_coeff": VF_COEF, "entropy_coeff": 0.0}
    loss_module = ClipPPOLoss(actor, critic, **coefficients, loss_critic_type="l2", normalize_advantage=True)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=LEARNING_RATE, eps=ADAM_EPS)
    losses = TensorDict(batch_size=[workload.update_epochs, workload.batch_size // workload.minibatch_size])

    started = time.perf_counter()
    for iteration, data in enumerate(collector):  # data: (N, T)
        optimizer.param_groups[0]["lr"] = (1 - iteration / num_iterations) * LEARNING_RATE
        with torch.no_grad():
            data = advantage(data)
        buffer.extend(data.reshape(-1))
        for epoch in range(workload.update_epochs):
            for minibatch, rows in enumerate(buffer):  # (M,)
                loss = loss_module(rows)
                (loss["loss_objective"] + loss["loss_critic"] + loss["loss_entropy"]).backward()
                torch.nn.utils.clip_grad_norm_(loss_module.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                optimizer.zero_grad()
                losses[epoch, minibatch] = loss.select("loss_objective", "loss_critic", "loss_entropy").detach()
        for key in ("episode_reward", "step_count"):  # logged by torchrl's scripts; every peer logs
            data["next", key][data["next", "done"]].float().mean()
        losses.apply(lambda loss: loss.mean(), batch_size=[])
        collector.update_policy_weights_()
        if iteration == 0:
            started = time.perf_counter()
    seconds = time.perf_counter() - started
    collector.shutdown()
    return seconds


# Name: package, the function that times it, and whether torch.distributions checks its arguments if only this package is
# imported.
PEERS: dict[str, tuple[str, Callable[[Workload, int, int], float], bool]] = {
    "sb3": ("stable_baselines3", run_sb3, __debug__),
    "sb3-contrib": ("sb3_contrib", run_sb3, __debug__),
    "torchrl": ("torchrl", run_torchrl, False),
}


def run_peer(name: str, workload: str, total_timesteps: int, num_threads: int) -> float:
    """Steps per second of one peer without its first iteration. It runs at least two iterations, all of them whole.

    Importing torchrl turns off the checks of torch.distributions in the process, which would make other peers faster. So each
    peer gets the value of its own process. Afterwards the caller's value and number of threads are restored.
    """
    package, run, validate_args = PEERS[name]
    sizes = WORKLOADS[workload]
    num_iterations = max(2, total_timesteps // sizes.batch_size)
    callers = torch.get_num_threads(), Distribution._validate_args
    try:
        importlib.import_module(package)  # before the checks are set, since the import may change them
        torch.set_num_threads(num_threads)
        Distribution.set_default_validate_args(validate_args)
        seconds = run(sizes, num_iterations, 1)
    finally:
        torch.set_num_threads(callers[0])
        Distribution.set_default_validate_args(callers[1])
    return (num_iterations - 1) * sizes.batch_size / seconds


JAX_PEERS = ("purejaxrl", "rejax")


def peers_of(workload: Workload) -> tuple[str, ...]:
    """The peers that have this workload."""
    if workload.backend == "torch":
        return JAX_PEERS
    if workload.recurrent:
        return ("sb3-contrib",)
    return ("sb3",) if workload.normalized or workload.is_atari else ("sb3", "torchrl")


def run_jax_peer(name: str, workload: str, config: "PeersConfig") -> float:
    """Steps per second of a peer in jax_peers.py, which runs in its own Python environment."""
    command = [str(config.jax_python), str(Path(__file__).with_name("jax_peers.py")), "--peer", name, "--workload", workload]
    command += ["--purejaxrl", str(config.purejaxrl)] if config.purejaxrl else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])["sps"]


@dataclass(frozen=True)
class PeersConfig:
    """Time the peers on a workload of fastppo, interleaved with fastppo. The last line of the output is one JSON object."""

    workload: WorkloadName = "cartpole8"
    """Environment and sizes; those on the device have the peers in JAX."""
    peers: tuple[Literal["sb3", "sb3-contrib", "torchrl", "purejaxrl", "rejax"], ...] | None = None
    """Which ones, taken in turn in every round; default: all that have the workload."""
    total_timesteps: int = 20_000
    """Transitions of each run, but of those in JAX, rounded down to whole iterations, at least two; the first is not timed."""
    rounds: int = 3
    """Runs of each, of which the median is reported."""
    num_threads: int | None = None
    """torch's threads, for the same; default: 1, their best at these sizes, and all for the CNN."""
    jax_python: Path | None = None
    """Python of the environment that the first lines of jax_peers.py set up."""
    purejaxrl: Path | None = None
    """Checkout of PureJaxRL, see jax_peers.py."""


def main(config: PeersConfig) -> int:
    """Measure, print the table and the JSON line, and return the exit code."""
    if min(config.total_timesteps, config.rounds, config.num_threads or 1) < 1:
        print("--total-timesteps, --rounds and --num-threads must be at least 1", file=sys.stderr)
        return 2
    workload = WORKLOADS[config.workload]
    names = list(config.peers or peers_of(workload))
    num_threads = config.num_threads or (torch.get_num_threads() if workload.is_atari else 1)
    for name in names:
        if name not in peers_of(workload):
            print(f"--peers {name}: not for --workload {config.workload}", file=sys.stderr)
            return 2
        if name in PEERS and importlib.util.find_spec(PEERS[name][0]) is None:
            print(f"{name}: {PEERS[name][0]} is not installed; install it with: pip install 'fastppo[bench]'", file=sys.stderr)
            return 2
        if name in JAX_PEERS and (config.jax_python is None or (name == "purejaxrl" and config.purejaxrl is None)):
            print(f"{name} needs --jax-python and, for purejaxrl, --purejaxrl: see jax_peers.py", file=sys.stderr)
            return 2
    run_fastppo(WORKLOADS[config.workload])  # compile programs that are not in the cache; not measured
    measured: dict[str, list[float]] = {name: [] for name in ("fastppo", *names)}
    for _ in range(config.rounds):
        for name in names:
            if name in JAX_PEERS:
                measured[name].append(run_jax_peer(name, config.workload, config))
            else:
                measured[name].append(run_peer(name, config.workload, config.total_timesteps, num_threads))
        measured["fastppo"].append(run_fastppo(WORKLOADS[config.workload])["sps"])

    runtime = f"Python {sys.version.split()[0]}, torch {torch.__version__}, gymnasium {version('gymnasium')}"
    table = Table(title=f"{config.workload}, {config.rounds} rounds, --num-threads {num_threads}", caption=runtime)
    for column in ("", "steps/s (median)", "min", "max", "fastppo is faster by"):
        table.add_column(column, justify="left" if not column else "right")
    results: dict[str, dict[str, Any]] = {}
    ours = measured["fastppo"]
    for name, sps in measured.items():
        median = statistics.median(sps)
        ratios = [one / other for one, other in zip(ours, sps, strict=True)]
        ratio = statistics.median(ours) / median
        results[name] = {
            "sps": median,
            "spread": [min(sps), max(sps)],
            "ratio": ratio,
            "ratio_spread": [min(ratios), max(ratios)],
        }
        faster = "" if name == "fastppo" else f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, *(f"{value:,.0f}" for value in (median, min(sps), max(sps))), faster)
    Console().print(table)
    print(json.dumps({"workload": config.workload, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(PeersConfig)))
