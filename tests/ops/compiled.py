"""What ops ask of the Ascend compilers: each inherits what fits the time that its kernels take to compile."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import pytest

from tests.compiling import CHIPS, VERSIONS, problems


class CasesCompile:
    launch: ModuleType
    cases: ClassVar[list[Any]]  # arguments of `launch.compile_plans`

    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("chip_name", CHIPS)
    def test_every_case_compiles_without_problems(self, chip_name, version):
        assert problems(self.launch, chip_name, version, self.cases) == {}


class FirstCaseCompiles:
    launch: ModuleType
    cases: ClassVar[list[Any]]  # the first one is the shape of the paper

    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("chip_name", CHIPS)
    def test_the_shape_of_the_paper_compiles_without_problems(self, chip_name, version):
        assert problems(self.launch, chip_name, version, self.cases[:1]) == {}

    @pytest.mark.slow
    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("chip_name", CHIPS)
    def test_every_case_compiles_without_problems(self, chip_name, version):
        assert problems(self.launch, chip_name, version, self.cases) == {}


class ConfigsCompile:
    launch: ModuleType
    worst: ClassVar[list[Any]]  # for every entry of the shipped file, the shapes with the largest tiles it makes

    @pytest.mark.parametrize("version", VERSIONS)
    def test_every_shipped_config_compiles_without_problems(self, version):
        assert problems(self.launch, CHIPS[0], version, self.worst) == {}

    @pytest.mark.slow
    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("chip_name", CHIPS[1:])
    def test_every_shipped_config_compiles_for_the_other_chips(self, chip_name, version):
        assert problems(self.launch, chip_name, version, self.worst) == {}
