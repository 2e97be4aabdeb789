"""NativeSparseAttention against the same in plain PyTorch: outputs, gradients, batches, torch.compile."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch._dynamo.testing

from nsa_triton import ArgumentTypeError, ArgumentValueError, NativeSparseAttention, NSAConfig
from nsa_triton.modules import native_sparse_attention
from tests.implementations import each_implementation
from tests.modules import plain

every_impl = each_implementation("sliding_window_attention")

SMALL = NSAConfig(
    hidden_size=24, head_num=4, key_value_head_num=2, head_dim=16, compress_block_size=32, compress_stride=16,
    select_block_size=32, select_block_count=4, window_size=20,
)  # fmt: skip
SEPARATE = replace(SMALL, separate_key_values=True)
CONFIGS = [
    (SMALL, [0, 150]),
    (NSAConfig(20, 2, 2, 32, 16, 16, 16, 16, 5, 1, 0, 1), [0, 40, 41, 41, 110]),
    (NSAConfig(20, 8, 1, 16, 32, 48, 16, 48, 3, 64, 1, 1), [0, 0, 15, 130]),
    (NSAConfig(20, 3, 1, 16, None, 32, 32, 64, 2, 1000, 1, 1), [0, 97, 100]),
    (SEPARATE, [0, 60, 150]),
]


def made(config, impl, seed=0, **options):
    torch.manual_seed(seed)
    module = NativeSparseAttention(config, impl=impl, **options)
    with torch.no_grad():  # windows that weigh their places, scores far apart
        for weight in (module.key_weight, module.value_weight):
            weight.copy_(torch.randn_like(weight) / config.compress_block_size**0.5)
        if module.has_projections:
            for part in (module.query, module.key):
                part.weight.mul_(3)
    return module


def tokens(config, count, seed=1, dtype=torch.float32):
    return torch.randn(count, config.hidden_size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@every_impl
@pytest.mark.parametrize(("config", "bounds"), CONFIGS, ids=str)
def test_outputs_and_gradients(config, bounds, impl):
    """Float32 sums of a hundred terms, several deep: a few hundred eps."""
    module, hidden = made(config, impl, bias=True), tokens(config, bounds[-1])
    hidden.requires_grad_()
    weights = torch.randn(bounds[-1], config.hidden_size)
    output = module(hidden, cu_seqlens=bounds)
    given = (hidden, *module.parameters())
    found = torch.autograd.grad((output * weights).sum(), given)
    exact = hidden.detach().double().requires_grad_()
    expected = plain.module(module, exact, bounds)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    wanted = torch.autograd.grad((expected * weights).sum(), (exact, *module.parameters()))
    for name, actual, right in zip(("hidden", *dict(module.named_parameters())), found, wanted, strict=True):
        size = max(1.0, float(right.abs().max()))  # that of key.bias is 0: it moves all scores alike
        differs = f"{name}: {{}}".format
        torch.testing.assert_close(actual, right.to(actual.dtype), rtol=1e-3, atol=1e-4 * size, msg=differs)


@every_impl
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_near(dtype, impl):
    """Rounded keys may choose another block; that moves few rows."""
    module, hidden = made(SMALL, impl), tokens(SMALL, 150, dtype=dtype)
    with torch.no_grad():
        module = module.to(dtype)
        output = module(hidden)
        expected = plain.module(module, hidden.double(), [0, 150])
    assert output.dtype == dtype
    error = (output.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 20 * torch.finfo(dtype).eps


@every_impl
def test_packed_sequences_are_what_each_is_alone(impl):
    config, bounds = CONFIGS[1]
    module, hidden = made(config, impl), tokens(config, bounds[-1])
    output = module(hidden, cu_seqlens=bounds)
    for begin, end in pairwise(bounds):
        if end > begin:
            torch.testing.assert_close(module(hidden[begin:end]), output[begin:end], rtol=1e-5, atol=1e-5)


@every_impl
def test_padded_batches(impl):
    lengths = [70, 0, 33]
    module = made(SMALL, impl)
    padded = torch.full((3, 70, SMALL.hidden_size), torch.nan)
    parts = [tokens(SMALL, n, seed=n) for n in lengths]
    for line, part in zip(padded, parts, strict=True):
        line[: len(part)] = part
    padded.requires_grad_()
    output = module(padded, lengths=lengths)
    packed = module(torch.cat(parts), cu_seqlens=[0, 70, 70, 103])
    for line, (begin, end) in zip(output, [(0, 70), (70, 70), (70, 103)], strict=True):
        torch.testing.assert_close(line[: end - begin], packed[begin:end])
        assert not line[end - begin :].any()
    (grad,) = torch.autograd.grad(output.sum(), padded)
    assert not grad[1].any()
    assert not grad[2, 33:].any()
    assert grad[2, :33].any()
    whole = torch.stack([tokens(SMALL, 40, seed=s) for s in (1, 2)])
    torch.testing.assert_close(module(whole), module(whole.flatten(0, 1), cu_seqlens=(0, 40, 80)).view(whole.shape))


@every_impl
def test_a_token_depends_on_nothing_behind_it(impl):
    """Not even on how many tokens follow."""
    module, hidden = made(SMALL, impl), tokens(SMALL, 150)
    whole = module(hidden)
    for length in (1, 31, 32, 33, 47, 64, 65, 100, 129):
        torch.testing.assert_close(module(hidden[:length]), whole[:length], rtol=1e-5, atol=1e-5)


@every_impl
def test_rotary_comes_with_positions_of_each_sequence(impl):
    config, bounds = CONFIGS[1]
    module, hidden = made(config, impl), tokens(config, bounds[-1])
    given = []

    def rotary(query, key, positions):
        given.append((query.shape, key.shape, positions.tolist()))
        angle = positions[:, None, None] * 0.1
        return query * angle.cos(), key * angle.sin()

    output = module(hidden, cu_seqlens=bounds, rotary=rotary)
    wanted = [place for begin, end in pairwise(bounds) for place in range(end - begin)]
    assert given == [((110, 2, 32), (110, 2, 32), wanted)]
    query, key, value, gates = module.project(hidden)
    angle = torch.tensor(wanted)[:, None, None] * 0.1
    attended = module.attend(query * angle.cos(), key * angle.sin(), value, gates, cu_seqlens=bounds)
    torch.testing.assert_close(module.output(attended.flatten(1)), output)


@every_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_takes_the_whole_module(backend, impl):
    module = made(SMALL, impl)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for bounds in ([0, 100], [0, 60, 100]):
        hidden = tokens(SMALL, 100).requires_grad_()
        output = compiled(hidden, cu_seqlens=bounds)
        torch.testing.assert_close(output, module(hidden, cu_seqlens=bounds))
        (grad,) = torch.autograd.grad(output.square().sum(), hidden)
        (expected,) = torch.autograd.grad(module(hidden, cu_seqlens=bounds).square().sum(), hidden)
        torch.testing.assert_close(grad, expected)


def test_the_functional_form_is_the_module_without_projections():
    module, alone = made(SMALL, "reference"), made(SMALL, "reference", projections=False)
    hidden = tokens(SMALL, 90)
    ready = module.project(hidden)
    weights = (module.key_weight, module.value_weight)
    expected = module.attend(*ready)
    given: Any = (*ready, *weights, SMALL)
    torch.testing.assert_close(native_sparse_attention(*given, impl="reference"), expected)
    assert set(dict(alone.named_parameters())) == {"key_weight", "value_weight"}
    alone.load_state_dict(dict(zip(("key_weight", "value_weight"), weights, strict=True)))
    torch.testing.assert_close(alone.attend(*ready), expected)
    with pytest.raises(ArgumentValueError, match="attend"):
        alone(hidden)


def test_no_tokens():
    module = made(SMALL, "reference")
    assert module(tokens(SMALL, 0)).shape == (0, SMALL.hidden_size)
    assert module(tokens(SMALL, 0), cu_seqlens=[0, 0, 0]).shape == (0, SMALL.hidden_size)


def test_the_state_dict_is_stable():
    module = NativeSparseAttention(SMALL, bias=True, dtype=torch.bfloat16)
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {
        "key_weight": (32, 2),
        "value_weight": (32, 2),
        "query.weight": (64, 24),
        "query.bias": (64,),
        "key.weight": (32, 24),
        "key.bias": (32,),
        "value.weight": (32, 24),
        "value.bias": (32,),
        "gate.weight": (12, 24),
        "gate.bias": (12,),
        "output.weight": (24, 64),
    }
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module.key_weight.float().sum(0).allclose(torch.ones(2))
    assert "heads=4/2" in repr(module)
    assert "l=32, d=16, l'=32, K=4, window=20" in repr(module)


def test_each_branch_may_have_keys_and_values_of_its_own():
    module = NativeSparseAttention(SEPARATE, bias=True)
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    assert (shapes["key.weight"], shapes["value.weight"], shapes["key_weight"]) == ((96, 24), (96, 24), (32, 2))
    assert "heads=4/2 per branch" in repr(module)
    alone, ready = made(SMALL, "reference"), made(SMALL, "reference").project(tokens(SMALL, 90))
    query, key, value, gates = ready
    weights = (alone.key_weight, alone.value_weight)
    thrice: Any = (query, key.repeat(1, 3, 1), value.repeat(1, 3, 1), gates, *weights, SEPARATE)
    torch.testing.assert_close(native_sparse_attention(*thrice, impl="reference"), alone.attend(*ready))
    for number, name in ((1, "key"), (2, "value")):
        bad = [*thrice]
        bad[number] = ready[number]
        refused(ArgumentValueError, name, lambda bad=bad: native_sparse_attention(*bad))


def refused(error, argument, call):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(f"{argument}: expected ")


def test_bad_calls():
    module = made(SMALL, "reference")
    packed, padded = tokens(SMALL, 40), torch.zeros(2, 20, SMALL.hidden_size)
    refused(ArgumentTypeError, "hidden", lambda: module([1.0]))
    refused(ArgumentValueError, "hidden.shape", lambda: module(torch.zeros(40, 7)))
    refused(ArgumentValueError, "hidden.shape", lambda: module(torch.zeros(SMALL.hidden_size)))
    refused(ArgumentValueError, "cu_seqlens", lambda: module(packed, cu_seqlens=[10, 40]))
    refused(ArgumentValueError, "cu_seqlens", lambda: module(packed, cu_seqlens=[]))
    refused(ArgumentValueError, "cu_seqlens", lambda: module(packed, cu_seqlens=[0, 30, 20, 40]))
    refused(ArgumentValueError, "cu_seqlens[-1]", lambda: module(packed, cu_seqlens=[0, 39]))
    refused(ArgumentTypeError, "cu_seqlens", lambda: module(packed, cu_seqlens=[0, 40.0]))
    refused(ArgumentValueError, "cu_seqlens", lambda: module(padded, cu_seqlens=[0, 40]))
    refused(ArgumentValueError, "lengths", lambda: module(packed, lengths=[40]))
    refused(ArgumentValueError, "len(lengths)", lambda: module(padded, lengths=[20]))
    refused(ArgumentValueError, "lengths", lambda: module(padded, lengths=[20, 21]))
    refused(ArgumentValueError, "lengths", lambda: module(padded, lengths=[-1, 20]))
    sizes: Any = {"hidden_size": 3}
    refused(ArgumentTypeError, "config", lambda: NativeSparseAttention(sizes))
    given: Any = (*[packed] * 6, "paper")
    refused(ArgumentTypeError, "config", lambda: native_sparse_attention(*given))


GOOD: dict[str, Any] = {"hidden_size": 64, "head_num": 4, "key_value_head_num": 2, "head_dim": 32}
LIMITS = [
    ("hidden_size", [1, 4096], [0, -1]),
    ("head_num", [2, 4, 512], [0, 3, -2]),
    ("key_value_head_num", [1, 4], [0, 129]),
    ("head_dim", [16, 256], [0, 8, 40, 272]),
    ("value_dim", [None, 16, 256], [0, 24, 272]),
    ("compress_block_size", [16, 32, 64], [0, 8, 40, 144]),
    ("compress_stride", [16, 32], [0, 8, 24, 48]),
    ("select_block_size", [32, 48, 64, 1024], [16, 40, 0]),
    ("select_block_count", [3, 1000], [2, 0]),
    ("window_size", [1, 10**6], [0]),
    ("num_init_blocks", [0, 14], [-1]),
    ("num_local_blocks", [1, 15], [0, -1]),
]


@pytest.mark.parametrize(("name", "right", "wrong"), LIMITS)
def test_both_sides_of_every_limit_of_the_config(name, right, wrong):
    for value in right:
        NSAConfig(**GOOD | {name: value})
    for value in wrong:
        refused(ArgumentValueError, name, lambda value=value: NSAConfig(**GOOD | {name: value}))
    for other in (1.0, "16", True):
        refused(ArgumentTypeError, name, lambda other=other: NSAConfig(**GOOD | {name: other}))


def test_other_arguments_of_the_config():
    refused(ArgumentValueError, "importance", lambda: NSAConfig(**GOOD, importance="mine"))
    refused(ArgumentValueError, "select_block_count", lambda: NSAConfig(**GOOD, num_init_blocks=15))
    refused(ArgumentTypeError, "scale", lambda: NSAConfig(**GOOD | {"scale": "1"}))
    refused(ArgumentTypeError, "separate_key_values", lambda: NSAConfig(**GOOD | {"separate_key_values": 1}))
    assert NSAConfig(**GOOD, scale=0.25).score_scale == 0.25
    assert NSAConfig(**GOOD).score_scale == 32**-0.5
