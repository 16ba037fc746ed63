"""Adam and gradient clipping on a flat buffer, held against torch.optim.Adam and clip_grad_norm_."""

import pytest
import torch

from fastppo.core.adam import adam_step, clip_by_global_norm, init_adam


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize("eps", [1e-5, 1e-8])
def test_adam_equals_torch_over_a_hundred_steps(eps, dtype, tolerance):
    """Same parameters as torch.optim.Adam with gradients of very different sizes and a learning rate that anneals."""
    generator = torch.Generator().manual_seed(0)
    params = torch.randn(50, generator=generator, dtype=dtype)
    scale = torch.logspace(-6, 2, 50, dtype=dtype)  # from far below eps to far above
    leaf = params.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=1.0, eps=eps)
    state = init_adam(params)
    for i in range(100):
        grad = torch.randn(50, generator=generator, dtype=dtype) * scale
        learning_rate = 1e-2 * (1.0 - i / 100)
        params, state = adam_step(params, grad, state, torch.tensor(learning_rate, dtype=dtype), eps=eps)
        optimizer.param_groups[0]["lr"] = learning_rate
        leaf.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(params, leaf.detach(), rtol=tolerance, atol=tolerance)
    assert state.step.item() == 100.0
    torch.testing.assert_close(state.exp_avg, optimizer.state[leaf]["exp_avg"], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(state.exp_avg_sq, optimizer.state[leaf]["exp_avg_sq"], rtol=1e-4, atol=1e-14)


def test_adam_with_other_betas_equals_torch():
    """The betas are arguments that count: 0.5 and 0.9 give torch's result with 0.5 and 0.9."""
    params = torch.tensor([1.0, -2.0], dtype=torch.float64)
    leaf = params.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=0.1, betas=(0.5, 0.9), eps=1e-5)
    state = init_adam(params)
    for grad in ([0.3, -4.0], [-0.1, 2.0], [0.7, 0.0]):
        leaf.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        params, state = adam_step(params, leaf.grad, state, torch.tensor(0.1), beta1=0.5, beta2=0.9)
    torch.testing.assert_close(params, leaf.detach(), rtol=1e-6, atol=1e-6)


def test_first_step_by_hand_to_float32_accuracy():
    """The bias corrections are exact where they matter most, at step 1, and eps is 1e-5 unless told.

    With g = 1/2: corrected moments 1/2 and 1/4, so the step is lr * 0.5 / (0.5 + 1e-5) = lr * 0.99998000. From 0 the new
    parameter is minus that; 1 - 0.999 computed plainly in float32 would be wrong in the fifth digit.
    """
    params = torch.zeros(1)
    params, state = adam_step(params, torch.tensor([0.5]), init_adam(params), torch.tensor(1.0))
    assert params.item() == pytest.approx(-0.99998000, rel=1e-6)
    assert state.exp_avg.item() == pytest.approx(0.05)  # (1 - 0.9) * 0.5
    assert state.exp_avg_sq.item() == pytest.approx(0.00025)  # (1 - 0.999) * 0.25
    assert state.step.item() == 1.0


def test_zero_gradient_is_safe():
    """A gradient of nothing but zeros moves nothing and makes no nan, from a fresh state and through the clipping."""
    params = torch.tensor([1.0, -2.0, 3.0])
    grad, norm = clip_by_global_norm(torch.zeros(3), 0.5)
    assert torch.equal(grad, torch.zeros(3))
    assert norm.item() == 0.0
    after, state = adam_step(params, grad, init_adam(params), torch.tensor(0.1))
    assert torch.equal(after, params)
    assert torch.equal(state.exp_avg_sq, torch.zeros(3))


def test_nothing_is_written_in_place():
    """A pure function: parameters, gradient and state keep their values, so a skipped minibatch can keep the old ones."""
    params, grad = torch.ones(3), torch.full((3,), 2.0)
    state = init_adam(params)
    adam_step(params, grad, state, torch.tensor(0.1))
    clip_by_global_norm(grad, 0.5)
    assert torch.equal(params, torch.ones(3))
    assert torch.equal(grad, torch.full((3,), 2.0))
    assert all(not tensor.any() for tensor in state)


@pytest.mark.parametrize("scale", [1e-4, 0.1, 1.0, 1e4])
def test_clipping_equals_torch(scale):
    """Same gradient and same returned norm as clip_grad_norm_, below and above the limit."""
    grad = scale * torch.randn(200, generator=torch.Generator().manual_seed(1))
    leaf = torch.zeros(200, requires_grad=True)
    leaf.grad = grad.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_([leaf], 0.5)
    clipped, norm = clip_by_global_norm(grad, 0.5)
    torch.testing.assert_close(clipped, leaf.grad, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)


def test_clipping_by_hand():
    """(3, 4) has norm 5: at most 1 gives (0.6, 0.8), and a limit above 5 leaves it as it is, bit for bit."""
    grad = torch.tensor([3.0, 4.0])
    clipped, norm = clip_by_global_norm(grad, 1.0)
    torch.testing.assert_close(clipped, torch.tensor([0.6, 0.8]))
    assert norm.item() == 5.0
    assert torch.equal(clip_by_global_norm(grad, 5.1)[0], grad)
