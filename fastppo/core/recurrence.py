"""LSTM and GRU over whole sequences, with their gradients. Knows nothing of observations, policies or losses.

The caller multiplies the inputs of all steps with their weights in one product. This module computes the sequential part: the
product with the state of the step before, and the gates. The gradient is written by hand, because autograd would store and add
up an (H, 4H) matrix for each step. Here a second loop goes backwards. The terms that do not depend on the step after are
computed for all steps at once, and the gradient of the weights is one product. `Cells` holds the two loops of each kind.
`STEPS` is the reference; compiled programs use the loops of compile/native.py.

Letters: T steps, n sequences, K independent cells side by side (an actor's and a critic's), H hidden size. A state is zeroed
before the first step of an episode.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.core.scan import scan

NUM_GATES = {"lstm": 4, "gru": 3}  # G
NUM_STATES = {"lstm": 2, "gru": 1}  # parts of the state: (h, c), (h,)


def lstm_step(gates: Tensor, weight: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of K LSTMs (Hochreiter and Schmidhuber, 1997; gates in torch.nn.LSTM's order, i f g o).

        i, f, o = sigmoid(.), g = tanh(.) of gates + h W,    c' = f c + i g,    h' = o tanh(c')

    Args:
        gates: (K, n, 4H), the inputs' part, with all biases. weight: W, (K, H, 4H). h, c: (K, n, H).

    Returns:
        h', c' (K, n, H), and the four gates (K, n, 4H).
    """
    i, f, g, o = torch.baddbmm(gates, h, weight).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, torch.cat((i, f, g, o), -1)


def gru_step(gates: Tensor, weight: Tensor, bias: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One step of K GRUs (Cho et al., 2014, arXiv 1406.1078; as torch.nn.GRU, gates in its order, r z n).

        r, z = sigmoid(gates + h W),    n = tanh(gates_n + r (h W_n + b)),    h' = (1 - z) n + z h

    Args:
        gates: (K, n, 3H), the inputs' part, with its biases. weight: W, (K, H, 3H). bias: b, (K, H). h: (K, n, H).

    Returns:
        h' (K, n, H), and r, z, n and h W_n + b, (K, n, 4H).
    """
    size = h.shape[-1]
    product = torch.bmm(h, weight)
    r, z = (gates[..., : 2 * size] + product[..., : 2 * size]).sigmoid().chunk(2, -1)
    inner = product[..., 2 * size :] + bias.unsqueeze(1)
    n = (gates[..., 2 * size :] + r * inner).tanh()
    return (1.0 - z) * n + z * h, torch.cat((r, z, n, inner), -1)


class Cells(NamedTuple):
    """The loops over steps of both kinds. States and their gradients are (T, K, n, H) or, at one end, (K, n, H).

    lstm: (gates (T, K, n, 4H), weight (K, H, 4H), keep (T, 1, n, 1), h, c) -> h, c after each step, activated (T, K, n, 4H)
    lstm_backward: (weight, keep, into_c, slope (T, K, n, 4H), f, grad_h, grad_c) -> d_gates (T, K, n, 4H), dh, dc of the start
    gru: (gates (T, K, n, 3H), weight (K, H, 3H), bias (K, H), keep, h) -> h after each step, r, z, n, h W_n + b (T, K, n, 4H)
    gru_backward: (weight, keep, slope (T, K, n, 3H), z, grad_h) -> d_product (T, K, n, 3H), of h W; d_state, of h'; dh
    """

    lstm: Callable[..., tuple[Tensor, Tensor, Tensor]]
    lstm_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gru: Callable[..., tuple[Tensor, Tensor]]
    gru_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _lstm(gates: Tensor, weight: Tensor, keep: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def step(state: tuple[Tensor, Tensor], x: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        (h, c), (gates, keep) = state, x
        h, c, activated = lstm_step(gates, weight, h * keep, c * keep)
        return (h, c), (h, c, activated)

    _, (h, c, activated) = scan(step, (h, c), (gates, keep))
    return h, c, activated


def _lstm_backward(
    weight: Tensor, keep: Tensor, into_c: Tensor, slope: Tensor, f: Tensor, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def step(carry: tuple[Tensor, Tensor], x: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        (dh, dc), (keep, into_c, slope, f, grad_h, grad_c) = carry, x
        dh = dh + grad_h
        dc = dc + grad_c + dh * into_c
        d_gates = torch.cat((dc, dc, dc, dh), -1) * slope
        return (torch.bmm(d_gates, weight.mT) * keep, dc * f * keep), (d_gates,)

    rows = tuple(x.flip(0) for x in (keep, into_c, slope, f, grad_h, grad_c))
    (dh, dc), (d_gates,) = scan(step, (torch.zeros_like(grad_h[0]), torch.zeros_like(grad_c[0])), rows)
    return d_gates.flip(0), dh, dc


def _gru(gates: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    def step(h: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        gates, keep = x
        h, inner = gru_step(gates, weight, bias, h * keep)
        return h, (h, inner)

    _, (h, activated) = scan(step, h, (gates, keep))
    return h, activated


def _gru_backward(weight: Tensor, keep: Tensor, slope: Tensor, z: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def step(dh: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        keep, slope, z, grad_h = x
        dh = dh + grad_h
        d_product = torch.cat((dh, dh, dh), -1) * slope
        return (torch.bmm(d_product, weight.mT) + dh * z) * keep, (d_product, dh)

    rows = tuple(x.flip(0) for x in (keep, slope, z, grad_h))
    dh, (d_product, d_state) = scan(step, torch.zeros_like(grad_h[0]), rows)
    return d_product.flip(0), d_state.flip(0), dh


STEPS = Cells(_lstm, _lstm_backward, _gru, _gru_backward)


def lstm(
    gates: Tensor, weight: Tensor, episode_start: Tensor, h: Tensor, c: Tensor, cells: Cells = STEPS
) -> tuple[Tensor, Tensor]:
    """K LSTMs over T steps of n sequences.

    Args:
        gates: (T, K, n, 4H). weight: (K, H, 4H). episode_start: (T, n) bool, true at the first step of an
            episode: the state before it is zero. h, c: (K, n, H), the state before the first step.

    Returns:
        h, c after each step, (T, K, n, H) each.
    """
    h, c, _ = _Lstm.apply(gates, weight, _keep(episode_start, gates), h, c, cells)
    return h, c


def gru(gates: Tensor, weight: Tensor, bias: Tensor, episode_start: Tensor, h: Tensor, cells: Cells = STEPS) -> Tensor:
    """K GRUs over T steps of n sequences: h after each step, (T, K, n, H). bias: (K, H); the rest as in `lstm`."""
    h, _ = _Gru.apply(gates, weight, bias, _keep(episode_start, gates), h, cells)
    return h


def _keep(episode_start: Tensor, gates: Tensor) -> Tensor:
    """(T, 1, n, 1): 0 at the first step of an episode, else 1; multiplies the state before."""
    return (~episode_start).to(gates.dtype)[:, None, :, None]


class _Lstm(torch.autograd.Function):
    """`lstm`. Also returns the gates, for the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gates: Tensor, weight: Tensor, keep: Tensor, h: Tensor, c: Tensor, cells: Cells) -> tuple[Tensor, ...]:
        return cells.lstm(gates, weight, keep, h, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, weight, keep, h, c, cells = inputs
        ctx.save_for_backward(weight, keep, h, c, *output)
        ctx.mark_non_differentiable(output[2])
        ctx.cells = cells

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_c: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        weight, keep, h0, c0, h, c, activated = ctx.saved_tensors
        i, f, g, o = activated.chunk(4, -1)
        c_before = torch.cat((c0.unsqueeze(0), c[:-1])) * keep
        tanh_c = c.tanh()
        into_c = o * (1.0 - tanh_c.square())  # d h' / d c'
        # d (c', c', c', h') / d (the arguments of i, f, g, o)
        slope = torch.cat((g * i * (1 - i), c_before * f * (1 - f), i * (1 - g.square()), tanh_c * o * (1 - o)), -1)
        d_gates, dh, dc = _Backward.apply(ctx.cells.lstm_backward, weight, keep, into_c, slope, f, grad_h, grad_c)
        return d_gates, _weight_gradient(h0, h, keep, d_gates), None, dh, dc, None


class _Gru(torch.autograd.Function):
    """`gru`. Also returns the gates, for the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gates: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, h: Tensor, cells: Cells) -> tuple[Tensor, ...]:
        return cells.gru(gates, weight, bias, keep, h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, weight, _, keep, h, cells = inputs
        ctx.save_for_backward(weight, keep, h, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.cells = cells

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        weight, keep, h0, h, activated = ctx.saved_tensors
        r, z, n, inner = activated.chunk(4, -1)
        h_before = torch.cat((h0.unsqueeze(0), h[:-1])) * keep
        into_n = (1.0 - z) * (1.0 - n.square())  # d h' / d (the argument of n)
        of_both = torch.cat((into_n * inner * r * (1.0 - r), (h_before - n) * z * (1.0 - z)), -1)
        slope = torch.cat((of_both, into_n * r), -1)  # d h' / d (h W); the part of n goes through r
        d_product, d_state, dh = _Backward.apply(ctx.cells.gru_backward, weight, keep, slope, z, grad_h)
        size = h.shape[-1]
        d_gates = torch.cat((d_product[..., : 2 * size], d_state * into_n), -1)
        d_bias = d_product[..., 2 * size :].sum((0, 2))
        return d_gates, _weight_gradient(h0, h, keep, d_product), d_bias, None, dh, None


class _Backward(torch.autograd.Function):
    """A backward loop of `Cells`, itself not differentiable. A Function gets plain tensors under torch.func.grad."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loop: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> tuple[Tensor, ...]:
        return loop(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)


def _weight_gradient(h0: Tensor, h: Tensor, keep: Tensor, d_product: Tensor) -> Tensor:
    """Gradient of W, (K, H, GH), from d_product (T, K, n, GH), the gradient of each step's h W."""
    before = torch.cat((h0.unsqueeze(0), h[:-1])) * keep  # (T, K, n, H)
    before, d_product = (x.movedim(1, 0).flatten(1, 2) for x in (before, d_product))  # (K, T n, ...)
    return torch.bmm(before.mT, d_product)
