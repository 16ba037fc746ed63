"""The peers with environments on the device: PPO of PureJaxRL and of rejax on gymnax's CartPole-v1, JAX on the CPU.

They need their own Python environment, which runs this file. It imports neither fastppo nor torch. Set it up once:
python -m venv jaxenv && jaxenv/bin/pip install jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 optax==0.2.8 chex==0.1.92 \
    distrax==0.1.9 tfp-nightly==0.26.0.dev20261027 gymnax==0.0.9 rejax==0.1.3 numpy==2.4.6
git clone https://github.com/luchris429/purejaxrl && git -C purejaxrl checkout 31756b197773a52db763fdbe6d635e4b46522a73
(distrax needs a nightly build of tfp from about that date.) Then run one peer per process:
jaxenv/bin/python benchmarks/jax_peers.py --peer purejaxrl --purejaxrl purejaxrl --workload device8
jaxenv/bin/python benchmarks/jax_peers.py --peer rejax --workload device1024

Timed is the whole training as one jitted program, as in the peers' documentation: compiled ahead, executed once untimed and
once timed, until every output is ready. A step is one transition. gymnax resets within the step that ends an episode, so no row
is only a reset. JAX uses all available cores (`taskset -c 0` leaves one). fastppo finds its compiled programs in a cache. For a
fair --solve, JAX must find its programs too: pass --compilation-cache and leave the first run out.

The settings are those of peers.py, except where a peer has no such setting. Both clip the value loss and treat the time limit
as a termination, without a bootstrap. rejax clips each element of a gradient at 0.5, not the norm. Its epsilon of Adam is 1e-8,
its actor and critic have separate optimizers, and its initial weights are LeCun-normal. Neither writes logs or checkpoints, and
rejax does not record returns.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import jax
import jax.numpy as jnp
import numpy as np

GAMMA, GAE_LAMBDA, CLIP_COEF, ENT_COEF, VF_COEF, MAX_GRAD_NORM = 0.99, 0.95, 0.2, 0.0, 0.5, 0.5
SOLVED, WINDOW = 475.0, 100  # as in solve.py


class Workload(NamedTuple):
    """Sizes of a run: N, T, minibatches, E, and transitions for a run of some seconds."""

    num_envs: int
    num_steps: int
    num_minibatches: int
    update_epochs: int
    total_timesteps: int

    @property
    def batch_size(self) -> int:
        """B, rows of one rollout."""
        return self.num_envs * self.num_steps


WORKLOADS = {"device8": Workload(8, 128, 4, 4, 500_000), "device1024": Workload(1024, 64, 8, 4, 2_000_000)}


class Peer(NamedTuple):
    """The training of one peer as one function, and functions that read its outputs."""

    train: Callable[[jax.Array], Any]
    """A key to its outputs: pure, not yet jitted."""
    steps: Callable[[Any], int]
    """Outputs to the transitions that the peer itself counted."""
    mean_return: Callable[[Any], float]
    """Outputs to the mean return of 100 or more episodes at the end of the run."""
    ends: Callable[[Any], np.ndarray]
    """Outputs to whether an episode ended, bool (iterations, T, N)."""


def purejaxrl_peer(workload: Workload, num_iterations: int, learning_rate: float, checkout: Path) -> Peer:
    """make_train in purejaxrl/ppo.py of a checkout. Its outputs hold the returns of every step.

    Its wrappers.py imports brax and navix for classes that CartPole does not use. If they are not installed, empty modules
    replace them.
    """
    for package, names in {
        "brax": ("brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training"),
        "navix": ("navix",),
    }.items():
        if importlib.util.find_spec(package) is None:
            for name in names:
                sys.modules[name] = types.ModuleType(name)
                sys.modules[name].__getattr__ = lambda attribute: None
    sys.path.insert(0, str(checkout / "purejaxrl"))
    from ppo import make_train

    config = {
        "ENV_NAME": "CartPole-v1",
        "NUM_ENVS": workload.num_envs,
        "NUM_STEPS": workload.num_steps,
        "TOTAL_TIMESTEPS": num_iterations * workload.batch_size,
        "UPDATE_EPOCHS": workload.update_epochs,
        "NUM_MINIBATCHES": workload.num_minibatches,
        "LR": learning_rate,
        "ANNEAL_LR": True,
        "GAMMA": GAMMA,
        "GAE_LAMBDA": GAE_LAMBDA,
        "CLIP_EPS": CLIP_COEF,
        "ENT_COEF": ENT_COEF,
        "VF_COEF": VF_COEF,
        "MAX_GRAD_NORM": MAX_GRAD_NORM,
        "ACTIVATION": "tanh",
        "DEBUG": False,
    }

    def ends(outputs: Any) -> np.ndarray:
        return np.asarray(outputs["metrics"]["returned_episode"])

    def steps(outputs: Any) -> int:
        return int(outputs["metrics"]["timestep"][-1, -1].sum())  # each environment's own count

    def mean_return(outputs: Any) -> float:
        return float(np.asarray(outputs["metrics"]["returned_episode_returns"])[ends(outputs)][-WINDOW:].mean())

    return Peer(make_train(config), steps, mean_return, ends)


def rejax_peer(workload: Workload, num_iterations: int, learning_rate: float, record: bool) -> Peer:
    """rejax's PPO without its evaluations, which by default play 128 episodes each.

    `record`: for --solve, store the ends of episodes in the training state and return them after each iteration, in place of
    an evaluation. The schedule of the learning rate is one of optax, which rejax passes to Adam.
    """
    import optax
    from rejax import PPO
    from rejax.algos.algorithm import register_init

    class RecordingPPO(PPO):
        @register_init
        def initialize_ends(self, rng: jax.Array) -> dict[str, jax.Array]:
            return {"ends": jnp.zeros((self.num_steps, self.num_envs), dtype=bool)}

        def collect_trajectories(self, ts: Any) -> Any:
            ts, trajectories = super().collect_trajectories(ts)
            return ts.replace(ends=trajectories.done), trajectories

    total_timesteps = num_iterations * workload.batch_size
    num_updates = num_iterations * workload.update_epochs * workload.num_minibatches
    algo = (RecordingPPO if record else PPO).create(
        env="CartPole-v1",
        num_envs=workload.num_envs,
        num_steps=workload.num_steps,
        total_timesteps=total_timesteps,
        num_epochs=workload.update_epochs,
        num_minibatches=workload.num_minibatches,
        learning_rate=optax.linear_schedule(learning_rate, 0.0, num_updates),
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
        clip_eps=CLIP_COEF,
        ent_coef=ENT_COEF,
        vf_coef=VF_COEF,
        max_grad_norm=MAX_GRAD_NORM,
        agent_kwargs={"activation": "tanh", "hidden_layer_sizes": (64, 64)},
        eval_freq=workload.batch_size if record else total_timesteps,
        skip_initial_evaluation=True,
    )
    evaluate = algo.eval_callback  # 128 episodes of actions drawn from the policy

    def callback(algo: Any, ts: Any, rng: jax.Array) -> Any:
        return ts.ends if record else ()

    def mean_return(outputs: Any) -> float:
        _, returns = evaluate(algo, outputs[0], jax.random.key(0))
        return float(returns.mean())

    def steps(outputs: Any) -> int:
        return int(outputs[0].global_step)

    def ends(outputs: Any) -> np.ndarray:
        return np.asarray(outputs[1])

    return Peer(algo.replace(eval_callback=callback).train, steps, mean_return, ends)


def solved_iteration(ends: np.ndarray) -> int | None:
    """First iteration after which the last 100 returns average 475, counted from 1; None if there is none.

    ends: bool (iterations, T, N). CartPole pays 1 a step, so a return is an episode's length.
    """
    lengths, returns = np.zeros(ends.shape[2]), []
    for iteration, rollout in enumerate(ends, start=1):
        for ended in rollout:  # (N,)
            lengths += 1
            returns += lengths[ended].tolist()
            lengths[ended] = 0
        if len(returns) >= WINDOW and np.mean(returns[-WINDOW:]) >= SOLVED:
            return iteration
    return None


def process_age() -> float:
    """Seconds since this process was started, imports included (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def versions(checkout: Path | None) -> dict[str, str]:
    """Versions of Python and of the packages that matter; for PureJaxRL, its commit."""
    packages = ("jax", "jaxlib", "flax", "optax", "distrax", "gymnax", "rejax", "numpy")
    found = {"python": platform.python_version()} | {package: version(package) for package in packages}
    if checkout is not None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
            found["purejaxrl"] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return found


def parse_args() -> argparse.Namespace:
    """Parse the flags with argparse, which is built in and fast to import, for --solve."""
    parser = argparse.ArgumentParser(description="Time PureJaxRL or rejax; the last line of the output is one JSON object.")
    parser.add_argument("--peer", choices=("purejaxrl", "rejax"), required=True)
    parser.add_argument("--purejaxrl", type=Path, metavar="DIR", help="checkout of github.com/luchris429/purejaxrl")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), default="device8")
    parser.add_argument("--total-timesteps", type=int, help="rounded down to whole iterations; default: 500,000 or 2,000,000")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3, help="falls linearly to 0 over the run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compilation-cache", metavar="DIR", help="keep JAX's compiled programs there between runs")
    parser.add_argument(
        "--solve", action="store_true", help="seconds from process start until the last 100 returns average 475"
    )
    args = parser.parse_args()
    if args.peer == "purejaxrl" and not (args.purejaxrl and (args.purejaxrl / "purejaxrl" / "ppo.py").is_file()):
        parser.error("--peer purejaxrl needs --purejaxrl DIR, a checkout that has purejaxrl/ppo.py")
    args.total_timesteps = args.total_timesteps or WORKLOADS[args.workload].total_timesteps
    if args.total_timesteps < WORKLOADS[args.workload].batch_size:
        parser.error(f"--total-timesteps must be at least one iteration: {WORKLOADS[args.workload].batch_size}")
    return args


def main(args: argparse.Namespace) -> None:
    """Compile, run, check the peer's own count of steps, and print the JSON line."""
    workload = WORKLOADS[args.workload]
    num_iterations = args.total_timesteps // workload.batch_size
    env_steps = num_iterations * workload.batch_size
    if args.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", args.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if args.peer == "purejaxrl":
        peer = purejaxrl_peer(workload, num_iterations, args.learning_rate, args.purejaxrl)
    else:
        peer = rejax_peer(workload, num_iterations, args.learning_rate, record=args.solve)

    key = jax.random.key(args.seed)
    started = time.perf_counter()
    train = jax.jit(peer.train).lower(key).compile()
    compile_seconds, start_seconds = time.perf_counter() - started, process_age()
    if not args.solve:
        jax.block_until_ready(train(key))  # the first execution is not timed
    started = time.perf_counter()
    outputs = jax.block_until_ready(train(key))
    seconds = time.perf_counter() - started
    if peer.steps(outputs) != env_steps:
        raise RuntimeError(f"{args.peer} took {peer.steps(outputs)} steps, not {env_steps}")

    result = {"peer": args.peer, "workload": args.workload, "sps": env_steps / seconds, "compile_seconds": compile_seconds}
    result |= {"env_steps": env_steps, "seconds": seconds, "mean_return": peer.mean_return(outputs)}
    if args.solve:
        # The whole run is one program. The time of an iteration is its share of the run.
        iteration = solved_iteration(peer.ends(outputs))
        share = None if iteration is None else iteration / num_iterations
        result["start_seconds"] = start_seconds
        result["solve_seconds"] = None if share is None else start_seconds + share * seconds
        result["solve_steps"] = None if iteration is None else iteration * workload.batch_size
    result |= {"learning_rate": args.learning_rate, "seed": args.seed, "num_cpus": len(os.sched_getaffinity(0))}
    print(json.dumps(result | {"versions": versions(args.purejaxrl)}))


if __name__ == "__main__":
    main(parse_args())
