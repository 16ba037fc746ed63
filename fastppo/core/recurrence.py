"""LSTM and GRU over whole sequences, with their gradients. Knows nothing of observations, policies or losses.

What a cell makes of its inputs is one product for all steps, done outside; here is only what has to go step by step: the
product with the state of the step before, and the gates. The gradient is written out, since it then has the same form: whatever
does not depend on the step after is computed for all steps at once, a second scan goes backwards, and the weights' gradient is
one product. (Autograd would keep and add up a (H, 4H) matrix for each step.)

Letters: T steps, n sequences, K independent cells side by side (an actor's and a critic's), H hidden size. A state is zeroed
before each step that is the first one of an episode.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastppo.core.scan import scan

Scan = Callable[..., Any]
NUM_GATES = {"lstm": 4, "gru": 3}  # G
NUM_STATES = {"lstm": 2, "gru": 1}  # parts of the state: (h, c), (h,)


def lstm_step(gates: Tensor, weight: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of K LSTMs (Hochreiter and Schmidhuber, 1997; gates in torch.nn.LSTM's order, i f g o).

        i, f, o = sigmoid(.), g = tanh(.) of gates + h W,    c' = f c + i g,    h' = o tanh(c')

    Args:
        gates: (K, n, 4H), the inputs' part with all biases. weight: W, (K, H, 4H). h, c: (K, n, H).

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
        gates: (K, n, 3H), the inputs' part with its biases. weight: W, (K, H, 3H). bias: b, (K, H). h: (K, n, H).

    Returns:
        h' (K, n, H), and r, z, n and h W_n + b, (K, n, 4H).
    """
    size = h.shape[-1]
    product = torch.bmm(h, weight)
    r, z = (gates[..., : 2 * size] + product[..., : 2 * size]).sigmoid().chunk(2, -1)
    inner = product[..., 2 * size :] + bias.unsqueeze(1)
    n = (gates[..., 2 * size :] + r * inner).tanh()
    return (1.0 - z) * n + z * h, torch.cat((r, z, n, inner), -1)


def lstm(gates: Tensor, weight: Tensor, first: Tensor, h: Tensor, c: Tensor, scan: Scan = scan) -> tuple[Tensor, Tensor]:
    """K LSTMs over T steps of n sequences.

    Args:
        gates: (T, K, n, 4H). weight: (K, H, 4H). first: (T, n) bool, where a step is the first one of an episode: its state
            before is zero. h, c: (K, n, H), the state before the first step.
        scan: as core.scan.scan.

    Returns:
        h, c after each step, (T, K, n, H) each.
    """
    h, c, _ = _Lstm.apply(gates, weight, _keep(first, gates), h, c, scan)
    return h, c


def gru(gates: Tensor, weight: Tensor, bias: Tensor, first: Tensor, h: Tensor, scan: Scan = scan) -> Tensor:
    """K GRUs over T steps of n sequences: h after each step, (T, K, n, H). bias: (K, H); all else as `lstm`."""
    h, _ = _Gru.apply(gates, weight, bias, _keep(first, gates), h, scan)
    return h


def _keep(first: Tensor, gates: Tensor) -> Tensor:
    """(T, 1, n, 1): 0 where the state before is dropped, else 1."""
    return (~first).to(gates.dtype)[:, None, :, None]


class _Lstm(torch.autograd.Function):
    """`lstm`; the gates go with its results, for the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gates: Tensor, weight: Tensor, keep: Tensor, h: Tensor, c: Tensor, scan: Scan) -> tuple[Tensor, ...]:
        def step(state: tuple[Tensor, Tensor], x: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
            (h, c), (gates, keep) = state, x
            h, c, activated = lstm_step(gates, weight, h * keep, c * keep)
            return (h, c), (h, c, activated)

        _, ys = scan(step, (h, c), (gates, keep))
        return ys

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, weight, keep, h, c, scan = inputs
        ctx.save_for_backward(weight, keep, h, c, *output)
        ctx.mark_non_differentiable(output[2])
        ctx.scan = scan

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_c: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gates, weight, h, c = _LstmGradient.apply(*ctx.saved_tensors, grad_h, grad_c, ctx.scan)
        return gates, weight, None, h, c, None


class _LstmGradient(torch.autograd.Function):
    """Of `_Lstm`, a function of its own so that under torch.func.grad its scan sees plain tensors. It has none itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        keep: Tensor,
        h0: Tensor,
        c0: Tensor,
        h: Tensor,
        c: Tensor,
        activated: Tensor,
        grad_h: Tensor,
        grad_c: Tensor,
        scan: Scan,
    ) -> tuple[Tensor, ...]:
        i, f, g, o = activated.chunk(4, -1)
        c_before = torch.cat((c0.unsqueeze(0), c[:-1])) * keep
        tanh_c = c.tanh()
        into_c = o * (1.0 - tanh_c.square())  # d h' / d c'
        # d (c', c', c', h') / d (what goes into i, f, g, o)
        slope = torch.cat((g * i * (1 - i), c_before * f * (1 - f), i * (1 - g.square()), tanh_c * o * (1 - o)), -1)

        def step(carry: tuple[Tensor, Tensor], x: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
            (dh, dc), (grad_h, grad_c, into_c, slope, f, keep) = carry, x
            dh = dh + grad_h
            dc = dc + grad_c + dh * into_c
            d_gates = torch.cat((dc, dc, dc, dh), -1) * slope
            return (torch.bmm(d_gates, weight.mT) * keep, dc * f * keep), (d_gates,)

        rows = tuple(x.flip(0) for x in (grad_h, grad_c, into_c, slope, f, keep))
        (dh, dc), (d_gates,) = scan(step, (torch.zeros_like(h0), torch.zeros_like(c0)), rows)
        d_gates = d_gates.flip(0)
        return d_gates, _weight_gradient(h0, h, keep, d_gates), dh, dc

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)


class _Gru(torch.autograd.Function):
    """`gru`; what its gates were goes with its result, for the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gates: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, h: Tensor, scan: Scan) -> tuple[Tensor, ...]:
        def step(h: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            gates, keep = x
            h, inner = gru_step(gates, weight, bias, h * keep)
            return h, (h, inner)

        _, ys = scan(step, h, (gates, keep))
        return ys

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, weight, _, keep, h, scan = inputs
        ctx.save_for_backward(weight, keep, h, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.scan = scan

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gates, weight, bias, h = _GruGradient.apply(*ctx.saved_tensors, grad_h, ctx.scan)
        return gates, weight, bias, None, h, None


class _GruGradient(torch.autograd.Function):
    """Of `_Gru`; see `_LstmGradient`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, keep: Tensor, h0: Tensor, h: Tensor, activated: Tensor, grad_h: Tensor, scan: Scan
    ) -> tuple[Tensor, ...]:
        r, z, n, inner = activated.chunk(4, -1)
        h_before = torch.cat((h0.unsqueeze(0), h[:-1])) * keep
        into_n = (1.0 - z) * (1.0 - n.square())  # d h' / d (what goes into n)
        of_both = torch.cat((into_n * inner * r * (1.0 - r), (h_before - n) * z * (1.0 - z)), -1)
        slope = torch.cat((of_both, into_n * r), -1)  # d h' / d (h W): n's goes through r

        def step(dh: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            grad_h, slope, z, keep = x
            dh = dh + grad_h
            d_product = torch.cat((dh, dh, dh), -1) * slope
            return (torch.bmm(d_product, weight.mT) + dh * z) * keep, (d_product, dh)

        rows = tuple(x.flip(0) for x in (grad_h, slope, z, keep))
        dh, (d_product, d_state) = scan(step, torch.zeros_like(h0), rows)
        d_product, d_state = d_product.flip(0), d_state.flip(0)
        size = h.shape[-1]
        d_gates = torch.cat((d_product[..., : 2 * size], d_state * into_n), -1)
        d_bias = d_product[..., 2 * size :].sum((0, 2))
        return d_gates, _weight_gradient(h0, h, keep, d_product), d_bias, dh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)


def _weight_gradient(h0: Tensor, h: Tensor, keep: Tensor, d_product: Tensor) -> Tensor:
    """Gradient of W, (K, H, GH), where d_product (T, K, n, GH) is that of each step's h W."""
    before = torch.cat((h0.unsqueeze(0), h[:-1])) * keep  # (T, K, n, H)
    before, d_product = (x.movedim(1, 0).flatten(1, 2) for x in (before, d_product))  # (K, T n, ...)
    return torch.bmm(before.mT, d_product)
