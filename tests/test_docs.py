"""The documents keep their word: every op family has its page, links lead somewhere, examples run."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from nsa_triton.ops.catalog import FAMILIES
from tests import op_pages
from tests.chinese import headings
from tests.readme import CHINESE, OP_PAGES, OPS, PARTS, README, ROOT

SECTIONS = ["Maths", "Functions", "Limits", "What differs from CANN, and why", "Cost", "Example"]
GENERATED = ["summary", "functions", "limits", "simulated", "example"]  # in the order of a page
DOCS = ROOT / "docs"
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *DOCS.rglob("*.md")})
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def by_name(page):
    return str(page.relative_to(ROOT))


def test_every_family_has_a_page_and_every_page_a_family():
    assert sorted(OPS.glob("*.md")) == sorted(OP_PAGES.values())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_pages_have_all_sections_and_words_in_them(family):
    text = OP_PAGES[family].read_text()
    title, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    assert title.startswith(f"# {family.name}\n")
    assert [section.partition("\n")[0] for section in sections] == SECTIONS
    for section in sections:
        assert len(section.partition("\n")[2].split()) > 20, section.partition("\n")[0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_pages_hold_what_is_generated_for_their_family(family):
    found = re.findall(r"<!-- begin generated: (.+?) -->", OP_PAGES[family].read_text())
    assert found == [op_pages.part_name(family, kind) for kind in GENERATED]
    assert set(found) <= set(PARTS)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_parameter_is_described(family):
    for function in op_pages.functions_of(family):
        described = [
            name
            for names, text in op_pages.entries(op_pages.docstring_parts(function)["Args"])
            for name in names.split(", ")
            if text
        ]
        assert sorted(described) == sorted(op_pages.parameters(function))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_examples_run_and_give_what_they_say(family):
    scope: dict[str, object] = {}
    torch.manual_seed(0)
    exec(op_pages.imports(family), scope)
    for step in op_pages.steps(family):
        if step.want:
            assert repr(eval(step.source, scope)) == step.want.rstrip()
        else:
            exec(step.source, scope)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_to_files_and_headings(page):
    for target in links(page.read_text()):
        name, _, anchor = target.partition("#")
        to = (page.parent / name).resolve() if name else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), target


def test_every_document_is_in_the_index():
    index = DOCS / "README.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in links(index.read_text())}
    assert set(DOCS.rglob("*.md")) - {index} <= linked


def test_the_readme_leads_to_the_index():
    assert "docs/README.md" in links((ROOT / "README.md").read_text())


# ---- README.zh-CN.md says what README.md says ----


def test_the_chinese_readme_has_the_same_sections_and_generated_parts():
    def outline(text):
        return re.findall(r"^(#+ |<!-- .+? -->|```\w*)", text, re.MULTILINE)

    assert outline(CHINESE.read_text()) == outline(README.read_text())


def test_the_chinese_readme_has_the_same_commands_and_snippets():
    ours, theirs = (re.findall(r"```\w*\n.*?```", page.read_text(), re.DOTALL) for page in (CHINESE, README))
    for own, other in zip(ours, theirs, strict=True):
        assert without_comments(own) == without_comments(other)


def test_the_chinese_readme_has_the_same_links():
    ours, theirs = ([re.sub(r"^#.*", "#", target) for target in links(page.read_text())] for page in (CHINESE, README))
    ours.remove(README.name)
    theirs.remove(CHINESE.name)
    assert sorted(ours) == sorted(theirs)


def test_the_chinese_readme_has_the_same_names_numbers_and_rows():
    for facts in (names, numbers, rows):
        assert facts(prose(CHINESE)) == facts(prose(README))


def test_headings_of_generated_tables_are_chinese():
    words = {h for h in headings(CHINESE.read_text()) if h.isascii() and re.search(r"[a-z]{3}", h)}
    assert words == {"nsa_triton", "torch_npu"}


def without_comments(code: str) -> str:
    return re.sub(r" *# .*", "", code)


def prose(page: Path) -> str:
    """What was written by hand, without snippets and pictures."""
    other = r"<!-- begin .*?<!-- end generated -->|```.*?```|<picture>.*?</picture>"
    return re.sub(other, "", page.read_text(), flags=re.DOTALL)


def names(text: str) -> Counter[str]:
    return Counter(re.findall(r"`[^`]+`", " ".join(text.split())))


def numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", text))


def rows(text: str) -> list[int]:
    """The number of cells of each row of a table."""
    return [line.count("|") - 1 for line in text.splitlines() if line.startswith("|")]


def links(text: str) -> list[str]:
    """The targets of links and pictures within the repository."""
    found = ("".join(groups) for groups in LINK.findall(CODE.sub("", text)))
    return [target for target in found if not target.startswith(("https:", "http:", "mailto:"))]


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
