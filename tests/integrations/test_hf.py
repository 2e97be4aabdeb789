"""Native sparse attention in models of transformers, which are tiny and have random weights."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_triton import ArgumentTypeError, ArgumentValueError
from nsa_triton.errors import CacheFullError
from nsa_triton.modules import NSAConfig
from tests.implementations import each_implementation, kernel_problem

transformers = pytest.importorskip("transformers", reason="pip install 'nsa_triton[hf]'")

from nsa_triton.integrations.hf import (  # noqa: E402
    NSAGenerationCache,
    SwappedAttention,
    generate,
    swap_attention,
)

PROBLEM = kernel_problem("select_attention")
IMPL = "reference" if PROBLEM else "triton"
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
SMALL: dict[str, Any] = {"select_block_count": 4, "window_size": 40}  # so that none of the three branches sees all
FAMILIES = {"Llama": {"head_dim": 32}, "Mistral": {"head_dim": 32, "sliding_window": 24}, "Qwen2": {}, "Qwen3": {}}


def plain_model(family="Llama", **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **sizes})
    return getattr(transformers, f"{family}ForCausalLM")(config)


def swapped_model(family="Llama", *, impl=IMPL, dtype=torch.float32, **overrides):
    """In evaluation, with gates and compression that differ from head to head."""
    model = swap_attention(plain_model(family).to(dtype), impl=impl, **{**SMALL, **overrides})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_proj" in name or ".nsa." in name:
                parameter += 0.3 * torch.randn_like(parameter) * (parameter.abs().max() if ".nsa." in name else 1)
    return model.eval()


def some_ids(*shape):
    return torch.randint(1, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def without_a_cache(model, prompt: Tensor, count: int) -> Tensor:
    """The best token of a full forward pass, over and over."""
    for _ in range(count):
        best = model(prompt[None]).logits[0, -1].argmax()
        prompt = torch.cat([prompt, best[None]])
    return prompt


def padded(rows, side):
    """Ids and mask of rows of different lengths."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    return ids, (ids > 0).long()


# ---- what is swapped ----


def test_import_of_the_package_does_not_import_transformers():
    program = "import sys, nsa_triton, nsa_triton.integrations; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_without_transformers_it_says_what_to_install():
    program = "import sys; sys.modules['transformers'] = None; import nsa_triton.integrations.hf"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ToolchainError" in done.stderr
    assert "pip install 'nsa_triton[hf]'" in done.stderr


def test_weights_keep_their_names_and_values():
    model = plain_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert swap_attention(model, **SMALL) is model
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = {"gate_proj.weight", "gate_proj.bias", "nsa.key_weight", "nsa.value_weight"}
    assert set(after) - set(before) == {f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in new}
    other = swap_attention(plain_model(), **SMALL)
    assert not other.load_state_dict(before, strict=False).unexpected_keys
    other.load_state_dict(after)


def test_gates_begin_at_a_third_and_compression_as_the_mean():
    attention = swap_attention(plain_model(), **SMALL).model.layers[1].self_attn
    gates = attention.gate_proj(torch.randn(5, 64)).sigmoid()
    torch.testing.assert_close(gates, torch.full((5, 12), 1 / 3))
    torch.testing.assert_close(attention.nsa.key_weight, torch.full((32, 2), 1 / 32))


def test_the_config_is_that_of_the_model_and_the_overrides():
    attention = swap_attention(plain_model(), **SMALL).model.layers[0].self_attn
    assert isinstance(attention, SwappedAttention)
    assert attention.nsa.config == NSAConfig(
        hidden_size=64, head_num=4, key_value_head_num=2, head_dim=32, scale=32**-0.5, **SMALL
    )


def test_a_config_may_be_given():
    config = NSAConfig(hidden_size=64, head_num=4, key_value_head_num=2, head_dim=32, window_size=7)
    model = swap_attention(plain_model(), config)
    assert all(layer.self_attn.nsa.config is config for layer in model.model.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_local_branch_alone_is_the_attention_before(family):
    """With the window of Mistral, and one that sees all for the others."""
    ids, plain = some_ids(2, 70), plain_model(family).eval()
    with torch.no_grad():
        expected = plain(ids).logits
        swapped = swap_attention(plain, impl=IMPL, window_size=FAMILIES[family].get("sliding_window", 70))
        assert not any(module.training for module in swapped.modules())
        for layer in swapped.model.layers:
            layer.self_attn.gate_proj.bias.copy_(torch.tensor([-1e4, -1e4, 1e4]).repeat(4))
        torch.testing.assert_close(swapped(ids).logits, expected, atol=1e-5, rtol=1e-4)


# ---- training ----


@each_implementation("select_attention")
def test_one_step_reaches_every_parameter(impl):
    model = swapped_model(impl=impl).train()
    ids = some_ids(2, 150)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_it_learns_from_batches_that_are_padded_on_the_right():
    model = swapped_model().train()
    ids, mask = padded([some_ids(90), some_ids(64), some_ids(33)], "right")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1, losses


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = swapped_model()
    rows = [some_ids(90), some_ids(5), some_ids(61)]
    ids, mask = padded(rows, side)
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row, logits, real in zip(rows, together, mask.bool(), strict=True):
            torch.testing.assert_close(logits[real], model(row[None]).logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # the new name is too new
def test_checkpointing_has_the_same_gradients():
    model, ids = swapped_model().train(), some_ids(2, 80)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name])


def test_autocast_trains():
    model, ids = swapped_model().train(), some_ids(2, 80)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_bfloat16_is_close_to_float32():
    ids = some_ids(1, 100)
    with torch.no_grad():
        exact, rounded = swapped_model()(ids).logits, swapped_model(dtype=torch.bfloat16)(ids).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


# ---- generation ----


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_the_argmax_of_full_passes(family):
    """Prompts of different lengths, across the ends of windows, strides and pages."""
    model = swapped_model(family, **({"window_size": 20} if family == "Mistral" else {}))
    prompts = [some_ids(250), some_ids(37), some_ids(3)]
    for prompt, tokens in zip(prompts, generate(model, prompts, 12), strict=True):
        assert torch.equal(tokens, without_a_cache(model, prompt, 12))


def test_the_reference_generates_the_same():
    prompts = [some_ids(40), some_ids(9)]
    tokens = [generate(swapped_model(impl=impl), prompts, 4) for impl in ("reference", IMPL)]
    assert all(map(torch.equal, *tokens))


def test_generation_in_bfloat16():
    (tokens,) = generate(swapped_model(dtype=torch.bfloat16), [some_ids(60)], 5)
    assert len(tokens) == 65


def test_whoever_is_done_leaves():
    model, prompts = swapped_model(), [some_ids(50), some_ids(20), some_ids(33)]
    full = generate(model, prompts, 8)
    stop = int(full[1][20 + 2])
    stopped = generate(model, prompts, 8, stop_tokens={stop})
    for prompt, all_tokens, tokens in zip(prompts, full, stopped, strict=True):
        new = all_tokens[len(prompt) :].tolist()
        count = new.index(stop) + 1 if stop in new else 8
        assert torch.equal(tokens, all_tokens[: len(prompt) + count])
    assert len(stopped[1]) <= 23


def test_drawn_tokens_follow_the_generator_and_top_k():
    model, prompts = swapped_model(), [some_ids(20), some_ids(8)]

    def drawn(seed, **options):
        return generate(model, prompts, 6, generator=torch.Generator().manual_seed(seed), **options)

    assert all(map(torch.equal, drawn(0, temperature=5.0), drawn(0, temperature=5.0)))
    assert not all(map(torch.equal, drawn(0, temperature=5.0), drawn(1, temperature=5.0)))
    best = generate(model, prompts, 6)
    assert all(map(torch.equal, drawn(0, temperature=5.0, top_k=1), best))
    assert all(map(torch.equal, drawn(0, temperature=1e-4), best))


def test_transformers_generates_over_the_cache():
    model, ids = swapped_model(), some_ids(2, 60)
    cache = NSAGenerationCache(model, batch=2, max_tokens=72)
    tokens = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
    for prompt, line in zip(ids, tokens, strict=True):
        assert torch.equal(line, without_a_cache(model, prompt, 12))
    assert cache.get_seq_length() == 71  # all but the last one


def test_transformers_generates_from_prompts_that_are_padded_on_the_left():
    model, rows = swapped_model(), [some_ids(57), some_ids(17)]
    ids, mask = padded([*rows, some_ids(60)], "left")
    ids, mask = ids[:2], mask[:2]  # both lines are padded
    cache = NSAGenerationCache(model, batch=2, max_tokens=72)
    tokens = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False)
    for row, line in zip(rows, tokens, strict=True):
        assert torch.equal(line[60 - len(row) :], without_a_cache(model, row, 12))
    assert cache.get_seq_length() == 71  # padding included: transformers counts columns


def test_transformers_generates_without_a_cache():
    model, ids = swapped_model(), some_ids(1, 40)
    tokens = model.generate(ids, use_cache=False, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens[0], without_a_cache(model, ids[0], 3))


def test_beams_share_pages_and_find_what_they_find_without_a_cache():
    model, ids = swapped_model(), some_ids(2, 40)
    search = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    cache = NSAGenerationCache(model, batch=6, max_tokens=45)
    assert torch.equal(
        model.generate(ids, past_key_values=cache, **search), model.generate(ids, use_cache=False, **search)
    )


def test_a_conversation_goes_on_in_the_cache():
    model, ids = swapped_model(), some_ids(1, 50)
    cache = NSAGenerationCache(model, batch=1, max_tokens=80)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    longer = torch.cat([first, some_ids(1, 9)], 1)
    second = model.generate(longer, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(second[0], without_a_cache(model, longer[0], 6))


def test_the_cache_forgets():
    model, ids = swapped_model(), some_ids(1, 50)
    cache = NSAGenerationCache(model, batch=1, max_tokens=60)
    with torch.no_grad():
        expected = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
        cache.crop(-10)
        again = model(ids[:, 40:], past_key_values=cache, use_cache=True).logits[:, -1]
        torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-4)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(ids, past_key_values=cache, use_cache=True).logits[:, -1], expected)


# ---- errors ----


def test_padding_on_the_left_is_refused_in_training():
    ids, mask = padded([some_ids(20), some_ids(9)], "left")
    with pytest.raises(ArgumentValueError, match="padding_side='right'"):
        swapped_model().train()(ids, attention_mask=mask)


def test_gaps_are_refused():
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, 7] = 0
    with pytest.raises(ArgumentValueError, match="gaps"):
        swapped_model()(some_ids(1, 20), attention_mask=mask)


def test_packed_sequences_are_refused():
    with pytest.raises(ArgumentValueError, match="line of its own"):
        swapped_model()(some_ids(1, 20), position_ids=torch.arange(10).repeat(2)[None])


def test_masks_over_pairs_are_refused():
    with pytest.raises(ArgumentValueError, match="which tokens are real"):
        swapped_model()(some_ids(1, 20), attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool))


def test_other_caches_are_refused():
    model = swapped_model()
    with pytest.raises(ArgumentTypeError, match="NSAGenerationCache"):
        model.generate(some_ids(1, 20), max_new_tokens=2, do_sample=False)
    with pytest.raises(ArgumentValueError, match="swap_attention"):
        plain_model()(some_ids(1, 20), past_key_values=NSAGenerationCache(model, batch=1, max_tokens=30))


def test_the_name_alone_is_refused():
    model = plain_model()
    model.set_attn_implementation("nsa_triton")
    with pytest.raises(ArgumentValueError, match=r"swap_attention\(model\)"):
        model(some_ids(1, 20))


def test_a_cache_that_does_not_fit_is_refused():
    model = swapped_model()
    with pytest.raises(ArgumentValueError, match="after swap_attention"):
        NSAGenerationCache(plain_model(), batch=1, max_tokens=30)
    for sizes in ({"batch": 0, "max_tokens": 30}, {"batch": 1, "max_tokens": 30, "page_size": 0}):
        with pytest.raises(ArgumentValueError, match="at least 1"):
            NSAGenerationCache(model, **sizes)
    mixed = swapped_model()
    mixed.model.layers[1].self_attn.nsa.config = NSAConfig(64, 4, 2, 32)
    with pytest.raises(ArgumentValueError, match="one config"):
        NSAGenerationCache(mixed, batch=1, max_tokens=30)
    with pytest.raises(ArgumentValueError, match="2 lines"):
        model(some_ids(3, 20), past_key_values=NSAGenerationCache(model, batch=2, max_tokens=30))
    with pytest.raises(ArgumentValueError, match="at most 30"):
        model(some_ids(2, 31), past_key_values=NSAGenerationCache(model, batch=2, max_tokens=30))
    with pytest.raises(CacheFullError, match="pages"):
        model(some_ids(2, 30), past_key_values=NSAGenerationCache(model, batch=2, max_tokens=30, pages=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_size": 0}, "window_size"),
        ({"head_dim": 16, "config": NSAConfig(64, 4, 2, 32)}, "None beside head_dim"),
        ({"config": NSAConfig(64, 8, 2, 32)}, "config.head_num: expected 4"),
        ({"config": NSAConfig(64, 4, 2, 32, value_dim=16)}, "config.value_size: expected 32"),
        ({"separate_key_values": True}, "config.separate_key_values: expected False"),
    ],
)
def test_configs_that_do_not_fit_are_refused_and_nothing_changes(arguments, message):
    model = plain_model()
    with pytest.raises(ArgumentValueError, match=message):
        swap_attention(model, **arguments)
    assert not any(isinstance(module, SwappedAttention) for module in model.modules())
    assert model.config._attn_implementation != "nsa_triton"


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ArgumentTypeError, match="PreTrainedModel"):
        swap_attention(torch.nn.Linear(2, 2))
    with pytest.raises(ArgumentValueError, match="swapped before"):
        swap_attention(swapped_model())
    with pytest.raises(ArgumentValueError, match="attention_dropout: expected 0"):
        swap_attention(plain_model(attention_dropout=0.1))
    bert = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(ArgumentValueError, match="decoder layers with self_attn"):
        swap_attention(transformers.BertModel(bert))
    sizes = {name: SIZES[name] for name in SIZES if name.startswith(("hidden", "inter", "num", "vocab", "pad"))}
    with pytest.raises(ArgumentValueError, match="k_norm, q_norm too"):
        swap_attention(transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "one prompt at least"),
        ({"prompts": [[1, 2], []]}, r"prompts\[1\]"),
        ({"prompts": [[1.5]]}, r"prompts\[0\]"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0, "temperature": 1.0}, "top_k"),
    ],
)
def test_bad_arguments_of_generate_are_refused(arguments, message):
    with pytest.raises(ArgumentValueError, match=message):
        generate(swapped_model(), **{"prompts": [[1, 2]], "max_new_tokens": 2, **arguments})
