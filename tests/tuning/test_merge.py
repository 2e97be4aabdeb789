"""Entries go into files of configs as a whole or not at all, in the right place, and look-ups find them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nsa_triton.errors import ConfigError
from nsa_triton.runtime.configs import load, lookup
from nsa_triton.runtime.target import Target
from nsa_triton.tuning.merge import merge, require_mergeable

CHIP = Target("npu", "AscendTest", 48, 24, "1.2.0")
KEY = {"D": 64, "compiler": "1.2.0"}


def entry(us=1.0, length=0, how="simulated", key=KEY, kernel="k", **tiles):
    """As the tuner makes it: the length is that of the call."""
    evidence = {"how": how, "us": us, "workload": {"length": length}}
    shown = {"kernel": kernel, "key": key, "length": length, "tiles": tiles or {"BT": 64}, "options": {}}
    return {**shown, "evidence": evidence}


def plain(**changes):
    """As a person writes it."""
    default = {"how": "default", "note": "fits"}
    one = {"kernel": "k", "key": {}, "length": 0, "tiles": {"BT": 16}, "options": {}, "evidence": default}
    return {**one, **changes}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_TRITON_CONFIG_DIR", str(tmp_path))
    yield tmp_path
    load.cache_clear()


def put(folder, *entries, **more):
    for one in entries:
        file = merge(folder, "AscendTest", "op", one, **more)
    return file


def lengths(file):
    return [one["length"] for one in json.loads(file.read_text())["entries"]]


def find(length, compiler="1.2.0", d=64):
    target = Target("npu", "AscendTest", 48, 24, compiler)
    return lookup("op", "k", target, {"D": d}, length, ("BT",)).tiles["BT"]


def test_the_next_lookup_finds_it(folder):
    put(folder, entry(BT=32))
    assert find(5) == 32
    put(folder, entry(BT=48))
    assert find(5) == 48


def test_the_file_has_one_entry_per_line_and_obeys_the_schema(folder):
    file = put(folder, entry(), entry(kernel="other"), entry(length=4096))
    lines = file.read_text().splitlines()
    assert lines[:5] == ["{", '  "schema": 1,', '  "op": "op",', '  "target": "AscendTest",', '  "entries": [']
    assert all(json.loads(line.rstrip(","))["kernel"] in ("k", "other") for line in lines[5:-2])
    assert len(lines) == 5 + 3 + 2
    assert len(load(file)) == 3
    assert [path.name for path in file.parent.iterdir()] == ["op.json"]  # nothing is left beside it


def test_the_shortest_call_that_was_tuned_serves_all_below(folder):
    file = put(folder, entry(length=8192, BT=32))
    assert lengths(file) == [0]
    put(folder, entry(length=65536, BT=48))
    assert (find(100), find(8192), find(65535), find(65536)) == (32, 32, 32, 48)
    put(folder, entry(length=2048, BT=64))
    assert sorted(lengths(file)) == [0, 8192, 65536]
    assert (find(100), find(8191), find(8192), find(65536)) == (64, 64, 32, 48)


def test_the_same_call_tuned_again_replaces(folder):
    file = put(folder, entry(length=8192, BT=32), entry(length=2048, BT=48), entry(length=8192, BT=96))
    assert len(load(file)) == 2
    assert (find(2048), find(8192)) == (48, 96)


def test_compilers_and_keys_live_side_by_side(folder):
    put(folder, entry(BT=32), entry(key={**KEY, "compiler": "1.0.0"}, BT=48), entry(key={**KEY, "D": 128}, BT=96))
    assert (find(5), find(5, "1.0.0"), find(5, d=128)) == (32, 48, 96)


def test_an_exact_key_goes_before_a_broad_one(folder):
    file = folder / "AscendTest" / "op.json"
    file.parent.mkdir()
    content = {"schema": 1, "op": "op", "target": "AscendTest"}
    file.write_text(json.dumps({**content, "entries": [plain(kernel="a"), plain(), plain(kernel="z")]}))
    put(folder, entry(BT=48))
    assert [one.kernel for one in load(file)] == ["a", "k", "k", "z"]
    assert (find(5), find(5, d=128)) == (48, 16)
    assert json.loads(file.read_text())["entries"][2] == plain()


def test_simulated_never_replaces_measured(folder):
    file = put(folder, entry(how="measured", BT=32))
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="is measured, the new one is simulated; --force"):
        put(folder, entry(BT=48))
    assert file.read_bytes() == before
    put(folder, entry(BT=48), force=True)
    assert find(5) == 48
    put(folder, entry(how="measured", BT=32))
    assert find(5) == 32


def test_several_tuners_lose_no_entry(folder):
    """Of each other; they read, change and write one file."""
    made = [entry(key={**KEY, "D": d}) for d in range(24)]
    with ThreadPoolExecutor(8) as pool:
        files = set(pool.map(lambda one: merge(folder, "AscendTest", "op", one), made))
    (file,) = files
    assert sorted(one.key["D"] for one in load(file)) == list(range(24))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ('{"schema": 2}', "got schema 2"), ('{"schema": 1, "op": "no"}', "expected op 'op'")],
)
def test_a_corrupt_or_newer_file_is_refused_and_left_alone(folder, content, message):
    file = folder / "AscendTest" / "op.json"
    file.parent.mkdir()
    file.write_text(content)
    for refuse in (lambda: put(folder, entry()), lambda: require_mergeable(folder, "AscendTest", "op")):
        with pytest.raises(ConfigError, match=message):
            refuse()
    assert file.read_text() == content


def test_a_full_disk_leaves_the_old_file(folder, monkeypatch):
    file = put(folder, entry(BT=32))
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match=r"No space left on device; the results are in the journal"):
        put(folder, entry(BT=48))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_may_be_written_is_left_as_it_is(tmp_path):
    require_mergeable(tmp_path, "AscendTest", "op")
    assert not list(tmp_path.iterdir())


def test_a_read_only_folder_is_known_before_any_work():
    read_only = Path("/proc")  # root may write everywhere else
    with pytest.raises(ConfigError, match=r"AscendTest/op.json: cannot be written: .*--output DIR names another"):
        require_mergeable(read_only, "AscendTest", "op")
    with pytest.raises(ConfigError, match=r"AscendTest/op.json: cannot be written: .*in the journal"):
        merge(read_only, "AscendTest", "op", entry())
