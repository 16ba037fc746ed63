"""Decompositions applied before Inductor sees the graph: Inductor's own table and three more entries."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions, keyed by ATen operator. Imports Inductor."""
    from torch._inductor.decomposition import select_decomp_table

    aten = torch.ops.aten
    return {
        **select_decomp_table(),
        aten.tanh.default: rational_tanh,
        # Adding the bias in the activation's kernel saves 8 us: ATen's addmm first copies it into the output.
        aten.addmm.default: lambda bias, x, weight: torch.mm(x, weight) + bias,
        aten.baddbmm.default: lambda bias, x, weight: torch.bmm(x, weight) + bias,
    }


# tanh(x) = x P(x^2) / Q(x^2) on [-7.9, 7.9], outside of which float32 rounds it to 1. Minimax fit of Eigen's generic ptanh.
_TANH_BOUND = 7.90531110763549805
_TANH_P = (
    *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
    *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
)
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def rational_tanh(x: Tensor) -> Tensor:
    """tanh of float32, relative error 4e-7. It is inlined: 0.7 ns an element instead of torch.tanh's 3.2 (one thread, AVX2)."""
    if x.dtype != torch.float32:
        return NotImplemented
    x = x.clamp(-_TANH_BOUND, _TANH_BOUND)
    square = x * x
    return x * _polynomial(_TANH_P, square) / _polynomial(_TANH_Q, square)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's rule, the coefficient of the highest power first."""
    result = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        result = result * x + coefficient
    return result
