"""How the statistics of a softmax, the maximum and the sum of each row, are stored."""

from __future__ import annotations

import torch

STATE = 8  # floats in 32 bytes, the least that an NPU moves; CANN's operators repeat each maximum and each sum so often
LOWEST = torch.finfo(torch.float32).min  # the maximum of a row that sees nothing
