"""Decode over a paged cache: prefill prompts of different lengths, fork one, continue all of them, forget some tokens.

The tokens are random vectors: what counts is that each step gives what a pass over the whole sequence gives.
"""

import argparse
import time

import torch

from nsa_triton import NativeSparseAttention, NSACache, NSAConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--device", default="cpu", help="cpu, npu or cuda (default: cpu, by the NPU's lowering)")
parser.add_argument("--tokens", type=int, default=8, help="new tokens of each sequence")
options = parser.parse_args()

torch.manual_seed(0)
config = NSAConfig(256, head_num=8, key_value_head_num=2, head_dim=32, select_block_count=8, window_size=128)
attention = NativeSparseAttention(config, device=options.device).eval()
cache = NSACache(config, layers=1, pages=16, max_tokens=2048, dtype=torch.float32, device=options.device)
history = {}  # of each sequence, all its tokens, to compare with


@torch.no_grad()
def extend(new):
    """Attention of new tokens {sequence: [T, 256]} to all that the cache holds of their sequences."""
    step = cache.extend({sequence: len(tokens) for sequence, tokens in new.items()})
    for sequence, tokens in new.items():
        history[sequence] = torch.cat([history.get(sequence, tokens[:0]), tokens])
    return attention(torch.cat(list(new.values())), step=step)


@torch.no_grad()
def largest_error(output, new):
    """Against a pass over the whole sequences."""
    whole = [attention(history[sequence])[-len(tokens) :] for sequence, tokens in new.items()]
    return (output.cpu() - torch.cat(whole).cpu()).abs().max().item()


def some(count):
    return torch.randn(count, 256, device=options.device)


def tell(what):
    lengths = ", ".join(f"{sequence}: {cache.length(sequence)}" for sequence in cache.sequences)
    print(f"{what:34} tokens {{{lengths}}}, {cache.free_pages} of 16 pages free")


new = {cache.add(): some(700), cache.add(): some(35)}
print(f"largest error of the prefill: {largest_error(extend(new), new):.1e}")
tell("two prompts")

copy = cache.fork(0)
history[copy] = history[0]
tell("0 forked: it shares its pages")

began = time.perf_counter()
for _ in range(options.tokens):
    new = {sequence: some(1) for sequence in cache.sequences}
    output = extend(new).cpu()  # waits for the device
took = (time.perf_counter() - began) / options.tokens
tell(f"{options.tokens} steps of all three")
print(f"largest error of the last step: {largest_error(output, new):.1e}; {1000 * took:.0f} ms per step, here")

cache.truncate(copy, 700)  # tokens that were guessed, and not accepted
history[copy] = history[copy][:700]
new = {copy: some(3)}
print(f"largest error behind forgotten tokens: {largest_error(extend(new), new):.1e}")
cache.free(0)
tell(f"{copy} went on from 700, 0 is free")
