"""LSTM and GRU over sequences with episodes in them, held against torch.nn run on each episode by itself."""

import itertools

import pytest
import torch
from torch import nn

from fastppo.core.recurrence import NUM_GATES, NUM_STATES, STEPS, gru, gru_step, lstm, lstm_step
from fastppo.policy.rnn import Rnn

KINDS = pytest.mark.parametrize("kind", ["lstm", "gru"])
STEPS_T, NUMBER, USERS, WIDTH = 9, 3, 2, 4
# episodes begin in the middle, at the very start, in the last step, one right behind the other
FIRST = torch.tensor(
    [
        [False, True, True],
        [False, False, False],
        [True, False, False],
        [True, False, False],
        [False, False, False],
        [False, True, False],
        [False, False, False],
        [False, False, False],
        [True, False, False],
    ]
)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def example(kind, dtype=torch.float64):
    """Gates, weight, of a GRU its bias, then the state before: all with a gradient."""
    gates, parts = NUM_GATES[kind] * WIDTH, NUM_STATES[kind]
    shapes = [(STEPS_T, USERS, NUMBER, gates), (USERS, WIDTH, gates)]
    shapes += [(USERS, WIDTH)] if kind == "gru" else []
    shapes += [(USERS, NUMBER, WIDTH)] * parts
    return [random(*shape, seed=index, dtype=dtype).requires_grad_() for index, shape in enumerate(shapes)]


def run(kind, gates, weight, *rest, episode_start=FIRST, cells=STEPS):
    """All states after each step, (T, K, n, parts * H)."""
    if kind == "lstm":
        return torch.cat(lstm(gates, weight, episode_start, *rest, cells), -1)
    bias, h = rest
    return gru(gates, weight, bias, episode_start, h, cells)


def of_torch(kind, layers=1):
    return {"lstm": nn.LSTM, "gru": nn.GRU}[kind](5, WIDTH, layers).double()


def module_as_rnn(kind, modules, rnn):
    """Our weights, (K, ...), from a torch.nn module for each user. torch's matrices are (out, in); it has two biases a gate."""
    weights = {}
    for layer in range(rnn.num_layers):
        named = [{name: getattr(module, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh")} for module in modules]
        inputs = [getattr(module, f"bias_ih_l{layer}") for module in modules]
        hidden = [getattr(module, f"bias_hh_l{layer}") for module in modules]
        weights[f"rnn.{layer}.input.weight"] = torch.stack([each["weight_ih"].mT for each in named])
        weights[f"rnn.{layer}.hidden.weight"] = torch.stack([each["weight_hh"].mT for each in named])
        if kind == "lstm":
            weights[f"rnn.{layer}.input.bias"] = torch.stack([a + b for a, b in zip(inputs, hidden, strict=True)])
        else:  # of n, the hidden bias stays by itself: r multiplies it
            of_both = [torch.cat((b[: 2 * WIDTH], torch.zeros_like(b[2 * WIDTH :]))) for b in hidden]
            weights[f"rnn.{layer}.input.bias"] = torch.stack([a + b for a, b in zip(inputs, of_both, strict=True)])
            weights[f"rnn.{layer}.hidden.bias"] = torch.stack([b[2 * WIDTH :] for b in hidden])
    return weights


def episode_by_episode(module, x, state):
    """torch.nn over (T, n, D), each episode of each sequence by itself: outputs (T, n, H). state: before the first step."""
    outputs = []
    for n in range(NUMBER):
        starts = [0, *(t for t in range(1, STEPS_T) if FIRST[t, n]), STEPS_T]
        pieces = []
        for begin, end in itertools.pairwise(starts):
            before = None
            if begin == 0 and not FIRST[0, n]:
                before = tuple(part[:, n : n + 1] for part in state)
                before = before if len(before) == 2 else before[0]
            pieces.append(module(x[begin:end, n : n + 1], before)[0])
        outputs.append(torch.cat(pieces))
    return torch.cat(outputs, 1)


@KINDS
@pytest.mark.parametrize("layers", [1, 2])
def test_outputs_and_gradients_are_those_of_torch_on_split_sequences(kind, layers):
    """Two users with weights of their own, several layers, a state before: outputs, and the gradient of every weight."""
    torch.manual_seed(0)
    modules = [of_torch(kind, layers) for _ in range(USERS)]
    rnn = Rnn(kind, 5, WIDTH, layers, USERS)
    x = random(STEPS_T, NUMBER, 5, seed=7)
    rnn_state = random(NUMBER, rnn.rnn_state_size, seed=8)
    # (n, S) as it is said to be: user by user, layer by layer, h and c
    states = rnn_state.view(NUMBER, USERS, layers, NUM_STATES[kind], WIDTH).permute(1, 3, 2, 0, 4)  # (K, parts, L, n, H)
    expected = torch.stack([episode_by_episode(module, x, states[k]) for k, module in enumerate(modules)])  # (K, T, n, H)
    goal = random(*expected.shape, seed=9)
    (expected * goal).sum().backward()

    with torch.no_grad():
        weights = {name: weight.clone() for name, weight in module_as_rnn(kind, modules, rnn).items()}
    leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
    out, after = rnn.unroll(leaves, x, FIRST, rnn_state, STEPS)
    out = out.unflatten(1, (STEPS_T, NUMBER))
    torch.testing.assert_close(out, expected)
    # the last layer's h is what comes out
    last = after.view(STEPS_T, NUMBER, USERS, layers, NUM_STATES[kind], WIDTH)[:, :, :, -1, 0]
    assert torch.equal(last.permute(2, 0, 1, 3), out)
    (out * goal).sum().backward()
    for layer in range(layers):
        for name, ours in (("weight_ih", "input.weight"), ("weight_hh", "hidden.weight"), ("bias_ih", "input.bias")):
            grads = [getattr(module, f"{name}_l{layer}").grad for module in modules]
            theirs = torch.stack([grad.mT if grad.ndim == 2 else grad for grad in grads])
            torch.testing.assert_close(leaves[f"rnn.{layer}.{ours}"].grad, theirs)
        if kind == "gru":
            theirs = torch.stack([getattr(module, f"bias_hh_l{layer}").grad[2 * WIDTH :] for module in modules])
            torch.testing.assert_close(leaves[f"rnn.{layer}.hidden.bias"].grad, theirs)


@KINDS
def test_gradients_are_those_of_finite_differences(kind):
    """Of everything that goes in, the state before included, through every state that comes out."""
    assert torch.autograd.gradcheck(lambda *args: run(kind, *args), example(kind))


@KINDS
def test_an_end_in_the_middle_is_two_sequences(kind):
    """Steps from an episode's start on know nothing of those before: neither states nor gradients cross it."""
    gates, weight, *rest = example(kind)
    episode_start = torch.zeros_like(FIRST)
    episode_start[4] = True
    goal = random(*run(kind, gates, weight, *rest).shape, seed=20)
    inputs = (gates, weight, *rest)
    whole = run(kind, *inputs, episode_start=episode_start)
    grads = torch.autograd.grad((whole * goal).sum(), inputs)

    parts = NUM_STATES[kind]
    state, bias = rest[-parts:], rest[:-parts]
    nothing = [torch.zeros_like(part) for part in state]
    halves = [
        run(kind, gates[:4], weight, *bias, *state, episode_start=episode_start[:4]),
        run(kind, gates[4:], weight, *bias, *nothing, episode_start=torch.zeros_like(episode_start[4:])),
    ]
    assert torch.equal(whole, torch.cat(halves))
    apart = torch.autograd.grad(sum((half * part).sum() for half, part in zip(halves, goal.split([4, 5]), strict=True)), inputs)
    for one, other in zip(grads, apart, strict=True):
        torch.testing.assert_close(one, other)


@KINDS
def test_steps_are_what_sequences_are_made_of(kind):
    """One step by itself, with the state zeroed where an episode begins, gives what the whole sequence has there."""
    gates, weight, *rest = (x.detach() for x in example(kind))
    states = run(kind, gates, weight, *rest)
    state = rest[-NUM_STATES[kind] :]
    for t in range(STEPS_T):
        state = [torch.where(FIRST[t][None, :, None], 0.0, part) for part in state]
        if kind == "lstm":
            *state, _ = lstm_step(gates[t], weight, *state)
        else:
            state = [gru_step(gates[t], weight, rest[0], *state)[0]]
        assert torch.equal(torch.cat(state, -1), states[t])


@KINDS
def test_functional_gradients_are_the_same(kind):
    """torch.func.grad, which compiled programs take, and that over seeds (vmap): autograd's numbers."""
    inputs = example(kind)
    goal = random(*run(kind, *inputs).shape, seed=30)

    def loss(*args):
        return (run(kind, *args) * goal).sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    detached = [x.detach() for x in inputs]
    every = tuple(range(len(inputs)))
    for one, other in zip(torch.func.grad(loss, every)(*detached), expected, strict=True):
        torch.testing.assert_close(one, other)
    two = [torch.stack((x, 0.5 * x)) for x in detached]
    mapped = torch.func.vmap(torch.func.grad(loss, every))(*two)
    alone = [torch.func.grad(loss, every)(*(0.5 * x for x in detached)), expected]
    for both, half, whole in zip(mapped, *alone, strict=True):
        torch.testing.assert_close(both, torch.stack((whole, half)))
