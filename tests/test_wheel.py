"""The wheel: it carries the configs, and works where there is no repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

import pytest

from tests.readme import ROOT

pytest.importorskip("hatchling", reason="hatchling builds the wheel; the test extra installs it")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, ROOT]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("nsa_triton-*.whl")
    return file


def test_the_wheel_carries_configs_and_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "nsa_triton/autotune_configs/default/compress.json" in names
    assert "nsa_triton/bench/cases.py" in names
    assert not [name for name in names if "__pycache__" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "bench", "examples"))]


def test_the_installed_wheel_finds_its_own_configs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    ask = (
        "from nsa_triton.runtime.configs import config_root, load\n"
        "print(config_root(), len(load(config_root() / 'default' / 'compress.json')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, cwd=tmp_path, env=environment)
    place, entries = done.stdout.split()
    assert place == str(tmp_path / "site" / "nsa_triton" / "autotune_configs")
    assert int(entries) > 10


def test_the_installed_wheel_has_its_own_benchmarks(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    modules = ["baseline", "cases", "gate", "plot", "providers", "rates", "results", "run", "timing", "vendor"]
    ask = f"from nsa_triton.cli.bench import bench_module; print([bench_module(name).__file__ for name in {modules}])"
    places = run("-c", ask)
    assert places.returncode == 0, places.stderr
    assert places.stdout.count(str(tmp_path / "site" / "nsa_triton" / "bench")) == len(modules)
    command = ("bench", "nsa_compress", "--lengths", "64", "--providers", "reference", "--target", "cpu")
    done = run("-m", "nsa_triton", *command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "nsa-triton-bench" / "cpu" / "bench.csv").exists(), "not inside of the package"
