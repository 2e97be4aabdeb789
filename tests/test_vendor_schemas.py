"""Our spellings of torch_npu's operators take what its own schemas say, in every version that was looked at."""

from __future__ import annotations

import inspect

import pytest
import torch

from nsa_triton.vendor.patch import FUNCTIONS
from tests.vendor_schemas import read

EMPTY = inspect.Parameter.empty
SCHEMAS = {schema: torch._C.parse_schema(schema) for schema in read()}
each_schema = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=lambda schema: schema.name)


def parameters(schema, kind):
    return [p for p in inspect.signature(FUNCTIONS[schema.name]).parameters.values() if p.kind is kind]


def default_of(argument):
    return argument.default_value if argument.has_default_value() else EMPTY


def test_every_operator_of_torch_npu_has_its_function_and_the_other_way_round():
    assert {schema.name for schema in SCHEMAS.values()} == set(FUNCTIONS)


def test_one_schema_serves_all_versions():
    assert len(SCHEMAS) == len(FUNCTIONS)
    assert len({tuple(versions) for versions in read().values()}) == 1


@each_schema
def test_positional_arguments_are_the_same_in_the_same_order(schema):
    expected = [(one.name, default_of(one)) for one in schema.arguments if not one.kwarg_only]
    found = parameters(schema, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert [(one.name, one.default) for one in found] == expected


@each_schema
def test_keyword_arguments_are_there_with_the_same_defaults(schema):
    expected = {one.name: default_of(one) for one in schema.arguments if one.kwarg_only}
    found = {one.name: one.default for one in parameters(schema, inspect.Parameter.KEYWORD_ONLY)}
    assert {name: found[name] for name in expected} == expected
    ours = {name: default for name, default in found.items() if name not in expected}
    assert "impl" in ours
    assert EMPTY not in ours.values(), "code for torch_npu does not know our own arguments"


@each_schema
def test_there_are_no_other_kinds_of_arguments(schema):
    kinds = {one.kind for one in inspect.signature(FUNCTIONS[schema.name]).parameters.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


@each_schema
def test_as_many_tensors_are_returned(schema):
    count = len(schema.returns)
    expected = "Tensor" if count == 1 else f"tuple[{', '.join(['Tensor'] * count)}]"
    annotated = inspect.signature(FUNCTIONS[schema.name]).return_annotation
    assert annotated.split(" | ")[0] == expected  # another result than the first is asked for with an argument of ours
