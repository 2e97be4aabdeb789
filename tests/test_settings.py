"""Environment variables: defaults, strict parsing, and changes that are seen at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nsa_triton.errors import ConfigError
from nsa_triton.settings import VARIABLES, settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_there_are_at_most_five_variables_and_each_is_described():
    assert len(VARIABLES) <= 5
    assert all(name.startswith("NSA_TRITON_") and text for name, text in VARIABLES.items())


def test_defaults():
    now = settings()
    assert now.limits == "structural"
    assert now.config_dir is None
    assert now.compilers == ()
    assert now.check_indices is False
    assert now.cache_dir == Path.home() / ".cache" / "nsa_triton"


def test_an_empty_variable_is_no_variable(monkeypatch):
    default = settings()
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    assert settings() == default


def test_values_are_read_at_every_call(monkeypatch, tmp_path):
    assert settings() is settings()
    monkeypatch.setenv("NSA_TRITON_LIMITS", "documented")
    monkeypatch.setenv("NSA_TRITON_CHECK_INDICES", "1")
    monkeypatch.setenv("NSA_TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NSA_TRITON_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NSA_TRITON_COMPILERS", os.pathsep.join(["/one", "/two"]))
    now = settings()
    assert now.limits == "documented"
    assert now.check_indices is True
    assert (now.cache_dir, now.config_dir) == (tmp_path / "cache", tmp_path)
    assert now.compilers == (Path("/one"), Path("/two"))
    monkeypatch.setenv("NSA_TRITON_LIMITS", "structural")
    assert settings().limits == "structural"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NSA_TRITON_LIMITS", "Documented"),
        ("NSA_TRITON_LIMITS", "none"),
        ("NSA_TRITON_CONFIG_DIR", "/no/such/folder"),
        ("NSA_TRITON_CHECK_INDICES", "yes"),
    ],
)
def test_a_bad_value_names_the_variable_and_itself(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}.*{value}"):
        settings()
