"""Gymnasium's classic control on the device: CartPole, Acrobot, MountainCar, MountainCarContinuous, Pendulum.

Each follows gymnasium 1.4.0's file of that name (gymnasium/envs/classic_control) expression by expression. Gymnasium computes
in float64, these in the dtype of their state: float64 agrees with gymnasium to the last digits, one float32 step differs from
its step by less than 1e-6 (CartPole, MountainCar, MountainCarContinuous), 1e-5 (Pendulum, at 70 rad), and for Acrobot 2e-7
typically, 1e-4 in 99 % of states, 1e-2 at its highest speeds, where its Runge-Kutta step multiplies any rounding
(tests/test_device_envs.py). Arguments are those of gymnasium's constructors, and `max_episode_steps`.

States are NamedTuples of (N,) tensors: every operation then runs over contiguous memory. Knows nothing of how it is wrapped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray
from torch import Tensor

from fastppo.envs.device import DeviceEnv
from fastppo.errors import UsageError


class CartPoleState(NamedTuple):
    """Each (N,)."""

    x: Tensor  # m
    x_dot: Tensor  # m/s
    theta: Tensor  # rad from upright
    theta_dot: Tensor  # rad/s


@dataclass(frozen=True)
class CartPole:
    """A pole on a cart, pushed left (0) or right (1) with 10 N (Barto, Sutton, Anderson, 1983; dynamics: Florian, 2007).

    Reward 1 a step; with `sutton_barto_reward` 0, and -1 where the pole falls. Terminated beyond 12 degrees or 2.4 m.
    """

    sutton_barto_reward: bool = False
    max_episode_steps: int | None = 500

    GRAVITY: ClassVar[float] = 9.8
    MASS: ClassVar[float] = 0.1 + 1.0  # of pole and cart
    POLE_MASS: ClassVar[float] = 0.1
    HALF_LENGTH: ClassVar[float] = 0.5
    FORCE: ClassVar[float] = 10.0
    TAU: ClassVar[float] = 0.02  # s
    X_LIMIT: ClassVar[float] = 2.4
    THETA_LIMIT: ClassVar[float] = 12 * 2 * math.pi / 360
    HIGH: ClassVar[NDArray[np.float32]] = np.array([2 * X_LIMIT, np.inf, 2 * THETA_LIMIT, np.inf], np.float32)

    num_random: ClassVar[int] = 4
    render_fps: ClassVar[int] = 50
    observation_space: ClassVar[gym.Space[Any]] = Box(-HIGH, HIGH, dtype=np.float32)
    action_space: ClassVar[gym.Space[Any]] = Discrete(2)

    def reset(self, random: Tensor) -> tuple[CartPoleState, Tensor]:
        state = 0.1 * random - 0.05  # (N, 4)
        return CartPoleState(*state.unbind(-1)), state

    def step(
        self, state: CartPoleState, action: Tensor, random: Tensor
    ) -> tuple[CartPoleState, Tensor, Tensor, Tensor, Tensor]:
        x, x_dot, theta, theta_dot = state
        force = (2.0 * self.FORCE) * action.to(x.dtype) - self.FORCE
        costheta, sintheta = torch.cos(theta), torch.sin(theta)
        pole_moment = self.POLE_MASS * self.HALF_LENGTH
        temp = (force + pole_moment * theta_dot.square() * sintheta) / self.MASS
        thetaacc = (self.GRAVITY * sintheta - costheta * temp) / (
            self.HALF_LENGTH * (4.0 / 3.0 - self.POLE_MASS * costheta.square() / self.MASS)
        )
        xacc = temp - pole_moment * thetaacc * costheta / self.MASS
        new = CartPoleState(
            x + self.TAU * x_dot, x_dot + self.TAU * xacc, theta + self.TAU * theta_dot, theta_dot + self.TAU * thetaacc
        )
        terminated = (new.x.abs() > self.X_LIMIT) | (new.theta.abs() > self.THETA_LIMIT)
        reward = -terminated.to(x.dtype) if self.sutton_barto_reward else torch.ones_like(x)
        return new, torch.stack(new, -1), reward, terminated, torch.zeros_like(terminated)

    def render_frame(self, state: CartPoleState) -> NDArray[np.uint8]:
        return _render("CartPole-v1", state=np.array(state, np.float64))


class AcrobotState(NamedTuple):
    """Each (N,)."""

    theta1: Tensor  # rad, 0 hangs down
    theta2: Tensor  # rad, relative to the first link
    theta1_dot: Tensor  # rad/s
    theta2_dot: Tensor  # rad/s


@dataclass(frozen=True)
class Acrobot:
    """Two links; a torque of -1, 0 or +1 Nm at the joint between them swings the tip above a line (Sutton, 1996).

    The book's equations, one Runge-Kutta step of 0.2 s. Reward -1 a step, 0 on the one that reaches the line and terminates.
    """

    max_episode_steps: int | None = 500

    DT: ClassVar[float] = 0.2  # s
    MAX_VELOCITY_1: ClassVar[float] = 4 * math.pi
    MAX_VELOCITY_2: ClassVar[float] = 9 * math.pi
    HIGH: ClassVar[NDArray[np.float32]] = np.array([1, 1, 1, 1, MAX_VELOCITY_1, MAX_VELOCITY_2], np.float32)

    num_random: ClassVar[int] = 4
    render_fps: ClassVar[int] = 15
    observation_space: ClassVar[gym.Space[Any]] = Box(-HIGH, HIGH, dtype=np.float32)
    action_space: ClassVar[gym.Space[Any]] = Discrete(3)

    def reset(self, random: Tensor) -> tuple[AcrobotState, Tensor]:
        state = AcrobotState(*(0.2 * random - 0.1).unbind(-1))
        return state, self._observe(state)[0]

    def step(self, state: AcrobotState, action: Tensor, random: Tensor) -> tuple[AcrobotState, Tensor, Tensor, Tensor, Tensor]:
        torque = action.to(state.theta1.dtype) - 1.0
        k1 = self._derivative(state, torque)
        k2 = self._derivative(_along(state, 0.5 * self.DT, k1), torque)
        k3 = self._derivative(_along(state, 0.5 * self.DT, k2), torque)
        k4 = self._derivative(_along(state, self.DT, k3), torque)
        slope = AcrobotState(*(a + 2.0 * b + 2.0 * c + d for a, b, c, d in zip(k1, k2, k3, k4, strict=True)))
        theta1, theta2, theta1_dot, theta2_dot = _along(state, self.DT / 6.0, slope)
        new = AcrobotState(
            _wrap(theta1),
            _wrap(theta2),
            theta1_dot.clamp(-self.MAX_VELOCITY_1, self.MAX_VELOCITY_1),
            theta2_dot.clamp(-self.MAX_VELOCITY_2, self.MAX_VELOCITY_2),
        )
        obs, height = self._observe(new)
        terminated = height > 1.0
        return new, obs, terminated.to(height.dtype) - 1.0, terminated, torch.zeros_like(terminated)

    def render_frame(self, state: AcrobotState) -> NDArray[np.uint8]:
        return _render("Acrobot-v1", state=np.array(state, np.float64))

    @staticmethod
    def _observe(state: AcrobotState) -> tuple[Tensor, Tensor]:
        """The observation (N, 6) and the height of the tip above the pivot (N,), m."""
        cos1, sin1 = torch.cos(state.theta1), torch.sin(state.theta1)
        cos2, sin2 = torch.cos(state.theta2), torch.sin(state.theta2)
        height = -cos1 - (cos1 * cos2 - sin1 * sin2)  # -cos(theta1) - cos(theta1 + theta2)
        return torch.stack((cos1, sin1, cos2, sin2, state.theta1_dot, state.theta2_dot), -1), height

    @staticmethod
    def _derivative(state: AcrobotState, torque: Tensor) -> AcrobotState:
        """d(state)/dt. Gymnasium's expressions with its masses, lengths and inertias of 1, centres of mass at 0.5 and g = 9.8

        put in, and its cos(angle - pi/2) written as sin(angle).
        """
        theta1, theta2, theta1_dot, theta2_dot = state
        cos2, sin2 = torch.cos(theta2), torch.sin(theta2)
        d1 = 3.5 + cos2
        d2 = 1.25 + 0.5 * cos2
        phi2 = 4.9 * torch.sin(theta1 + theta2)
        phi1 = -0.5 * theta2_dot.square() * sin2 - theta2_dot * theta1_dot * sin2 + 14.7 * torch.sin(theta1) + phi2
        ratio = d2 / d1
        theta2_acc = (torque + ratio * phi1 - 0.5 * theta1_dot.square() * sin2 - phi2) / (1.25 - d2 * ratio)
        theta1_acc = -(d2 * theta2_acc + phi1) / d1
        return AcrobotState(theta1_dot, theta2_dot, theta1_acc, theta2_acc)


def _along(state: AcrobotState, step: float, slope: AcrobotState) -> AcrobotState:
    return AcrobotState(*(value + step * change for value, change in zip(state, slope, strict=True)))


def _wrap(angle: Tensor) -> Tensor:
    """The same angle within [-pi, pi]."""
    return angle - 2 * math.pi * torch.round(angle / (2 * math.pi))


class MountainCarState(NamedTuple):
    """Each (N,)."""

    position: Tensor
    velocity: Tensor  # a step


def _drive(state: MountainCarState, push: Tensor) -> MountainCarState:
    """Both cars' hill (Moore, 1990): a push (N,) against gravity, at most 0.07 a step, with a wall at -1.2."""
    velocity = (state.velocity + (push - 0.0025 * torch.cos(3.0 * state.position))).clamp(-0.07, 0.07)
    position = (state.position + velocity).clamp(-1.2, 0.6)
    return MountainCarState(position, velocity.masked_fill((position <= -1.2) & (velocity < 0.0), 0.0))


def _park(random: Tensor) -> tuple[MountainCarState, Tensor]:
    """Both cars' first states, at rest in the valley."""
    position = 0.2 * random[..., 0] - 0.6
    state = MountainCarState(position, torch.zeros_like(position))
    return state, torch.stack(state, -1)


@dataclass(frozen=True)
class MountainCar:
    """A car too weak for its hill, pushed left (0), not (1) or right (2). Reward -1 a step.

    Terminated at position 0.5 with at least `goal_velocity`.
    """

    goal_velocity: float = 0.0
    max_episode_steps: int | None = 200

    num_random: ClassVar[int] = 1
    render_fps: ClassVar[int] = 30
    observation_space: ClassVar[gym.Space[Any]] = Box(
        np.array([-1.2, -0.07], np.float32), np.array([0.6, 0.07], np.float32), dtype=np.float32
    )
    action_space: ClassVar[gym.Space[Any]] = Discrete(3)

    def reset(self, random: Tensor) -> tuple[MountainCarState, Tensor]:
        return _park(random)

    def step(
        self, state: MountainCarState, action: Tensor, random: Tensor
    ) -> tuple[MountainCarState, Tensor, Tensor, Tensor, Tensor]:
        new = _drive(state, 0.001 * (action.to(state.position.dtype) - 1.0))
        terminated = (new.position >= 0.5) & (new.velocity >= self.goal_velocity)
        reward = torch.full_like(new.position, -1.0)
        return new, torch.stack(new, -1), reward, terminated, torch.zeros_like(terminated)

    def render_frame(self, state: MountainCarState) -> NDArray[np.uint8]:
        return _render("MountainCar-v0", state=np.array(state, np.float64))


@dataclass(frozen=True)
class MountainCarContinuous:
    """The same hill with a push of the action, clipped to [-1, 1], times 0.0015.

    Reward -0.1 action^2 (as given, not as clipped: gymnasium's way) and 100 on the step that terminates: position 0.45 with at
    least `goal_velocity`.
    """

    goal_velocity: float = 0.0
    max_episode_steps: int | None = 999

    num_random: ClassVar[int] = 1
    render_fps: ClassVar[int] = 30
    observation_space: ClassVar[gym.Space[Any]] = MountainCar.observation_space
    action_space: ClassVar[gym.Space[Any]] = Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, random: Tensor) -> tuple[MountainCarState, Tensor]:
        return _park(random)

    def step(
        self, state: MountainCarState, action: Tensor, random: Tensor
    ) -> tuple[MountainCarState, Tensor, Tensor, Tensor, Tensor]:
        force = action[..., 0]
        new = _drive(state, 0.0015 * force.clamp(-1.0, 1.0))
        terminated = (new.position >= 0.45) & (new.velocity >= self.goal_velocity)
        reward = 100.0 * terminated.to(force.dtype) - 0.1 * force.square()
        return new, torch.stack(new, -1), reward, terminated, torch.zeros_like(terminated)

    def render_frame(self, state: MountainCarState) -> NDArray[np.uint8]:
        return _render("MountainCarContinuous-v0", state=np.array(state, np.float64))


class PendulumState(NamedTuple):
    """Each (N,)."""

    theta: Tensor  # rad from upright, not wrapped
    theta_dot: Tensor  # rad/s
    torque: Tensor  # Nm of the last step, for rendering only


@dataclass(frozen=True)
class Pendulum:
    """A pendulum swung up and held by a torque, clipped to [-2, 2] Nm; `g` in m/s^2. Never terminates.

    Reward -(theta^2 + 0.1 theta_dot^2 + 0.001 torque^2) of the state before the step, theta wrapped to [-pi, pi).
    """

    g: float = 10.0
    max_episode_steps: int | None = 200

    DT: ClassVar[float] = 0.05  # s
    MAX_SPEED: ClassVar[float] = 8.0
    MAX_TORQUE: ClassVar[float] = 2.0
    HIGH: ClassVar[NDArray[np.float32]] = np.array([1.0, 1.0, MAX_SPEED], np.float32)

    num_random: ClassVar[int] = 2
    render_fps: ClassVar[int] = 30
    observation_space: ClassVar[gym.Space[Any]] = Box(-HIGH, HIGH, dtype=np.float32)
    action_space: ClassVar[gym.Space[Any]] = Box(-MAX_TORQUE, MAX_TORQUE, (1,), np.float32)

    def reset(self, random: Tensor) -> tuple[PendulumState, Tensor]:
        theta, theta_dot = (2.0 * random - 1.0).unbind(-1)
        theta = math.pi * theta
        return PendulumState(theta, theta_dot, torch.zeros_like(theta)), self._observe(theta, theta_dot)

    def step(
        self, state: PendulumState, action: Tensor, random: Tensor
    ) -> tuple[PendulumState, Tensor, Tensor, Tensor, Tensor]:
        theta, theta_dot, _ = state
        torque = action[..., 0].clamp(-self.MAX_TORQUE, self.MAX_TORQUE)
        cost = _wrap(theta).square() + 0.1 * theta_dot.square() + 0.001 * torque.square()
        acceleration = (3.0 * self.g / 2.0) * torch.sin(theta) + 3.0 * torque
        theta_dot = (theta_dot + acceleration * self.DT).clamp(-self.MAX_SPEED, self.MAX_SPEED)
        theta = theta + theta_dot * self.DT
        going_on = torch.zeros_like(theta, dtype=torch.bool)
        state = PendulumState(theta, theta_dot, torque)
        return state, self._observe(theta, theta_dot), -cost, going_on, torch.zeros_like(going_on)

    def render_frame(self, state: PendulumState) -> NDArray[np.uint8]:
        theta, theta_dot, torque = (float(value) for value in state)
        return _render("Pendulum-v1", state=np.array([theta, theta_dot]), last_u=torque)

    @staticmethod
    def _observe(theta: Tensor, theta_dot: Tensor) -> Tensor:
        return torch.stack((torch.cos(theta), torch.sin(theta), theta_dot), -1)


CLASSIC: dict[str, Callable[..., DeviceEnv]] = {
    "Acrobot-v1": Acrobot,
    "CartPole-v0": partial(CartPole, max_episode_steps=200),
    "CartPole-v1": CartPole,
    "MountainCar-v0": MountainCar,
    "MountainCarContinuous-v0": MountainCarContinuous,
    "Pendulum-v1": Pendulum,
}


@cache
def _renderer(env_id: str) -> gym.Env[Any, Any]:
    """Gymnasium's own environment, for rendering."""
    return gym.make(env_id, render_mode="rgb_array").unwrapped


def _render(env_id: str, **attributes: Any) -> NDArray[np.uint8]:
    """Gymnasium's image (H, W, 3) of `env_id` with these attributes set; raises UsageError without pygame."""
    renderer = _renderer(env_id)
    for name, value in attributes.items():
        setattr(renderer, name, value)
    try:
        frame: Any = renderer.render()
    except gym.error.DependencyNotInstalled:
        raise UsageError(f'rendering {env_id} needs pygame: pip install "gymnasium[classic-control]"') from None
    return np.asarray(frame, np.uint8)
