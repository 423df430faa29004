"""The two primitives against plain autograd: outputs, gradients, second derivatives, precision, memory."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from polyrank.mixture import base_shrink, expand_
from polyrank.mixture.primitives import with_lora
from small import inputs

SHAPES = [(6,), (2, 3, 6), (2, 3, 2, 6)]


def operands(shape, dtype=torch.float64, bias=True):
    """x, W (5, 6), b (5), A (4, 6), B (3, 5); x, A and B with gradients."""
    x, a, b = inputs(*shape, dtype=dtype), inputs(4, 6, seed=1, dtype=dtype), inputs(3, 5, seed=2, dtype=dtype)
    weight = inputs(5, 6, seed=4, dtype=dtype)
    return (
        x.requires_grad_(),
        weight,
        inputs(5, seed=5, dtype=dtype) if bias else None,
        a.requires_grad_(),
        b.requires_grad_(),
    )


def fast(x, weight, bias, a, b):
    y, z = base_shrink(x, weight, bias, a)
    return expand_(y, torch.tanh(z[..., :3]) * z[..., 3:], b)


def naive(x, weight, bias, a, b):
    z = x @ a.T
    return F.linear(x, weight, bias) + (torch.tanh(z[..., :3]) * z[..., 3:]) @ b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_plain_autograd(shape, bias):
    found = []
    for form in (fast, naive):
        x, weight, c, a, b = operands(shape, bias=bias)
        y = form(x, weight, c, a, b)
        y.square().sum().backward()
        found.append((y, x.grad, a.grad, b.grad))
    assert_close(found[0], found[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 6), (4, 3, 2, 6)])
def test_thin_weights_of_each_sample(shape, scale):
    """A (N, R, I) and B (N, R, O), and A in two parts: the samples one after the other."""
    x, weight, bias, _, _ = operands(shape)
    a, more, b = (inputs(2, n, 6 - (n == 3), seed=n, dtype=torch.float64).requires_grad_() for n in (2, 1, 3))
    y, z = base_shrink(x, weight, bias, a, more)
    y = expand_(y, torch.tanh(z), b, scale)
    y.square().sum().backward()
    got = [x.grad.clone(), a.grad.clone(), more.grad.clone(), b.grad.clone()]
    parts = zip(x.chunk(2), torch.cat([a, more], 1), b, strict=True)
    want = torch.cat([F.linear(s, weight, bias) + scale * torch.tanh(s @ down.T) @ up for s, down, up in parts])
    assert_close(y, want, atol=1e-12, rtol=1e-12)
    wanted = torch.autograd.grad(want.square().sum(), [x, a, more, b])
    assert_close(got, list(wanted), atol=1e-12, rtol=1e-12)


def test_first_and_second_derivatives():
    x, weight, bias, a, b = operands((2, 3, 6))
    assert torch.autograd.gradcheck(lambda x, a, b: fast(x, weight, bias, a, b), (x, a, b))
    assert torch.autograd.gradgradcheck(lambda x, a, b: fast(x, weight, bias, a, b), (x, a, b))


@pytest.mark.parametrize("need", ["x", "a", "b"])
def test_each_gradient_alone(need):
    x, weight, bias, a, b = operands((2, 3, 6))
    for name, tensor in {"x": x, "a": a, "b": b}.items():
        tensor.requires_grad_(name == need)
    fast(x, weight, bias, a, b).square().sum().backward()
    got = {"x": x, "a": a, "b": b}[need]
    want = torch.autograd.grad(naive(x, weight, bias, a, b).square().sum(), got)[0]
    assert_close(got.grad, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("frozen", [{0}, {1}, {0, 2}, {0, 1, 2}])
def test_frozen_parts_of_a_get_no_gradient(frozen):
    x, weight, bias, _, _ = operands((2, 3, 6))
    parts = [inputs(n, 6, seed=n, dtype=torch.float64).requires_grad_(n - 1 not in frozen) for n in (1, 2, 3)]
    y, z = base_shrink(x, weight, bias, *parts)
    (y.square().sum() + z.pow(3).sum()).backward()
    want = F.linear(x, weight, bias).square().sum() + F.linear(x, torch.cat(parts)).pow(3).sum()
    trained = [tensor for tensor in (x, *parts) if tensor.requires_grad]
    assert_close([one.grad for one in trained], list(torch.autograd.grad(want, trained)), atol=1e-12, rtol=1e-12)
    assert [part.grad is None for part in parts] == [not part.requires_grad for part in parts]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 6), (2, 0, 6)])
def test_no_token(shape):
    x, weight, bias, a, b = operands((1, 6))
    y = with_lora(torch.zeros(shape, dtype=x.dtype), weight, bias, a[:3], b)
    assert y.shape == (*shape[:-1], 5)


def test_non_contiguous_and_transposed_operands():
    x, weight, bias, a, b = operands((3, 2, 6))
    turned = x.detach().transpose(0, 1).requires_grad_()
    y = fast(turned, weight.t().contiguous().t(), bias, a, b)
    assert_close(y, naive(turned, weight, bias, a, b), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_linear(stored):
    """Same dtype out, fp32 gradients for fp32 masters, and activations are not cast up."""
    x, weight, bias, a, b = operands((4, 6), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = fast(x.to(stored), weight.to(stored), None if bias is None else bias.to(stored), a, b)
        z = base_shrink(x.to(stored), weight.to(stored), None, a)[1]
    assert y.dtype == z.dtype == torch.bfloat16
    y.float().square().sum().backward()
    want = naive(x, weight, bias, a, b)
    assert (y.float() - want).norm() / want.norm() < 0.02
    assert a.grad.dtype == b.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert base_shrink(x.double(), weight.double(), None, a)[0].dtype == torch.float64


def test_a_dtype_that_linear_would_refuse_is_refused():
    x, weight, bias, a, _ = operands((4, 6), torch.float32)
    with torch.no_grad(), pytest.raises(RuntimeError):
        F.linear(x, weight.double(), None)
    assert base_shrink(x, weight, bias, a.double())[1].dtype == torch.float32  # masters are cast down, not x up


def test_compile_whole_without_a_graph():
    """As at inference: the change in place is traced there too."""
    operand = operands((4, 6))
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(fast, backend="aot_eager", fullgraph=True)(*operand)
        assert_close(got, naive(*operand), atol=1e-12, rtol=1e-12)


def test_nothing_wide_is_saved_beside_x():
    """What autograd keeps: x once, the thin matrices, and (tokens, R) tensors; no (tokens, width) other than x."""
    tokens, width, rank = 64, 96, 4
    x = inputs(tokens, width, dtype=torch.float32).requires_grad_()
    weight, a, b = inputs(80, width), inputs(rank, width).requires_grad_(), inputs(rank, 80).requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, z = base_shrink(x, weight, None, a)
        expand_(y, z * 2.0, b)
    wide = [size for pointer, size in kept.items() if size >= tokens * 80 * 4 and pointer != weight.data_ptr()]
    assert wide == [x.untyped_storage().nbytes()]
