"""torch.compile, fake tensors and opcheck, on every implementation."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_triton.ops.compress_attention_infer import nsa_compress_attention_infer
from tests.ops.compress_attention_infer.cases import Sizes, assert_right, call, every_impl, make

SIZES = Sizes(4, 2, 16, 8, 16, (32, 16), 64, 4)
OPERATOR = torch.ops.nsa_triton.compress_attention_infer


@pytest.mark.parametrize("key", ["CPU", "CUDA", "PrivateUse1", "Meta"])
def test_the_operator_is_registered_for_every_kind_of_device(key):
    """PrivateUse1 is the NPU; it is registered by name, so that torch_npu need not be there."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("nsa_triton::compress_attention_infer", key)


@every_impl
@pytest.mark.parametrize("forced", [(None, None), (1, 2)], ids=str)
@pytest.mark.parametrize("tokens", [(1, 1), (3, 1)], ids=str)
def test_opcheck(tokens, forced, impl):
    problem = make(SIZES, (40, 17), tokens, hides=max(tokens) > 1 or forced[0] is not None, columns=3)
    problem = problem._replace(key=problem.key.nan_to_num(0.5), value=problem.value.nan_to_num(0.5))
    torch.library.opcheck(OPERATOR.default, (*problem[:13], impl, *forced))


@every_impl
def test_nothing_has_a_gradient(impl):
    problem = make(SIZES, (40, 17), (1, 1))
    problem.query.requires_grad_()
    output, ids = call(nsa_compress_attention_infer, problem, impl)
    assert not output.requires_grad
    assert not ids.requires_grad
    with torch.inference_mode():
        assert torch.equal(call(nsa_compress_attention_infer, problem, impl)[0], output)


@every_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [list, torch.tensor])
@pytest.mark.parametrize("forced", [(None, None), (1, 2)], ids=str)
def test_compile_takes_the_whole_public_function(forced, kind, backend, impl):
    def step(problem, lengths, raw, tokens):
        output, ids = call(
            nsa_compress_attention_infer,
            problem,
            impl,
            actual_seq_qlen=tokens,
            actual_cmp_seq_kvlen=lengths,
            actual_sel_seq_kvlen=raw,
            atten_mask=problem.query,
            num_init_blocks=forced[0],
            num_local_blocks=forced[1],
        )
        return output * 2, ids

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for cached in ((40, 17), (41, 18), (48, 3), (7, 48)):
        problem = make(SIZES, cached, (2, 1), hides=True, columns=3)
        given = (kind(cached), kind(problem.raw.tolist()), kind([2, 1]))
        actual, expected = compiled(problem, *given), step(problem, *given)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        if forced == (None, None):
            assert_right((actual[0] / 2, actual[1]), problem)
    assert counter.frame_count <= 3  # lengths become symbolic


@every_impl
def test_compile_without_a_block_table(impl):
    problem = make(SIZES, (40, 17), (1, 1))
    key, value = torch.randn(6, 16, 2, 16), torch.randn(6, 16, 2, 8)
    problem = problem._replace(key=key, value=value)

    def step(query, lengths):
        given = {"block_table": None, "actual_seq_qlen": None, "actual_cmp_seq_kvlen": lengths}
        return call(nsa_compress_attention_infer, problem._replace(query=query), impl, **given)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    actual = compiled(problem.query, [40, 17])
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    expected = call(nsa_compress_attention_infer, problem._replace(table=table), impl)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_compile_checks_shapes():
    def step(query, key, value, table):
        given = problem._replace(query=query, key=key, value=value, table=table)
        return call(nsa_compress_attention_infer, given, "reference", actual_cmp_seq_kvlen=[40, 17])

    problem = make(SIZES, (40, 17), (1, 1))
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="value heads"):
        compiled(problem.query, problem.key, problem.value[:, :, :1], problem.table)


def test_meta_and_fake_tensors():
    problem = make(SIZES, (40, 17), (3, 3), torch.bfloat16, hides=True)
    output, ids = call(nsa_compress_attention_infer, problem.to("meta"), "triton")
    assert (output.device.type, output.dtype, tuple(output.shape)) == ("meta", torch.bfloat16, (6, 4, 8))
    assert (ids.device.type, ids.dtype, tuple(ids.shape)) == ("meta", torch.int32, (6, 2, 4))
    with FakeTensorMode():
        fake = problem._replace(
            query=torch.empty(2, 3, 4, 16), key=torch.empty(9, 16, 2, 16), value=torch.empty(9, 16, 2, 8)
        )
        fake = fake._replace(table=torch.empty(2, 3, dtype=torch.int32), lengths=[40, 17], raw=None)
        output, ids = call(nsa_compress_attention_infer, fake, "triton")
    assert tuple(output.shape) == (2, 3, 4, 8)
    assert tuple(ids.shape) == (2, 3, 2, 4)


@every_impl
def test_no_rows(impl):
    problem = make(SIZES, (40, 17), (1, 1))
    empty = (problem.query[:0], *problem[1:5], torch.zeros(2, 2, dtype=torch.int32), *problem[6:])
    output, ids = OPERATOR(*empty[:13], impl)
    assert output.shape == (0, 4, 8)
    assert ids.shape == (0, 2, 4)


@every_impl
def test_results_repeat_bit_for_bit(impl):
    problem = make(SIZES, (40, 17), (3, 3), torch.float16, hides=True)
    once, again = (call(nsa_compress_attention_infer, problem, impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
