"""The yardstick: a common PPO, as one eager loop over torch.nn modules and torch.optim.

It has the algorithm, networks and bookkeeping of CleanRL's ppo.py and ppo_continuous_action.py, on the same vector environment
as fastppo, so that both can be timed in one run on one machine. It shares no code with fastppo.
Run it alone: python benchmarks/yardstick.py --total-timesteps 100000
"""

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Categorical, Normal


@dataclass(frozen=True)
class YardstickConfig:
    """A plain, eager PPO loop. The last line of the output is one JSON object."""

    env_id: str = "CartPole-v1"
    """Gymnasium id."""
    num_envs: int = 8
    """N."""
    num_steps: int = 128
    """T."""
    num_minibatches: int = 4
    """Minibatches per epoch."""
    update_epochs: int = 4
    """E."""
    total_timesteps: int = 100_000
    """Rows to collect, autoreset rows included, as CleanRL counts them."""
    learning_rate: float = 2.5e-3
    """Adam's step size, annealed to 0."""
    seed: int = 1
    """Seed."""
    cleanrl_envs: bool = False
    """CleanRL's own environments, SyncVectorEnv of RecordEpisodeStatistics, instead of the vector environment fastppo uses."""
    num_threads: int = 1
    """torch's threads: one measures best at this size on two cores."""


def layer_init(layer: nn.Linear, std: float = math.sqrt(2), bias: float = 0.0) -> nn.Linear:
    """Orthogonal weights, constant bias."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias)
    return layer


def mlp(inputs: int, outputs: int, std: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units."""
    return nn.Sequential(
        layer_init(nn.Linear(inputs, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, outputs), std),
    )


class Agent(nn.Module):
    """Separate networks for actor and critic."""

    def __init__(self, obs_size: int, action_space: gym.Space) -> None:
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        actions = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        self.critic = mlp(obs_size, 1, 1.0)
        self.actor = mlp(obs_size, actions, 0.01)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(1, actions))

    def get_value(self, x):
        return self.critic(x)

    def get_action_and_value(self, x, action=None):
        out = self.actor(x)
        dist = Categorical(logits=out) if self.discrete else Normal(out, self.log_std.expand_as(out).exp())
        if action is None:
            action = dist.sample()
        log_prob, entropy = dist.log_prob(action), dist.entropy()
        if not self.discrete:
            log_prob, entropy = log_prob.sum(1), entropy.sum(1)
        return action, log_prob, entropy, self.critic(x)


def fastest_sps(seconds: Sequence[float], steps: Sequence[int]) -> float:
    """Steps per second in the fastest iteration: the speed while no other process uses the machine.

    seconds, steps: time and number of steps so far, at the end of each iteration.
    """
    ended = list(zip(seconds, steps, strict=True))
    return max((after[1] - before[1]) / (after[0] - before[0]) for before, after in itertools.pairwise(ended))


def run(config: YardstickConfig) -> dict[str, float | int | str]:
    """Train and time it: steps per second from the second iteration on (the first one warms up)."""
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    T, N = config.num_steps, config.num_envs  # noqa: N806
    batch_size = T * N
    minibatch_size = batch_size // config.num_minibatches
    num_iterations = max(2, config.total_timesteps // batch_size)
    gamma, gae_lambda, clip_coef, vf_coef, max_grad_norm = 0.99, 0.95, 0.2, 0.5, 0.5

    if config.cleanrl_envs:
        envs = gym.vector.SyncVectorEnv([lambda: gym.wrappers.RecordEpisodeStatistics(gym.make(config.env_id))] * N)
    else:
        envs = gym.make_vec(config.env_id, num_envs=N)
    action_space = envs.single_action_space
    agent = Agent(int(np.prod(envs.single_observation_space.shape)), action_space)
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.learning_rate, eps=1e-5)

    obs = torch.zeros((T, N, *envs.single_observation_space.shape))
    actions = torch.zeros((T, N, *action_space.shape))
    log_probs, rewards, dones, values = (torch.zeros((T, N)) for _ in range(4))
    episode_return, episode_returns = np.zeros(N), []

    next_obs = torch.as_tensor(envs.reset(seed=config.seed)[0], dtype=torch.float32)
    next_done = torch.zeros(N)
    ended: list[float] = []
    for iteration in range(1, num_iterations + 1):
        optimizer.param_groups[0]["lr"] = (1.0 - (iteration - 1.0) / num_iterations) * config.learning_rate

        for step in range(T):
            obs[step] = next_obs
            dones[step] = next_done
            with torch.no_grad():
                action, log_prob, _, value = agent.get_action_and_value(next_obs)
                values[step] = value.flatten()
            actions[step] = action
            log_probs[step] = log_prob
            env_action = action.numpy() if agent.discrete else np.clip(action.numpy(), action_space.low, action_space.high)
            observed, reward, terminated, truncated, _ = envs.step(env_action)
            done = np.logical_or(terminated, truncated)
            rewards[step] = torch.as_tensor(reward, dtype=torch.float32)
            next_obs = torch.as_tensor(observed, dtype=torch.float32)
            next_done = torch.as_tensor(done, dtype=torch.float32)
            episode_return += reward
            for index in np.flatnonzero(done):
                episode_returns.append(float(episode_return[index]))
                episode_return[index] = 0.0

        with torch.no_grad():
            next_value = agent.get_value(next_obs).reshape(1, -1)
            advantages = torch.zeros_like(rewards)
            last = 0.0
            for t in reversed(range(T)):
                alive = 1.0 - (next_done if t == T - 1 else dones[t + 1])
                following = next_value if t == T - 1 else values[t + 1]
                delta = rewards[t] + gamma * following * alive - values[t]
                advantages[t] = last = delta + gamma * gae_lambda * alive * last
            returns = advantages + values

        b_obs = obs.reshape((-1, *envs.single_observation_space.shape))
        b_actions = actions.reshape((-1, *action_space.shape))
        b_log_probs, b_advantages = log_probs.reshape(-1), advantages.reshape(-1)
        b_returns = returns.reshape(-1)
        clip_fractions = []
        indices = np.arange(batch_size)
        for _ in range(config.update_epochs):
            np.random.shuffle(indices)
            for start in range(0, batch_size, minibatch_size):
                index = indices[start : start + minibatch_size]
                picked = b_actions[index].long() if agent.discrete else b_actions[index]
                _, new_log_prob, entropy, new_value = agent.get_action_and_value(b_obs[index], picked)
                log_ratio = new_log_prob - b_log_probs[index]
                ratio = log_ratio.exp()
                with torch.no_grad():
                    clip_fractions.append(((ratio - 1.0).abs() > clip_coef).float().mean().item())
                advantage = b_advantages[index]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef)).mean()
                value_loss = (new_value.view(-1) - b_returns[index]).square().mean()
                loss = policy_loss + vf_coef * value_loss - 0.0 * entropy.mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
                optimizer.step()
        ended.append(time.perf_counter())
    seconds = ended[-1] - ended[0]
    steps = (num_iterations - 1) * batch_size
    envs.close()
    return {
        "env_id": config.env_id,
        "sps": steps / seconds,
        "fastest_sps": fastest_sps(ended, range(batch_size, num_iterations * batch_size + 1, batch_size)),
        "env_steps": steps,
        "seconds": seconds,
        "episodic_return_mean": float(np.mean(episode_returns[-100:])) if episode_returns else math.nan,
    }


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(YardstickConfig))))
