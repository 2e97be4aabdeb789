"""torch.compile, fake tensors and opcheck, on every implementation."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_triton.ops.compress_infer import nsa_compress_infer, reference
from tests.ops.compress_infer.cases import every_impl, make

LENGTHS = [48, 43, 80, 0]


def operands(call, impl):
    page = 16 if call.table is None else call.input.shape[1]
    tensors = (call.input, call.weight, call.slots, call.table, call.lengths, call.cache)
    return *tensors, call.block, call.stride, page, call.new_tokens, impl


@every_impl
@pytest.mark.parametrize("page", [16, None])
@pytest.mark.parametrize("new_tokens", [1, 20])
def test_opcheck(impl, page, new_tokens):
    call = make(LENGTHS, page=page, new_tokens=new_tokens)
    torch.library.opcheck(torch.ops.nsa_triton.compress_infer.default, operands(call, impl))


@pytest.mark.parametrize("key", ["CPU", "CUDA", "PrivateUse1", "Meta"])
def test_the_operator_is_registered_for_every_kind_of_device(key):
    """PrivateUse1 is the NPU; it is registered by name, so that torch_npu need not be there."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("nsa_triton::compress_infer", key)


@every_impl
def test_the_cache_is_changed_in_place_and_returned(impl):
    call = make(LENGTHS)
    expected = call.run(reference.forward)
    storage = call.cache.data_ptr()
    returned = nsa_compress_infer(**call.arguments(impl=impl))
    assert returned is call.cache
    assert returned.data_ptr() == storage
    torch.testing.assert_close(returned, expected)


@every_impl
def test_parameters_need_no_gradient_and_get_none(impl):
    call = make(LENGTHS)
    weight = torch.nn.Parameter(call.weight)
    assert not nsa_compress_infer(**call.arguments(weight=weight, impl=impl)).requires_grad
    with torch.inference_mode():
        nsa_compress_infer(**call.arguments(weight=weight, impl=impl))


@every_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
@pytest.mark.parametrize("page", [16, None])
def test_compile_takes_the_whole_public_function(impl, backend, kind, page):
    def step(input, cache, lengths, rest):
        more = {"cache": cache, "actual_seq_len": lengths, "impl": impl}
        return nsa_compress_infer(input * 2, **rest, **more) + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for lengths in (LENGTHS, [49, 64, 15, 32]):
        call = make(lengths, page=page)
        rest = call.arguments()
        given = {name: rest.pop(name) for name in ("input", "cache", "actual_seq_len")}
        caches = [given["cache"].clone(), given["cache"].clone()]
        actual = compiled(given["input"], caches[0], kind(lengths), rest)
        expected = step(given["input"], caches[1], lengths, rest)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(caches[0], caches[1])
        assert not torch.equal(caches[0], given["cache"])


def test_compile_checks_shapes():
    call = make(LENGTHS)

    def step(lengths):
        return nsa_compress_infer(**call.arguments(actual_seq_len=lengths, impl="reference"))

    torch._dynamo.reset()
    with pytest.raises(Exception, match="slot_mapping"):
        torch.compile(step, fullgraph=True, backend="eager")([48, 43, 80])


def test_meta_and_fake_tensors():
    call = make(LENGTHS, dtype=torch.bfloat16).to(torch.device("meta"))
    cache = nsa_compress_infer(**call.arguments(actual_seq_len=LENGTHS, impl="triton"))
    assert cache is call.cache
    call = make(LENGTHS)
    with FakeTensorMode() as mode:
        torch.ops.nsa_triton.compress_infer(*operands(call.map(mode.from_tensor), "triton"))
