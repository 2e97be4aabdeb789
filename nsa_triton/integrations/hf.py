"""Native sparse attention in the models of Hugging Face transformers.

    model = LlamaForCausalLM.from_pretrained(...)
    swap_attention(model, window_size=256)                     # keeps all weights, adds gates and compression
    model(input_ids, attention_mask=mask, labels=labels).loss.backward()       # train what was added, or all

    tokens = generate(model, prompts, max_new_tokens=100)      # prompts of any lengths, over a paged cache
    cache = NSAGenerationCache(model, batch=4, max_tokens=2048)
    tokens = model.generate(input_ids, past_key_values=cache)  # transformers' own loop over the same cache

Any causal model will do whose decoder layers have a `self_attn` like that of Llama, Mistral, Qwen2 and Qwen3: `q_proj`,
`k_proj`, `v_proj`, `o_proj`, and rotary embeddings that it is given.

Importing this registers "nsa_triton" in the attention interface of transformers, for one half of it: the masks. Models
then hand down which tokens are real, instead of a mask over all pairs of tokens. The other half, a function of queries,
keys and values, cannot be native sparse attention, whose gates and compression have weights of their own; it raises an
error that says to call `swap_attention`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError, ToolchainError
from nsa_triton.modules.cache import NSACache, Step
from nsa_triton.modules.config import NSAConfig
from nsa_triton.modules.nsa import NativeSparseAttention
from nsa_triton.ops._common.arguments import check_int, check_scale

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.cache_utils import Cache
except ImportError as error:
    raise ToolchainError(f"This needs transformers: {error}", ["pip install 'nsa_triton[hf]'"]) from error

__all__ = ["NSAGenerationCache", "SwappedAttention", "generate", "swap_attention"]

NAME = "nsa_triton"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")  # of each head, as in Qwen3
GENERATE = "Pass past_key_values=NSAGenerationCache(model, ...) or use_cache=False, or call nsa_triton's generate"


# ---- which tokens are real ----


@dataclass(frozen=True)
class Tokens:
    """The real tokens of a batch [B, S] of new ones, and how to pack them.

    lengths  real tokens of each line
    padded   S
    places   [T] where they are among all B * S; None: all are real
    is_left  whether padding stands before tokens
    """

    lengths: tuple[int, ...]
    padded: int
    places: Tensor | None = None
    is_left: bool = False

    @classmethod
    def of_mask(cls, mask: Tensor, device: torch.device) -> Tokens:
        """Of a mask [B, S] on the CPU, True where a token is real."""
        behind = nn.functional.pad(mask, (1, 0))[:, :-1]
        if int((mask & ~behind).sum(1).max()) > 1:
            hint = "Take the tokens out of input_ids instead"
            raise ArgumentValueError("attention_mask", "padding before or behind the tokens of a line", "gaps", hint)
        places = mask.flatten().nonzero()[:, 0].to(device)
        is_left = bool((mask.any(1) & ~mask[:, 0]).any())
        return cls(tuple(mask.sum(1).tolist()), mask.shape[1], places, is_left)

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where lines begin and end, packed."""
        return (0, *accumulate(self.lengths))

    def pack(self, tokens: Tensor) -> Tensor:
        """[B, S, X] or, if it is the same for all lines, [1, S, X] -> [T, X]."""
        flat = tokens.expand(len(self.lengths), -1, -1).flatten(0, 1)
        return flat if self.places is None else flat[self.places]

    def unpack(self, packed: Tensor) -> Tensor:
        """[T, X] -> [B, S, X], 0 where there is padding."""
        batch, size = len(self.lengths), packed.shape[-1]
        if self.places is not None:
            packed = packed.new_zeros((batch * self.padded, size)).index_copy(0, self.places, packed)
        return packed.view(batch, self.padded, size)


def _real_tokens(
    batch_size: int,
    q_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> Tokens | None:
    """What transformers calls once per forward, and hands to all layers as their mask. None: all tokens are real."""
    if not allow_is_causal_skip:
        expected = "a causal mask, of one sequence in each line"
        hint = "Give each of the packed sequences a line of its own, padded behind it"
        raise ArgumentValueError("position_ids", expected, "positions that begin again, or another mask", hint)
    if attention_mask is None:
        return None
    mask = attention_mask[:, -q_length:].cpu()
    return None if bool(mask.all()) else Tokens.of_mask(mask, attention_mask.device)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    hint = "Load the model with another one, and call nsa_triton.integrations.hf.swap_attention(model)"
    raise ArgumentValueError("attn_implementation", "one without weights of its own", repr(NAME), hint)


AttentionInterface.register(NAME, _refuse)
AttentionMaskInterface.register(NAME, _real_tokens)


# ---- the attention of a layer ----


class SwappedAttention(nn.Module):
    """Native sparse attention in the place of a layer's `self_attn`, with the projections of that.

    New parameters: `gate_proj` [3 * N1, hidden_size] and its bias, `nsa.key_weight` and `nsa.value_weight`. Compression
    begins as the mean, and each gate at a third, so that what is added up has the scale of the attention before.
    """

    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, attention: Any, config: NSAConfig, layer: int, dtype: torch.dtype, impl: str) -> None:
        super().__init__()
        self.layer = layer
        for name in (*PROJECTIONS, *NORMS):
            if hasattr(attention, name):
                setattr(self, name, getattr(attention, name))
        kind: dict[str, Any] = {"device": attention.q_proj.weight.device, "dtype": dtype}
        self.gate_proj = nn.Linear(config.hidden_size, 3 * config.head_num, **kind)
        nn.init.zeros_(self.gate_proj.weight)
        nn.init.constant_(self.gate_proj.bias, -math.log(2))  # the sigmoid of it is 1 / 3
        self.nsa = NativeSparseAttention(config, projections=False, impl=impl, **kind)
        self._rotate = _rotary(attention)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tokens | None = None,
        past_key_values: NSAGenerationCache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[B, S, hidden_size] -> the same, and no attention weights."""
        tokens = self._tokens(hidden_states, attention_mask, past_key_values)
        query, key, value, gates = self._project(tokens.pack(hidden_states))
        query, key = self._rotate(query, key, *(tokens.pack(part) for part in position_embeddings))
        attended = self.nsa.attend(
            query.to(value.dtype),  # under autocast, rotary embeddings widen them
            key.to(value.dtype),
            value,
            gates,
            cu_seqlens=tokens.bounds,
            step=None if past_key_values is None else past_key_values.step(self.layer, tokens),
            layer=self.layer,
        )
        return tokens.unpack(self.o_proj(attended.flatten(1))), None

    def _tokens(self, hidden: Tensor, mask: Any, cache: Any) -> Tokens:
        if isinstance(mask, Tensor):
            hint = f"Call model.set_attn_implementation({NAME!r}), and give the model a mask [B, S]"
            raise ArgumentValueError("attention_mask", "what says which tokens are real", list(mask.shape), hint)
        if not (cache is None or isinstance(cache, NSAGenerationCache)):
            raise ArgumentTypeError("past_key_values", "an NSAGenerationCache or None", type(cache).__name__, GENERATE)
        if mask is None:
            return Tokens((hidden.shape[1],) * hidden.shape[0], hidden.shape[1])
        tokens: Tokens = mask
        if tokens.is_left and self.training and cache is None:  # positions would begin behind the padding
            hint = "Set padding_side='right' in the tokenizer"
            raise ArgumentValueError("attention_mask", "padding behind the tokens, in training", "some before", hint)
        return tokens

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [T, N1, D], keys [T, N2, D], values [T, N2, D] and gates [T, N1, 3] of tokens [T, hidden_size]."""
        config = self.nsa.config
        heads = {"q": config.head_num, "k": config.key_value_head_num, "v": config.key_value_head_num}
        query, key, value = (
            getattr(self, f"{name}_proj")(hidden).view(-1, count, config.head_dim) for name, count in heads.items()
        )
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value, self.gate_proj(hidden).view(-1, config.head_num, 3)


def swap_attention(
    model: PreTrainedModel, config: NSAConfig | None = None, *, impl: str = "auto", **overrides: Any
) -> PreTrainedModel:
    """Make native sparse attention the attention of all layers of a model, in place.

    All weights are kept under their names, so a `state_dict` of the model still fits (with strict=False): see
    `SwappedAttention` for what is new. To load what `save_pretrained` saved afterwards, make the model from its config,
    call this, and then `load_state_dict`. `config.use_cache` becomes False: only an `NSAGenerationCache` will do.

    Args:
        model: a causal language model, or the decoder of one.
        config: heads, windows and blocks. None: those of the model, with the defaults of `NSAConfig`.
        impl: "auto", "triton" or "reference", as in `NativeSparseAttention`.
        overrides: instead of `config`, some of its arguments, such as window_size=256.

    Returns:
        The model.

    Raises:
        ArgumentTypeError, ArgumentValueError: the model has attention of another kind, or the config does not fit it;
            nothing was changed.
    """
    if not isinstance(model, PreTrainedModel):
        raise ArgumentTypeError("model", "a transformers.PreTrainedModel", type(model).__name__)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "self_attn")}
    if not layers:
        raise ArgumentValueError("model", "decoder layers with self_attn", f"none in {type(model).__name__}")
    if config is not None and overrides:
        raise ArgumentValueError("config", f"None beside {', '.join(overrides)}", "an NSAConfig")
    for name, layer in layers.items():
        _check_attention(f"{name}.self_attn", layer.self_attn)
    configs = [_config_of(layer.self_attn, config, overrides) for layer in layers.values()]
    model.set_attn_implementation(NAME)
    model.config.use_cache = False
    for number, (layer, its_config) in enumerate(zip(layers.values(), configs, strict=True)):
        swapped = SwappedAttention(layer.self_attn, its_config, number, model.dtype, impl)
        layer.self_attn = swapped.train(layer.training)
    return model


def _check_attention(name: str, attention: nn.Module) -> None:
    """Raise unless all that the attention does is done by `SwappedAttention` too."""
    if isinstance(attention, SwappedAttention):
        raise ArgumentValueError("model", "a model as transformers makes it", f"{name}, which was swapped before")
    missing = [part for part in PROJECTIONS if not hasattr(attention, part)]
    if missing:
        raise ArgumentValueError(name, f"attention with {', '.join(PROJECTIONS)}", f"none called {', '.join(missing)}")
    others = {key for key, _ in attention.named_parameters() if key.split(".")[0] not in (*PROJECTIONS, *NORMS)}
    others |= {key for key in NORMS if hasattr(attention, key) and not _is_per_head(getattr(attention, key), attention)}
    if others:
        raise ArgumentValueError(name, "attention whose weights are projections", f"{', '.join(sorted(others))} too")
    if _rotary(attention) is None:
        raise ArgumentValueError(name, "rotary embeddings by apply_rotary_pos_emb", type(attention).__name__)
    if not getattr(attention, "is_causal", False):
        raise ArgumentValueError(name, "causal attention", f"is_causal={getattr(attention, 'is_causal', None)}")
    if getattr(attention, "attention_dropout", 0):
        hint = "Set it to 0 in the config of the model"
        raise ArgumentValueError(f"{name}.attention_dropout", "0", attention.attention_dropout, hint)


def _is_per_head(norm: nn.Module, attention: Any) -> bool:
    return [list(weight.shape) for weight in norm.parameters()] in ([], [[attention.head_dim]])


def _rotary(attention: nn.Module) -> Any:
    """How the model itself applies rotary embeddings: halves, pairs, or a part of each head."""
    return getattr(inspect.getmodule(type(attention)), "apply_rotary_pos_emb", None)


def _config_of(attention: Any, config: NSAConfig | None, overrides: dict[str, Any]) -> NSAConfig:
    size: int = attention.head_dim
    own = {
        "hidden_size": attention.q_proj.in_features,
        "head_num": attention.q_proj.out_features // size,
        "key_value_head_num": attention.k_proj.out_features // size,
        "head_dim": size,
    }
    if config is None:
        config = NSAConfig(**{**own, "scale": attention.scaling, **overrides})
    for name, value in {**own, "value_size": size, "separate_key_values": False}.items():
        if getattr(config, name) != value:
            raise ArgumentValueError(f"config.{name}", f"{value}, as the model has it", getattr(config, name))
    return config


# ---- the cache ----


class NSAGenerationCache(Cache):  # type: ignore[misc]  # transformers is not there for every type checker
    """The paged cache of a swapped model, as transformers passes caches: `past_key_values`.

    Padding takes no room in it: prompts padded on the left are cached, and attended to, without it. Beams share pages.

    Args:
        model: what `swap_attention` returned.
        batch: lines of ids; of a beam search, prompts * beams.
        max_tokens: no line may have more tokens, new ones included.
        pages: room for `pages * page_size` tokens of all lines. None: enough for `max_tokens` in each.
        page_size: see `NSACache`.

    Attributes:
        paged: the `NSACache` of all layers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch: int,
        max_tokens: int,
        pages: int | None = None,
        page_size: int | None = None,
    ) -> None:
        super().__init__(layers=[])
        attentions = [module for module in model.modules() if isinstance(module, SwappedAttention)]
        if not attentions:
            raise ArgumentValueError("model", "a model after swap_attention", type(model).__name__)
        weight, config = attentions[0].nsa.key_weight, attentions[0].nsa.config
        for nsa in (attention.nsa for attention in attentions):
            if (nsa.config, nsa.key_weight.device) != (config, weight.device):
                raise ArgumentValueError("model", "layers with one config, on one device", "others")
        page_size = 16 * config.compress_stride if page_size is None else page_size
        for name, number in {"batch": batch, "max_tokens": max_tokens, "page_size": page_size}.items():
            _check_count(name, number)
        self.paged = NSACache(
            config,
            layers=len(attentions),
            pages=batch * -(-max_tokens // page_size) if pages is None else pages,
            max_tokens=max_tokens,
            page_size=page_size,
            dtype=weight.dtype,
            device=weight.device,
        )
        self._lines = [self.paged.add() for _ in range(batch)]
        self._seen = 0  # tokens of a line, padding included
        self._step: Step | None = None

    def step(self, layer: int, tokens: Tokens) -> Step:
        """The step of these new tokens: the first layer makes it, the others use it."""
        if layer == 0:
            if len(tokens.lengths) != len(self._lines):
                raise ArgumentValueError("input_ids", f"{len(self._lines)} lines, as in the cache", len(tokens.lengths))
            new = zip(self._lines, tokens.lengths, strict=True)
            self._step = self.paged.extend({line: count for line, count in new if count})
            self._seen += tokens.padded
        if self._step is None:
            raise ArgumentValueError("layer", "0 before all others", layer)
        return self._step

    # What transformers asks of a cache. Lengths are those of the ids, padding included.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.paged.max_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    @property
    def batch_size(self) -> int:
        return len(self._lines)

    def update(self, *_: Any, **__: Any) -> NoReturn:
        hint = "Call swap_attention(model) first"
        raise ArgumentValueError("past_key_values", "a cache of keys and values", "an NSAGenerationCache", hint)

    def reset(self) -> None:
        """Forget all tokens."""
        for line in self._lines:
            self.paged.truncate(line, 0)
        self._seen, self._step = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens of each line."""
        if tokens_to_remove > 0:
            raise ArgumentValueError("tokens_to_remove", "0, or minus a number of tokens", tokens_to_remove)
        for line in self._lines:
            self.paged.truncate(line, self.paged.length(line) + tokens_to_remove)
        self._seen += tokens_to_remove

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these lines, in this order. One may come twice: both share its pages."""
        kept = [self.paged.fork(self._lines[index]) for index in indices.tolist()]
        for line in self._lines:
            self.paged.free(line)
        self._lines = kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self._lines)).repeat_interleave(repeats))


# ---- generation ----


@torch.no_grad()
def generate(
    model: Any,
    prompts: Iterable[Sequence[int] | Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop_tokens: Collection[int] = (),
) -> list[Tensor]:
    """Continue prompts of any lengths over a paged cache. Whoever is done leaves the batch, and its pages.

    Args:
        model: a causal language model after `swap_attention`.
        prompts: token ids of each prompt, one at least.
        max_new_tokens: how many tokens follow each of them, at most.
        temperature: 0 takes the best token; above, tokens are drawn, with logits divided by it.
        top_k: draw from so many of the best tokens; None: from all.
        generator: what to draw with, on the model's device.
        stop_tokens: after one of them, a prompt is done.

    Returns:
        For each prompt, its tokens and those that follow, [T] on the CPU.
    """
    rows = _checked_prompts(prompts)
    for name, number in {"max_new_tokens": max_new_tokens, "top_k": 1 if top_k is None else top_k}.items():
        _check_count(name, number)
    check_scale("temperature", temperature)
    if temperature < 0:
        raise ArgumentValueError("temperature", "0, or a number above", temperature)
    longest = max(map(len, rows)) + max_new_tokens
    cache = NSAGenerationCache(model, batch=len(rows), max_tokens=longest)
    going, inputs = list(range(len(rows))), _left_padded(rows, model.device)
    for _ in range(max_new_tokens):
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen = _choose(output.logits[:, -1].float(), temperature, top_k, generator).tolist()
        for row, token in zip(going, chosen, strict=True):
            rows[row].append(token)
        stay = [line for line, token in enumerate(chosen) if token not in stop_tokens]
        if not stay:
            break
        if len(stay) < len(going):
            cache.batch_select_indices(torch.tensor(stay))
            going = [going[line] for line in stay]
        inputs = _newest([rows[row] for row in going], model.device)
    return [torch.tensor(row) for row in rows]


def _check_count(name: str, number: int) -> None:
    check_int(name, number)
    if number < 1:
        raise ArgumentValueError(name, "at least 1", number)


def _checked_prompts(prompts: Iterable[Sequence[int] | Tensor]) -> list[list[int]]:
    rows = [prompt.tolist() if hasattr(prompt, "tolist") else list(prompt) for prompt in prompts]
    if not rows:
        raise ArgumentValueError("prompts", "one prompt at least", "none")
    for number, row in enumerate(rows):
        if not row or not all(isinstance(token, int) for token in row):
            raise ArgumentValueError(f"prompts[{number}]", "token ids, one at least", row)
    return rows


def _left_padded(rows: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """All tokens, so that the newest ones stand side by side."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def _newest(rows: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """The newest token of each."""
    ids = torch.tensor([row[-1:] for row in rows], device=device)
    return {"input_ids": ids, "position_ids": torch.tensor([[len(row) - 1] for row in rows], device=device)}


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """[B] tokens, of logits [B, vocabulary]."""
    if temperature == 0:
        return logits.argmax(-1)
    size = logits.shape[-1]
    logits, tokens = logits.topk(size if top_k is None else min(top_k, size))
    drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
    return tokens.gather(1, drawn)[:, 0]
