"""Native sparse attention in a Llama of Hugging Face transformers: swap it in, train a little, generate.

The model is tiny and has random weights; `LlamaForCausalLM.from_pretrained(...)` goes the same way.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nsa_triton.integrations.hf import NSAGenerationCache, generate, swap_attention

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--device", default="cpu", help="cpu, npu or cuda (default: cpu, by the NPU's lowering)")
parser.add_argument("--steps", type=int, default=45)
options = parser.parse_args()

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, eos_token_id=None, bos_token_id=None, **sizes, **heads))
before = set(model.state_dict())
swap_attention(model.to(options.device), select_block_count=4, window_size=32)
print("new parameters of a layer:")
for name, parameter in model.model.layers[0].self_attn.named_parameters():
    if f"model.layers.0.self_attn.{name}" not in before:
        print(f"  {name:20} {list(parameter.shape)}")

text = 4 * "the quick brown fox jumps over the lazy dog. "
tokens = torch.tensor([list(text.encode())], device=options.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(1, options.steps + 1):
    loss = model(tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0 or step == 1:
        print(f"step {step:3}: loss {loss.item():.3f}", flush=True)

model.eval()
prompts = [list(text[:60].encode()), list(b"the lazy")]  # of different lengths, without padding
print("generated over a paged cache:")
for prompt, row in zip(prompts, generate(model, prompts, max_new_tokens=24), strict=True):
    print(f"  {bytes(prompt).decode()[-20:]!r} -> {bytes(row[len(prompt) :].tolist()).decode(errors='replace')!r}")

cache = NSAGenerationCache(model, batch=1, max_tokens=84)
ids = tokens[:, :60]
theirs = model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False)
ours = generate(model, [ids[0]], max_new_tokens=24)[0]
print("model.generate over the same kind of cache gives the same:", torch.equal(theirs[0].cpu(), ours))
