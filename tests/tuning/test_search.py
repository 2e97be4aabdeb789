"""The order of candidates: the default first, the best one's neighbours early, everything in the end."""

from __future__ import annotations

import itertools

from nsa_triton.tuning.search import FINALISTS, Search
from nsa_triton.tuning.space import Options
from nsa_triton.tuning.sweep import Candidate, Verdict
from tests.tuning.sweeps import candidate, timed

SIZES = (16, 32, 64, 96, 128, 192, 256)
DEFAULT = candidate(BQ=256, BN=256)
GRID = [candidate(BQ=q, BN=n) for q, n in itertools.product(SIZES, SIZES)]
OPTIONS: tuple[Options, ...] = ({}, {"multibuffer": False}, {"unit_flag": True})


def bowl(one):
    """Best at 64, 96; better with unit_flag."""
    sizes, options = dict(one.tiles), dict(one.options)
    us = 100 + abs(SIZES.index(sizes["BQ"]) - 2) * 10 + abs(SIZES.index(sizes["BN"]) - 3) * 10
    return timed(us - 5 * ("unit_flag" in options))


def order(search, verdict=bowl, most=10**6):
    tried: list[Candidate] = []
    while len(tried) < most and (one := search.next()) is not None:
        tried.append(one)
        search.hear(one, verdict(one))
    return tried


def test_the_default_comes_first_and_everything_once():
    search = Search(DEFAULT, GRID, OPTIONS)
    tried = order(search)
    assert tried[0] == DEFAULT
    assert len(set(tried)) == len(tried) == search.total
    assert {one for one in tried if not one.options} == set(GRID)
    assert len(tried) >= len(GRID) + FINALISTS * 2
    assert search.best == candidate({"unit_flag": True}, BQ=64, BN=96)


def test_an_early_stop_has_the_best_already():
    """Found with its options after half of the space, where any order would need all of it."""
    search = Search(DEFAULT, GRID, OPTIONS)
    order(search, most=len(GRID) // 2)
    assert search.best == candidate({"unit_flag": True}, BQ=64, BN=96)


def test_neighbours_of_a_default_whose_sizes_are_cut_are_those_of_its_twin():
    """As 256 columns are where a head has 64: no candidate has so many."""
    default, twin = candidate(BT=64, BD=256), candidate(BT=64, BD=64)
    tiles = [candidate(BT=rows, BD=columns) for rows in (32, 64, 128) for columns in (32, 64)]
    search = Search(default, [one for one in tiles if one != twin], ({},), twin=twin)
    search.hear(default, timed(1.0))
    assert not search.settled
    tried = order(search, lambda _: timed(2.0), most=4)  # one of them is far from the default
    assert {candidate(BT=32, BD=64), candidate(BT=128, BD=64), candidate(BT=64, BD=32)} < set(tried)
    assert search.settled


def test_it_is_settled_once_all_around_the_best_is_known():
    search = Search(DEFAULT, GRID, OPTIONS)
    assert not search.settled
    while not search.settled:
        one = search.next()
        assert one is not None
        search.hear(one, bowl(one))
    best = candidate({"unit_flag": True}, BQ=64, BN=96)
    assert search.best == best
    around = {candidate({"unit_flag": True}, BQ=q, BN=n) for q, n in ((32, 96), (96, 96), (64, 64), (64, 128))}
    options = {candidate(option, BQ=64, BN=96) for option in OPTIONS}
    assert around | options <= set(search.verdicts)
    assert len(search.verdicts) < len(GRID) * 2 // 3


def test_tiles_that_fit_only_with_the_options_of_the_best_are_found():
    """Larger ones than 64 x 64, which two workspaces make room for."""

    def verdict(one):
        sizes = dict(one.tiles)
        if max(sizes.values()) > 64 and not one.options:
            return Verdict("compiler", "Double buffering was dropped")
        return timed(1000.0 - sizes["BQ"] - sizes["BN"] - bool(one.options))

    best = candidate({"unit_flag": True}, BQ=256, BN=256)
    search = Search(candidate(BQ=32, BN=32), GRID, ({}, {"unit_flag": True}))
    while not search.settled:
        one = search.next()
        assert one is not None
        search.hear(one, verdict(one))
    assert search.best == best
    later = Search(candidate(BQ=32, BN=32), GRID, ({}, {"unit_flag": True}))
    order(later, verdict)
    assert later.best == best, "also where all plain tiles come first"


def test_what_won_elsewhere_comes_right_behind_the_default():
    elsewhere = [candidate({"unit_flag": True}, BQ=16, BN=256), DEFAULT, candidate(BQ=16, BN=16)]
    foreign = [candidate({"stages": 2}, BQ=16, BN=256), candidate(BQ=17, BN=256)]
    search = Search(DEFAULT, GRID, OPTIONS, [*foreign, *elsewhere])
    tried = order(search)
    assert tried[:3] == [DEFAULT, elsewhere[0], elsewhere[2]]
    assert len(set(tried)) == len(tried) == search.total


def test_a_candidate_that_is_known_is_not_tried_again():
    search = Search(DEFAULT, GRID, ({},))
    for one in GRID[:-1]:
        search.hear(one, bowl(one))
    assert order(search) == [DEFAULT]


def test_refused_candidates_never_rank():
    search = Search(DEFAULT, GRID, ({},))
    tried = order(search, lambda one: Verdict("compiler", "no") if one != DEFAULT else timed(9))
    assert len(tried) == len(GRID)
    assert search.ranked() == [DEFAULT]


def test_of_equals_the_default_is_best():
    search = Search(DEFAULT, GRID, ({},))
    order(search, lambda one: timed(1))
    assert search.best == DEFAULT


def test_several_at_a_time_are_different():
    search = Search(DEFAULT, GRID, ({},))
    begun = [search.next() for _ in range(5)]
    assert len(set(begun)) == 5


def test_candidates_of_an_older_space_are_not_its_own():
    search = Search(DEFAULT, GRID, OPTIONS)
    assert search.has(candidate({"unit_flag": True}, BQ=64, BN=96))
    assert not search.has(candidate(BQ=48, BN=96))
    assert not search.has(candidate({"sync_solver": True}, BQ=64, BN=96))
