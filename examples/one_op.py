"""One operator: compression of a ragged batch, forward and backward, against its specification in float64."""

import argparse
import time

import torch

import nsa_triton

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--device", default="cpu", help="cpu, npu or cuda (default: cpu, by the NPU's lowering)")
parser.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16", "float32"))
options = parser.parse_args()

LENGTHS = [700, 0, 1348]  # three segments, packed without padding
BLOCK, STRIDE, HEADS, SIZE = 32, 16, 4, 192
ends = torch.tensor(LENGTHS).cumsum(0).tolist()


def compress(key, weight, impl):
    return nsa_triton.nsa_compress(key, weight, BLOCK, STRIDE, actual_seq_len=ends, impl=impl)


def rounded(*shape):
    """Random numbers of the dtype, as parameters."""
    values = torch.randn(shape, dtype=torch.float64).to(getattr(torch, options.dtype))
    return values.to(options.device).requires_grad_()


def error(got, exact):
    return ((got.cpu().double() - exact).norm() / exact.norm()).item()


torch.manual_seed(0)
key, weight = rounded(sum(LENGTHS), HEADS, SIZE), rounded(BLOCK, HEADS)
output = compress(key, weight, "auto")  # the kernels, or the specification where they cannot run
slope = torch.randn_like(output)
output.backward(slope)

exact_key, exact_weight = (tensor.detach().cpu().double().requires_grad_() for tensor in (key, weight))
exact = compress(exact_key, exact_weight, "reference")
exact.backward(slope.cpu().double())

windows = [max(0, (length - BLOCK) // STRIDE + 1) for length in LENGTHS]
print(f"{options.device}, {options.dtype}: {LENGTHS} tokens -> {windows} windows of {BLOCK} every {STRIDE}")
print(f"output {tuple(output.shape)}, relative errors against float64:")
for name, got, wanted in (
    ("output", output.detach(), exact.detach()),
    ("gradient of the keys", key.grad, exact_key.grad),
    ("gradient of the weights", weight.grad, exact_weight.grad),
):
    print(f"  {name:24} {error(got, wanted):.1e}")

compiled = torch.compile(compress, fullgraph=True, backend="aot_eager")
print("torch.compile gives the same bits:", torch.equal(compiled(key, weight, "auto"), output))

began = time.perf_counter()
for _ in range(10):
    compress(key, weight, "auto")[0, 0, 0].item()  # waits for the device
print(f"a call takes {(time.perf_counter() - began) * 100:.1f} ms on this machine")
