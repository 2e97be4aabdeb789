"""How much memory operations take."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """The elements of the largest storage that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                elements = result.untyped_storage().nbytes() // result.element_size()
                self.largest = max(self.largest, elements)
        return results
