"""Choose the number of threads for eager learning by measurement.

After each operation, OpenMP threads wait for each other in a busy loop. If other processes use the cores too, the last thread
may get no core. This was measured on two cores with two busy processes, minibatches of 128 rows and two layers of 256 units.
Two threads took 9 to 13 times as long as one. They took 1.1 to 1.25 times as long if waiting threads sleep
(OMP_WAIT_POLICY=passive, which is read when torch is loaded: benchmarks/LOG.md).

The number of threads changes the order of sums, and so the last bits. It is chosen before the first iteration on dummy data and
recorded in summary.json. `Watch` may change it later and records that too.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from fastppo.core.contracts import obs_of
from fastppo.core.gradient import grad_and_aux
from fastppo.core.recurrence import STEPS
from fastppo.policy.network import Network
from fastppo.policy.rnn import RecurrentActorCritic
from fastppo.policy.spaces import ActionSpec, ObsSpec
from fastppo.rollout.storage import allocate_rollout

ROUNDS = 5
TRIAL_SECONDS = 0.5  # no new round starts after this time
CLEARLY = 1.2  # factor by which fewer threads must be faster
SUSPICIOUS = 3.0  # factor over the fastest iteration's learning time
PATIENCE = 3  # such iterations in a row before another trial; doubled after each trial


@dataclass(frozen=True)
class Choice:
    """The result of a trial: `number` threads are fastest, and `most` threads take `slower` times as long."""

    number: int
    most: int
    slower: float

    @property
    def note(self) -> str | None:
        """A line for the user if fewer threads than the maximum are used."""
        if self.number == self.most:
            return None
        number = f"{self.number} thread{'s' * (self.number > 1)}"
        return (
            f"learning with {number}: {self.most} take {self.slower:.1f} times as long, as they do on a busy machine "
            f"(--num-threads {self.most} keeps them)"
        )


def choose(trial: Callable[[], object], most: int, clock: Callable[[], float] = time.perf_counter) -> Choice:
    """Time `trial` with `most` threads, half as many, and so on down to one. Restores torch's number of threads.

    clock: returns seconds.
    """
    before = torch.get_num_threads()
    numbers = [most]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    seconds: dict[int, list[float]] = {number: [] for number in numbers}

    def run(number: int) -> float:
        torch.set_num_threads(number)
        started = clock()
        trial()
        return clock() - started

    try:
        for number in numbers:
            run(number)  # warm-up: starts threads and allocates memory
        started = clock()
        for _ in range(ROUNDS):
            for number in numbers:
                seconds[number].append(run(number))
            if clock() - started > TRIAL_SECONDS:
                break
    finally:
        torch.set_num_threads(before)
    typical = {number: median(taken) for number, taken in seconds.items()}
    fastest = min(numbers, key=typical.__getitem__)
    slower = typical[most] / max(typical[fastest], 1e-9)
    return Choice(fastest, most, slower) if slower > CLEARLY else Choice(most, most, 1.0)


def minibatch_of(
    network: Network, params: Tensor, obs: ObsSpec, action: ActionSpec, rows: int, num_steps: int
) -> Callable[[], object]:
    """A trial for `choose`: forward and backward pass on a minibatch of zeros, which is most of the work in `learn`.

    rows: rows of the minibatch. A recurrent policy gets them as sequences of num_steps.
    """
    remembers = isinstance(network, RecurrentActorCritic)
    shape = (num_steps, max(rows // num_steps, 1)) if remembers else (rows, 1)
    rollout = dict(allocate_rollout(shape[0], shape[1], obs, action, False, params.device, None, remembers)[:-1].items())
    # observations of 64 bits are normalised to float32 before the network sees them
    rollout = {key: x.float() if x.dtype == torch.float64 else x for key, x in rollout.items()}
    rnn_state = params.new_zeros(shape[1], network.rnn_state_size)

    def loss(params: Tensor) -> tuple[Tensor, Tensor]:
        weights, seen = network.weights(params), obs_of(rollout)
        if isinstance(network, RecurrentActorCritic):
            dist, value, _ = network.unroll(weights, seen, rollout["episode_start"], rnn_state, STEPS)
        else:
            dist, value = network.actor_critic(weights, seen)
        total = (network.log_prob(dist, rollout["action"]) + network.entropy(dist) + value).sum()
        return total, total.detach()

    return lambda: grad_and_aux(loss, params)


class Watch:
    """Reduces the number of threads between iterations if the machine has become busy, and prints a line."""

    def __init__(
        self,
        trial: Callable[[], object],
        note: Callable[[str], None],
        made_with: dict[str, str],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """made_with: the result of reproducibility.made_with. A change of threads is added to it."""
        self._trial, self._note, self._made_with, self._clock = trial, note, made_with, clock
        self._fastest = float("inf")
        self._slow, self._patience = 0, PATIENCE

    def update(self, iteration: int, seconds: float) -> None:
        """seconds: learning time of the iteration."""
        number = torch.get_num_threads()
        self._fastest = min(self._fastest, seconds)
        self._slow = self._slow + 1 if seconds > SUSPICIOUS * self._fastest else 0
        if number == 1 or self._slow < self._patience:
            return
        self._slow, self._patience = 0, 2 * self._patience
        choice = choose(self._trial, number, self._clock)
        if choice.note is None:
            return
        torch.set_num_threads(choice.number)
        self._made_with["eager threads"] += f", {choice.number} from iteration {iteration + 1} on"
        self._note(choice.note)
