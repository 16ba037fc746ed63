"""How many threads eager learning uses: as many as help, which is measured.

After an operation a thread of OpenMP waits for the others in a loop that keeps its core busy. Where other processes want the
cores too, the thread that it waits for may have none: beside two busy processes on two cores, minibatches of 128 rows through
two layers of 256 took 9 to 13 times as long with two threads as with one, and 1.1 to 1.25 times where waiting threads sleep
(OMP_WAIT_POLICY=passive, which is read when torch is loaded: benchmarks/LOG.md).

The number of threads changes the order of sums, and so the last bits. It is chosen before the first iteration, on data that are
thrown away, and a run keeps it in summary.json; `Watch`, which may change it later, adds that there.
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
TRIAL_SECONDS = 0.5  # after which no round is begun
CLEARLY = 1.2  # times as long, before fewer threads are taken
SUSPICIOUS = 3.0  # times as long as the fastest iteration's learning
PATIENCE = 3  # such iterations in a row before there is another trial; twice as many after each that changed nothing


@dataclass(frozen=True)
class Choice:
    """So many threads are fastest, and the most that there might be take `slower` times as long."""

    number: int
    most: int
    slower: float

    @property
    def note(self) -> str | None:
        """A line where they are fewer than might be."""
        if self.number == self.most:
            return None
        number = f"{self.number} thread{'s' * (self.number > 1)}"
        return (
            f"learning with {number}: {self.most} take {self.slower:.1f} times as long, as they do on a busy machine "
            f"(--num-threads {self.most} keeps them)"
        )


def choose(trial: Callable[[], object], most: int, clock: Callable[[], float] = time.perf_counter) -> Choice:
    """Time `trial` with `most` threads, half of them, and so on down to one. torch's number is afterwards what it was.

    clock: seconds.
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
            run(number)  # the first time there are threads to start and memory to find
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
    """What takes most of the time of `learn`: forward and backward through the networks, for `rows` rows of zeros.

    rows: of a minibatch; a policy with memory takes them as sequences of num_steps.
    """
    remembers = isinstance(network, RecurrentActorCritic)
    shape = (num_steps, max(rows // num_steps, 1)) if remembers else (rows, 1)
    rollout = dict(allocate_rollout(shape[0], shape[1], obs, action, False, params.device, None, remembers)[:-1].items())
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
    """Between iterations: goes on with fewer threads where the machine has become busy, and tells so."""

    def __init__(
        self,
        trial: Callable[[], object],
        note: Callable[[str], None],
        made_with: dict[str, str],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """made_with: what the run says of itself, see reproducibility.made_with; a change is written into it."""
        self._trial, self._note, self._made_with, self._clock = trial, note, made_with, clock
        self._fastest = float("inf")
        self._slow, self._patience = 0, PATIENCE

    def update(self, iteration: int, seconds: float) -> None:
        """seconds: that the iteration's learning took."""
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
