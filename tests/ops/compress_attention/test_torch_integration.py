"""Autograd, torch.compile, fake tensors and opcheck, on every implementation."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_triton import nsa_compress_attention, nsa_compress_attention_grad
from tests.ops.compress_attention.cases import (
    Sizes,
    assert_right,
    call,
    call_grad,
    every_impl,
    gradient_of,
    make,
    true_gradients,
)

SIZES = Sizes(4, 2, 16, 8, (32, 16), 64, 4)
LENGTHS = (40, 0, 20, 100)
FORWARD = torch.ops.nsa_triton.compress_attention
BACKWARD = torch.ops.nsa_triton.compress_attention_grad
KINDS = [{"causal": True, "forced": (1, 1)}, {"masked": True, "forced": "mask", "behind": 2}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def finite(problem):
    """Without the NaN of rows that are nobody's, which equal nothing."""
    query, key, value = (tensor.nan_to_num(0.5) for tensor in problem[:3])
    return problem._replace(query=query, key=key, value=value)


def leaves(problem, wanted="qkv"):
    parts = (part.clone().requires_grad_(name in wanted) for name, part in zip("qkv", problem[:3], strict=True))
    query, key, value = parts
    return problem._replace(query=query, key=key, value=value)


@pytest.mark.parametrize("key", ["CPU", "CUDA", "PrivateUse1", "Meta"])
@pytest.mark.parametrize("op", ["compress_attention", "compress_attention_grad"])
def test_operators_are_registered_for_every_kind_of_device(op, key):
    """PrivateUse1 is the NPU; it is registered by name, so that torch_npu need not be there."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nsa_triton::{op}", key)


@every_impl
@kinds
@pytest.mark.parametrize("wanted", ["qkv", "q", "kv", "v"])
def test_autograd_gives_the_gradients_that_are_asked_for(wanted, kind, impl):
    problem = leaves(make(SIZES, LENGTHS, **kind), wanted)
    out, *_ = call(nsa_compress_attention, problem, impl)
    grad = torch.randn_like(out)
    out.backward(grad)
    for name, tensor, exact in zip("qkv", problem[:3], true_gradients(problem, grad), strict=True):
        if name in wanted:
            torch.testing.assert_close(tensor.grad.double().nan_to_num(0.0), exact, rtol=1e-4, atol=2e-5)
        else:
            assert tensor.grad is None


@every_impl
@kinds
def test_the_gradient_function_is_what_autograd_calls(kind, impl):
    problem = leaves(finite(make(SIZES, LENGTHS, **kind)))
    outputs = call(nsa_compress_attention, problem, impl)
    given = gradient_of(problem, [output.detach() for output in outputs])
    given = given._replace(grad=given.grad.nan_to_num(0.5))
    outputs[0].backward(given.grad)
    direct = call_grad(nsa_compress_attention_grad, given, impl)
    assert not any(gradient.requires_grad for gradient in direct)
    assert all(torch.equal(tensor.grad, ours) for tensor, ours in zip(problem[:3], direct, strict=True))


@every_impl
def test_only_the_output_has_a_gradient(impl):
    problem = leaves(make(SIZES, LENGTHS, causal=True))
    out, *others = call(nsa_compress_attention, problem, impl)
    assert out.requires_grad
    assert not any(other.requires_grad for other in others)
    with torch.no_grad():
        assert not call(nsa_compress_attention, problem, impl)[0].requires_grad
    with torch.inference_mode():
        assert torch.equal(call(nsa_compress_attention, problem, impl)[0], out)


@every_impl
def test_differentiable_once(impl):
    problem = leaves(make(SIZES, LENGTHS, causal=True))
    out, *_ = call(nsa_compress_attention, problem, impl)
    (first,) = torch.autograd.grad(out, problem.query, torch.ones_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match=r"create_graph: expected .* differentiable once"):
        first.sum().backward()


@kinds
def test_gradcheck(kind):
    """Numerical derivatives in float64. Statistics are float32, which costs the analytical ones their last digits."""
    sizes = Sizes(2, 1, 3, 2, (16, 16), 32, 2)
    problem = leaves(finite(make(sizes, (20, 0, 35), dtype=torch.float64, **kind)))

    def out(query, key, value):
        changed = problem._replace(query=query, key=key, value=value)
        return FORWARD(*changed, "reference")[0]

    assert torch.autograd.gradcheck(out, problem[:3], eps=1e-5, atol=1e-5, nondet_tol=0.0)


@every_impl
@kinds
def test_opcheck(kind, impl):
    problem = leaves(finite(make(SIZES, LENGTHS, **kind)))
    torch.library.opcheck(FORWARD.default, (*problem, impl))
    given = gradient_of(problem._replace(**{n: getattr(problem, n).detach() for n in ("query", "key", "value")}))
    given = given._replace(grad=given.grad.nan_to_num(0.5))
    torch.library.opcheck(BACKWARD.default, (*given, impl))


@every_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_compile_takes_the_whole_public_function(kind, backend, impl):
    def loss(query, key, value, query_ends, key_ends):
        changed = problem._replace(query=query * 2, key=key, value=value)
        lengths = {"actual_seq_qlen": query_ends, "actual_cmp_seq_kvlen": key_ends}
        out, ids, *statistics = call(nsa_compress_attention, changed, impl, **lengths)
        return out.square().sum(), out, ids, *statistics

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for queries in ((100, 60), (100, 60), (60, 100), (80, 80), (33, 127)):
        problem = leaves(make(SIZES, queries, (6, 7), causal=True, forced=(1, 1), seed=queries[0]))
        given = (*problem[:3], kind(problem.query_ends), kind(problem.key_ends))
        problem = problem._replace(query_ends=(), key_ends=())  # not to be seen by the compiled function
        actual, expected = compiled(*given), loss(*given)
        assert all(torch.equal(a, b) for a, b in zip(actual[1:], expected[1:], strict=True))
        gradients = (torch.autograd.grad(result[0], given[:3]) for result in (actual, expected))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert counter.frame_count <= 4  # lengths become symbolic


@every_impl
def test_compile_with_masks(impl):
    def step(query, atten_mask, topk_mask):
        changed = problem._replace(query=query, atten_mask=atten_mask, topk_mask=topk_mask)
        out, ids, *_ = call(nsa_compress_attention, changed, impl)
        return out.square().sum(), ids

    problem = finite(make(SIZES, LENGTHS, masked=True, forced="mask"))
    query = problem.query.clone().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [function(query, problem.atten_mask, problem.topk_mask) for function in (compiled, step)]
    assert torch.equal(results[0][1], results[1][1])
    gradients = [torch.autograd.grad(loss, query)[0] for loss, _ in results]
    assert torch.equal(*gradients)


@every_impl
def test_compile_takes_the_gradient_function(impl):
    given = gradient_of(make(SIZES, LENGTHS, causal=True))

    def step(grad):
        return call_grad(nsa_compress_attention_grad, given._replace(grad=grad), impl)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(given.grad), step(given.grad), strict=True))


def test_compile_checks_values():
    def step(query, key, value, query_ends, heads):
        lengths = {"actual_seq_qlen": query_ends, "actual_cmp_seq_kvlen": [1, 1, 1, 6]}
        return nsa_compress_attention(query, key, value, 0.5, heads, 32, 16, 64, 4, **lengths, impl="reference")[0]

    query, key, value = make(SIZES, LENGTHS, causal=True)[:3]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert compiled(query, key, value, [40, 40, 60, 160], 4).shape == (160, 4, 8)
    for bad in ([40, 30, 60, 160], [40, 40, 60, 161], [40, 40, 160]):
        with pytest.raises(RuntimeError, match="actual_"):
            compiled(query, key, value, bad, 4)
    with pytest.raises(RuntimeError, match=r"value\.shape\[1\]"):
        compiled(query, key, value[:, :1], [40, 40, 60, 160], 4)
    with pytest.raises(RuntimeError, match="head_num"):
        compiled(query, key, value, [40, 40, 60, 160], 8)


def test_meta_and_fake_tensors():
    problem = make(SIZES, LENGTHS, dtype=torch.bfloat16, masked=True, forced="mask")
    expected = [(torch.bfloat16, (160, 4, 8)), (torch.int32, (160, 2, 4)), *[(torch.float32, (160, 4, 8))] * 2]
    outputs = call(nsa_compress_attention, problem.to("meta"), "triton")
    assert [(output.dtype, tuple(output.shape)) for output in outputs] == expected
    assert {output.device.type for output in outputs} == {"meta"}
    with FakeTensorMode():
        shapes = ((160, 4, 16), (9, 2, 16), (9, 2, 8))
        query, key, value = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
        fake = problem._replace(query=query, key=key, value=value, atten_mask=None, topk_mask=None)
        outputs = call(nsa_compress_attention, fake._replace(key_ends=(2, 2, 3, 9)), "triton")
        assert [(output.dtype, tuple(output.shape)) for output in outputs] == expected
        given = (outputs[0], query, key, value, outputs[0], *outputs[2:])
        gradients = BACKWARD(*given, None, [160], [9], 0.5, 32, 16, False, "triton")
        assert [tuple(gradient.shape) for gradient in gradients] == list(shapes)


@every_impl
def test_no_queries(impl):
    problem = leaves(make(SIZES, (0, 0), (3, 4)))
    outputs = call(nsa_compress_attention, problem, impl)
    assert [tuple(output.shape) for output in outputs] == [(0, 4, 8), (0, 2, 4), (0, 4, 8), (0, 4, 8)]
    outputs[0].sum().backward()
    assert torch.equal(problem.key.grad, torch.zeros(7, 2, 16))
    assert torch.equal(problem.value.grad, torch.zeros(7, 2, 8))


def strided(tensor):
    wide = torch.full((*tensor.shape[:-1], 3 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
    return wide[..., 1::3].copy_(tensor)


@every_impl
def test_any_strides(impl):
    problem = make(SIZES, LENGTHS, causal=True)
    expected = call(nsa_compress_attention, problem, impl)
    given = gradient_of(problem, expected)
    grad = torch.ones(1, 1, 1).expand(given.grad.shape)  # what .sum().backward() sends: strides of zero
    gradients = call_grad(nsa_compress_attention_grad, given._replace(grad=grad.contiguous()), impl)
    for change in (strided, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)):
        other = problem._replace(**{name: change(getattr(problem, name)) for name in ("query", "key", "value")})
        actual = call(nsa_compress_attention, other, impl)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert actual[0].is_contiguous()
        tensors = ("query", "key", "value", "attention_out", "softmax_max", "softmax_sum")
        changed = given._replace(grad=grad, **{name: change(getattr(given, name)) for name in tensors})
        again = call_grad(nsa_compress_attention_grad, changed, impl)
        assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))
        assert all(gradient.is_contiguous() for gradient in again)


@every_impl
def test_results_repeat_bit_for_bit(impl):
    problem = leaves(make(SIZES, LENGTHS, dtype=torch.float16, causal=True))

    def all_of_it():
        outputs = call(nsa_compress_attention, problem, impl)
        return *outputs, *torch.autograd.grad(outputs[0], problem[:3], torch.ones_like(outputs[0]))

    assert all(torch.equal(a, b) for a, b in zip(all_of_it(), all_of_it(), strict=True))
    detached = problem._replace(**{name: getattr(problem, name).detach() for name in ("query", "key", "value")})
    assert_right([output.detach() for output in all_of_it()[:4]], detached)
