"""How fast devices can be at best: bytes of memory and products per second, and where that is written."""

from __future__ import annotations

from dataclasses import dataclass

from nsa_triton.ascend.chips import CHIPS
from nsa_triton.ascend.simulator.costs import parameters


@dataclass(frozen=True)
class Rates:
    """Per second; flops of products of 16-bit factors."""

    bytes: float
    flops: float
    source: str

    def least_us(self, flops: int, moved: int) -> float:
        """No device of these rates computes a result that needs so much in less."""
        return 1e6 * max(flops / self.flops, moved / self.bytes)


# By the name of the target: the name of the device, lower case with dashes.
GPUS = {
    "nvidia-h200": Rates(4.8e12, 989e12, "NVIDIA H200 data sheet: 4.8 TB/s, 989 TFLOP/s bfloat16 without sparsity"),
    "nvidia-h100-80gb-hbm3": Rates(3.35e12, 989e12, "NVIDIA H100 data sheet, SXM: 3.35 TB/s, 989 TFLOP/s"),
    "nvidia-a100-sxm4-80gb": Rates(2.039e12, 312e12, "NVIDIA A100 data sheet, 80 GB SXM: 2,039 GB/s, 312 TFLOP/s"),
    "nvidia-a100-sxm4-40gb": Rates(1.555e12, 312e12, "NVIDIA A100 data sheet, 40 GB: 1,555 GB/s, 312 TFLOP/s"),
}


def rates_of(target: str) -> Rates | None:
    """None where nobody has written them down; those of a CPU depend on the machine."""
    if target in GPUS:
        return GPUS[target]
    return _of_chip(target) if target in CHIPS else None


def _of_chip(name: str) -> Rates:
    model = parameters()
    chip, values = model["chips"][name], model["parameters"]
    products = values["cube_rows"]["value"] ** 2 * values["cube_depth_16"]["value"] * CHIPS[name].cube_cores
    return Rates(chip["hbm_gb_per_s"] * 1e9, 2 * products * chip["clock_mhz"] * 1e6, chip["source"])
