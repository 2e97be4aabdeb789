"""torch.compile, fake tensors, opcheck and the absence of gradients: what the ops on paged caches have in common."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.paged import PagedOp


class _Calls:
    op: ClassVar[PagedOp]
    sizes: ClassVar[Any]  # 4 query heads, 2 kv heads, head sizes 16 and 8, pages of 16

    def call(self, cached: list[int], tokens: int, impl: str, **changes: Any) -> dict[str, Any]:
        """Keyword arguments of a BSND call, in which NaN stands in caches where no token is."""
        problem = self.op.make(self.sizes, cached, [tokens] * len(cached))
        return self.op.arguments(problem, "BSND", actual_seq_kvlen=list(cached), impl=impl, **changes)


def faked(arguments: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    return {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}


class PagedOperator(_Calls):
    """An op says what it is and inherits these tests."""

    @pytest.mark.parametrize("key", ["CPU", "CUDA", "PrivateUse1", "Meta"])
    def test_the_operator_is_registered_for_every_kind_of_device(self, key):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nsa_triton::{self.op.name}", key)

    def test_compiled_code_checks_shapes(self):
        torch._dynamo.reset()
        compiled = torch.compile(self.op.function, fullgraph=True, backend="eager")
        (name,) = self.op.bad_number
        with pytest.raises(RuntimeError, match=name):
            compiled(**self.call([50, 33], 1, "reference", **self.op.bad_number))

    def test_meta_and_fake_tensors(self):
        arguments = self.call([50, 33], 2, "triton")
        meta: dict[str, Any] = {
            name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        output, lse = self.op.function(**meta)
        assert (output.device.type, output.shape, output.dtype) == ("meta", (2, 2, 4, 8), torch.float32)
        assert (lse.device.type, lse.shape, lse.dtype) == ("meta", (2, 2, 4), torch.float32)
        with FakeTensorMode() as mode:
            output, lse = self.op.function(**faked(arguments | {"actual_seq_qlen": [2, 1]}, mode))
            assert (output.shape, lse.shape) == ((2, 2, 4, 8), (2, 2, 4))


class PagedImplementations(_Calls):
    """These tests too, for each implementation: `impl` is a parameter of the class that inherits them."""

    def test_there_is_no_gradient(self, impl):
        arguments = self.call([50, 33], 1, impl)
        expected = self.op.function(**arguments)
        for name in ("query", "key", "value"):
            arguments[name] = arguments[name].clone().requires_grad_()
        outputs = self.op.function(**arguments)
        assert not any(output.requires_grad for output in outputs)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        with torch.inference_mode():
            self.op.function(**arguments)

    def test_opcheck(self, impl):
        for cached, tokens, stride in (([50, 33], [1, 1], None), ([50, 33], [2, 1], None), ([50, 0], [2, 0], 2)):
            problem = self.op.make(self.sizes, cached, tokens, stride=stride)
            problem = problem._replace(key=problem.key.nan_to_num(), value=problem.value.nan_to_num())
            problem = problem._replace(query=problem.query.nan_to_num())
            torch.library.opcheck(self.op.operator, (*problem, impl))

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
    @pytest.mark.parametrize("layout", ["BSND", "BSH", "TND"])
    def test_compile_takes_the_whole_public_function(self, layout, kind, backend, impl):
        function = self.op.function

        def step(query, **rest):
            output, lse = function(query * 2, **rest)
            return output + 1, lse

        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
        compiled = torch.compile(step, fullgraph=True, backend=counter)
        table = torch.arange(8, dtype=torch.int32).view(2, 4)
        for seed, cached in enumerate(([50, 64], [51, 33], [60, 17], [62, 40], [33, 34])):
            problem = self.op.make(self.sizes, cached, [2, 1], stride=None if layout == "TND" else 2, seed=seed)
            key, value = (torch.randn(10, *cache.shape[1:]) for cache in (problem.key, problem.value))
            problem = problem._replace(query=problem.query.nan_to_num(), key=key, value=value, table=table)
            lengths = {"actual_seq_qlen": kind([2, 1]), "actual_seq_kvlen": kind(cached)}
            arguments = self.op.arguments(problem, layout, **lengths, impl=impl)
            torch.testing.assert_close(compiled(**arguments), step(**arguments))
        assert counter.frame_count <= 2  # lengths become symbolic, or are a tensor: no graph for each step

    def test_compile_without_a_block_table(self, impl):
        torch._dynamo.reset()
        compiled = torch.compile(self.op.function, fullgraph=True, backend="aot_eager")
        for cached in ([50, 64], [33, 17]):
            arguments = self.call(cached, 1, impl, block_table=None)
            arguments["key"], arguments["value"] = (arguments[name].nan_to_num(0.5) for name in ("key", "value"))
            actual, expected = compiled(**arguments), self.op.function(**arguments)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    def test_fake_lengths_do_not_outlive_their_mode(self, impl):
        """Tensors of lengths are cached by value: a call under FakeTensorMode must not leave its own or take one."""
        for cached, fake_first in (([50, 31], True), ([50, 30], False)):
            arguments = self.call(cached, 2, impl, actual_seq_qlen=[2, 1])

            def under_fake(arguments=arguments):
                with FakeTensorMode() as mode:
                    return self.op.function(**faked(arguments, mode))

            real = functools.partial(self.op.function, **arguments)
            for one in (under_fake, real, under_fake, real) if fake_first else (real, under_fake, real):
                assert one()[0].shape == (2, 2, 4, 8)

    def test_results_repeat_bit_for_bit(self, impl):
        arguments = self.call([50, 33, 90], 2, impl)
        first, second = (self.op.function(**arguments) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
