"""autotune_configs: every shipped file obeys the schema, look-up is what the README says, bad files are refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from nsa_triton.ascend.chips import CHIPS, chip, relatives
from nsa_triton.errors import ConfigError
from nsa_triton.runtime import configs
from nsa_triton.runtime.configs import config_root, load, lookup, overriding
from nsa_triton.runtime.target import Target, ascend_target

FILES = sorted(config_root().glob("*/*.json"))
CHIP = Target("npu", "AscendTest", 48, 24)


def entry(**changes):
    plain = {
        "kernel": "k",
        "key": {},
        "length": 0,
        "tiles": {"BT": 64},
        "options": {},
        "evidence": {"how": "default"},
    }
    return {**plain, **changes}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A config folder of our own; `write` puts entries for one target into it."""
    monkeypatch.setenv("NSA_TRITON_CONFIG_DIR", str(tmp_path))

    def write(target, *entries, **changes):
        place = tmp_path / target
        place.mkdir(exist_ok=True)
        content = {"schema": 1, "op": "op", "target": place.name, "entries": list(entries), **changes}
        (place / "op.json").write_text(json.dumps(content))
        load.cache_clear()

    return write


def find(length=100, tiles=("BT",), **key):
    return lookup("op", "k", CHIP, key, length, tiles)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_shipped_file_obeys_the_schema_and_loads(file):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(file.read_text()), json.loads((config_root() / "schema.json").read_text()))
    assert load(file)


def test_there_are_defaults():
    assert config_root() / "default" / "compress.json" in FILES


def test_the_targets_own_file_comes_first(folder):
    folder("default", entry(tiles={"BT": 16}))
    assert find().tiles == {"BT": 16}


def test_what_a_folder_of_ones_own_lacks_is_taken_from_the_shipped_one(folder, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(configs, "_shipped_configs", lambda: shipped)
    for place, tile in (("shipped/default", 16), ("shipped/AscendTest", 32)):
        folder(place, entry(tiles={"BT": tile}))
    assert find().tiles == {"BT": 32}
    folder("default", entry(tiles={"BT": 48}, key={"D": 64}))
    assert find(D=128).tiles == {"BT": 32}
    assert find(D=64).tiles == {"BT": 48}
    monkeypatch.delenv("NSA_TRITON_CONFIG_DIR")
    assert find(D=64).tiles == {"BT": 32}


def test_own_entry_wins_over_default(folder):
    folder("default", entry(tiles={"BT": 16}))
    folder("AscendTest", entry(tiles={"BT": 32}, key={"D": 64}))
    assert find(D=64).tiles == {"BT": 32}
    assert find(D=128).tiles == {"BT": 16}


def find_for(chip_name, **key):
    return lookup("op", "k", ascend_target(chip(chip_name)), key, 100, ("BT",))


def test_what_a_chip_lacks_is_taken_from_one_with_the_same_memories_then_from_default(folder):
    folder("default", entry(tiles={"BT": 16}))
    folder("Ascend910B4", entry(tiles={"BT": 32}, key={"D": 64}))
    folder("Ascend910B2", entry(tiles={"BT": 48}, key={"D": 64}))
    folder("Ascend910B1", entry(tiles={"BT": 64}, key={"D": 192}))
    found = {name: find_for(name, D=64).tiles["BT"] for name in ("Ascend910B1", "Ascend910B3", "Ascend910B4")}
    assert found == {"Ascend910B1": 48, "Ascend910B3": 32, "Ascend910B4": 32}, "as many cores first"
    assert find_for("Ascend910B4", D=192).tiles == {"BT": 64}
    assert find_for("Ascend910B4", D=128).tiles == {"BT": 16}
    assert find(D=64).tiles == {"BT": 16}, "AscendTest is like no chip"


def test_whose_tuned_file_is_used_is_said(folder, caplog, tmp_path):
    folder("Ascend910B2", entry())
    with caplog.at_level(logging.INFO, logger="nsa_triton"):
        find_for("Ascend910B1")
    file = tmp_path / "Ascend910B2" / "op.json"
    assert caplog.messages == [f"op: no tuned config for Ascend910B1, using that of Ascend910B2, {file}"]


def test_relatives_have_the_same_memories_and_those_with_as_many_cores_come_first():
    for name, one in CHIPS.items():
        found = [CHIPS[other] for other in relatives(name)]
        assert one not in found
        assert len(set(found)) == len(found) == len(CHIPS) - 1, "all chips of today have the same memories"
        unlike = [other.cube_cores != one.cube_cores for other in found]
        assert unlike == sorted(unlike)


def test_a_chip_with_other_memories_is_no_relative(monkeypatch):
    monkeypatch.setitem(CHIPS, "AscendNew", replace(CHIPS["Ascend910B2"], name="AscendNew", ub=256 << 10))
    assert "AscendNew" not in relatives("Ascend910B2")
    assert relatives("AscendNew") == ()


def test_largest_length_not_above_the_request(folder):
    folder("default", *(entry(length=length, tiles={"BT": tile}) for length, tile in ((0, 16), (1024, 32), (4096, 48))))
    found = [find(length=length).tiles["BT"] for length in (0, 1023, 1024, 4095, 4096, 10**6)]
    assert found == [16, 16, 32, 32, 48, 48]


def test_first_of_equals_and_upper_bounds(folder):
    folder("default", *(entry(key={"L": {"max": top}}, tiles={"BT": top}) for top in (16, 32, 64)))
    assert [find(L=value).tiles["BT"] for value in (16, 17, 32, 33, 64)] == [16, 32, 32, 64, 64]
    with pytest.raises(ConfigError, match=r"no config for k with key \{'L': 65\}"):
        find(L=65)


def test_falling_back_to_default_is_said_once(folder, caplog):
    folder("default", entry())
    with caplog.at_level(logging.INFO, logger="nsa_triton"):
        find(D=1)
        find(D=2)
    assert [record.message for record in caplog.records if "no tuned config for AscendTest" in record.message] != []
    assert len(caplog.records) == 1


def test_a_tuned_file_that_is_used_is_named(folder, caplog, tmp_path):
    folder("AscendTest", entry())
    with caplog.at_level(logging.INFO, logger="nsa_triton"):
        find()
    assert caplog.messages == [f"op: tuned config for AscendTest, using {tmp_path / 'AscendTest' / 'op.json'}"]


def test_tiles_must_be_those_of_the_kernel(folder):
    folder("default", entry(tiles={"BT": 64, "BX": 64}))
    with pytest.raises(ConfigError, match="expected the tiles BT, got BT, BX"):
        find()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiles": {"BT": 24}}, r"tiles.BT: expected a multiple of 16 in \[16, 4096\], got 24"),
        ({"tiles": {"BT": 0}}, "got 0"),
        ({"tiles": {"BT": 4112}}, "got 4112"),
        ({"tiles": {"BT": True}}, "got True"),
        ({"tiles": {"BT": "64"}}, "got '64'"),
        ({"tiles": []}, "tiles: expected an object"),
        ({"key": {"L": {"min": 3}}}, r"key.L: expected a value, or \{\"max\": integer\}"),
        ({"length": -1}, "length: expected an integer >= 0"),
        ({"options": {"tpu": {}}}, "options.tpu"),
        ({"evidence": {}}, "evidence.how: expected one of measured, simulated, default, got None"),
        ({"evidence": {"how": "guessed"}}, "got 'guessed'"),
        ({"kernel": 3}, "kernel: expected a name"),
        ({"surprise": 1}, "fields: expected"),
    ],
)
def test_illegal_entries_are_refused(folder, changes, message):
    folder("default", entry(), entry(**changes))
    with pytest.raises(ConfigError, match=f"entry 1: {message}|{message}"):
        find()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object with schema 1"),
        ('{"schema": 2}', "got schema 2"),
        ('{"schema": 1, "op": "other", "target": "default", "entries": []}', "expected op 'op'"),
        ('{"schema": 1, "op": "op", "target": "other", "entries": []}', "expected target 'default'"),
        ('{"schema": 1, "op": "op", "target": "default", "entries": {}}', "expected a list of entries"),
    ],
)
def test_broken_files_are_refused_by_name(folder, tmp_path, content, message):
    folder("default", entry())
    (tmp_path / "default" / "op.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        find()
    assert "default/op.json" in str(error.value)


def test_a_config_folder_that_does_not_exist_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("NSA_TRITON_CONFIG_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no such folder"):
        config_root()


def test_an_entry_may_be_for_one_compiler(folder):
    folder("AscendTest", entry(tiles={"BT": 96}, key={"compiler": "1.2.0"}), entry(tiles={"BT": 32}))
    found = {
        version: lookup("op", "k", replace(CHIP, compiler=version), {}, 0, ("BT",)).tiles["BT"]
        for version in ("1.2.0", "1.0.0", None)
    }
    assert found == {"1.2.0": 96, "1.0.0": 32, None: 32}


def test_an_entry_says_how_much_of_the_unified_buffer_it_takes(folder):
    folder("AscendTest", entry(), entry(key={"D": 1}, evidence={"how": "default", "ub_limit": 97}, length=1))
    assert (find().ub_limit, find(D=1).ub_limit) == (80, 97)


@pytest.mark.parametrize("limit", [79, 101, 90.5, "90", True])
def test_a_limit_that_is_none_is_refused(folder, limit):
    folder("AscendTest", entry(evidence={"how": "default", "ub_limit": limit}))
    with pytest.raises(ConfigError, match=r"entry 0: evidence.ub_limit: expected an integer in \[80, 100\]"):
        find()


def test_tiles_of_a_kernel_can_be_overridden(folder):
    folder("AscendTest", entry())
    with overriding("k", {"BT": 16}, {"npu": {"multibuffer": False}}):
        with overriding("another", {"BT": 32}):
            inside = find()
        assert find() == inside
    assert (inside.tiles, inside.options) == ({"BT": 16}, {"npu": {"multibuffer": False}})
    assert find().tiles == {"BT": 64}
