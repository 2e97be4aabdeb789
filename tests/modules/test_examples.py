"""The examples of docs/module.md and of docstrings run."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch

from nsa_triton.modules import NSAConfig, functional, nsa

PAGE = (Path(__file__).parents[2] / "docs" / "module.md").read_text()
SNIPPETS = [text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "rotate(" not in text]


def test_the_examples_of_the_page_run():
    """One goes on where the one before ended."""
    names: dict[str, object] = {}
    for snippet in SNIPPETS:
        exec(snippet, names)
    assert names["packed"].shape == (300, 512)  # type: ignore[attr-defined]
    assert names["padded"].shape == (2, 150, 512)  # type: ignore[attr-defined]
    assert names["both"].shape == (2, 512)  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", [functional, nsa], ids=lambda module: module.__name__)
def test_the_examples_of_docstrings_run(module):
    results = doctest.testmod(module, extraglobs={"torch": torch, "NSAConfig": NSAConfig})
    assert results.attempted
    assert not results.failed
