"""torch.compile, fake tensors, opcheck and the absence of gradients, on every implementation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_triton.ops.sliding_window_attention_infer import nsa_sliding_window_attention_infer
from tests.ops.sliding_window_attention_infer.cases import Sizes, every_impl, make

SIZES = Sizes(heads=4, kv_heads=2, key_dim=16, value_dim=8, page=16, window=20)
NUMBERS: dict[str, Any] = {
    "scale_value": 0.25,
    "head_num": 4,
    "key_value_head_num": 2,
    "window_size": 20,
    "page_block_size": 16,
}


def call(cached, tokens, impl, **changes) -> dict[str, Any]:
    """Keyword arguments of a BSND call, in which NaN stands in caches where no token is."""
    problem = make(SIZES, cached, [tokens] * len(cached))
    tensors = {
        "query": problem.query.unflatten(0, (len(cached), tokens)),
        "key": problem.key,
        "value": problem.value,
        "block_table": problem.table,
        "actual_seq_kvlen": list(cached),
    }
    return NUMBERS | tensors | {"return_lse": True, "impl": impl} | changes


@pytest.mark.parametrize("key", ["CPU", "CUDA", "PrivateUse1", "Meta"])
def test_the_operator_is_registered_for_every_kind_of_device(key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("nsa_triton::sliding_window_attention_infer", key)


@every_impl
def test_there_is_no_gradient(impl):
    arguments = call([50, 33], 1, impl)
    expected = nsa_sliding_window_attention_infer(**arguments)
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name].clone().requires_grad_()
    outputs = nsa_sliding_window_attention_infer(**arguments)
    assert not any(output.requires_grad for output in outputs)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    with torch.inference_mode():
        nsa_sliding_window_attention_infer(**arguments)


@every_impl
def test_opcheck(impl):
    for cached, tokens, stride in (([50, 33], [1, 1], None), ([50, 33], [2, 1], None), ([50, 0], [2, 0], 2)):
        problem = make(SIZES, cached, tokens, stride=stride)
        problem = problem._replace(key=problem.key.nan_to_num(), value=problem.value.nan_to_num())
        problem = problem._replace(query=problem.query.nan_to_num())
        torch.library.opcheck(torch.ops.nsa_triton.sliding_window_attention_infer.default, (*problem, impl))


@every_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
@pytest.mark.parametrize("layout", ["BSND", "BSH", "TND"])
def test_compile_takes_the_whole_public_function(layout, kind, backend, impl):
    def step(query, key, value, block_table, qlen, kvlen):
        rest = NUMBERS | {"layout": layout, "return_lse": True, "impl": impl, "block_table": block_table}
        rest |= {"actual_seq_qlen": qlen, "actual_seq_kvlen": kvlen}
        output, lse = nsa_sliding_window_attention_infer(query * 2, key, value, **rest)
        return output + 1, lse

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed, cached in enumerate(([50, 64], [51, 33], [60, 17], [62, 40], [33, 34])):
        given = [2, 1]
        problem = make(SIZES, cached, given, stride=None if layout == "TND" else 2, seed=seed)
        query = problem.query.nan_to_num()
        if layout != "TND":
            query = query.unflatten(0, (2, 2))
        if layout == "BSH":
            query = query.flatten(2)
        caches = (torch.randn(10, *cache.shape[1:]) for cache in (problem.key, problem.value))
        table = torch.arange(8, dtype=torch.int32).view(2, 4)
        arguments = (query, *caches, table, kind(given), kind(cached))
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert counter.frame_count <= 2  # lengths become symbolic, or are a tensor from the start: no graph for each step


@every_impl
def test_compile_without_a_block_table(impl):
    torch._dynamo.reset()
    compiled = torch.compile(nsa_sliding_window_attention_infer, fullgraph=True, backend="aot_eager")
    for cached in ([50, 64], [33, 17]):
        arguments = call(cached, 1, impl, block_table=None)
        arguments["key"], arguments["value"] = (arguments[name].nan_to_num(0.5) for name in ("key", "value"))
        actual = compiled(**arguments)
        assert all(
            torch.equal(a, b) for a, b in zip(actual, nsa_sliding_window_attention_infer(**arguments), strict=True)
        )


def test_compiled_code_checks_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(nsa_sliding_window_attention_infer, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="window_size"):
        compiled(**call([50, 33], 1, "reference", window_size=0))


def faked(arguments, mode) -> dict[str, Any]:
    return {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}


def test_meta_and_fake_tensors():
    arguments = call([50, 33], 2, "triton")
    meta: dict[str, Any] = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    output, lse = nsa_sliding_window_attention_infer(**meta)
    assert (output.device.type, output.shape, output.dtype) == ("meta", (2, 2, 4, 8), torch.float32)
    assert (lse.device.type, lse.shape, lse.dtype) == ("meta", (2, 2, 4), torch.float32)
    with FakeTensorMode() as mode:
        output, lse = nsa_sliding_window_attention_infer(**faked(arguments, mode), actual_seq_qlen=[2, 1])
        assert (output.shape, lse.shape) == ((2, 2, 4, 8), (2, 2, 4))


@every_impl
def test_fake_lengths_do_not_outlive_their_mode(impl):
    """Tensors of lengths are cached by value: a call under FakeTensorMode must not leave its own behind or take one."""
    for cached, fake_first in (([50, 31], True), ([50, 30], False)):
        arguments = call(cached, 2, impl, actual_seq_qlen=[2, 1])

        def under_fake(arguments=arguments):
            with FakeTensorMode() as mode:
                return nsa_sliding_window_attention_infer(**faked(arguments, mode))

        real = functools.partial(nsa_sliding_window_attention_infer, **arguments)
        for one in (under_fake, real, under_fake, real) if fake_first else (real, under_fake, real):
            assert one()[0].shape == (2, 2, 4, 8)


@every_impl
def test_results_repeat_bit_for_bit(impl):
    arguments = call([50, 33, 90], 2, impl)
    first, second = (nsa_sliding_window_attention_infer(**arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
