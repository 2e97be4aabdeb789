"""Searches tiles and launch options, and writes what is better than the defaults into autotune_configs.

sweep.py       what a sweep, a candidate and a verdict are
space.py       what to try, and what arithmetic rules out
planning.py    the launches of a call as values, and the configs that it asks for
timing.py      how candidates are ranked: measured on a device, or simulated
evaluation.py  one candidate: arithmetic, compiler, clock
search.py      the order in which candidates are tried
workers.py     where: here, in processes, or on a Ray cluster
journal.py     what is known so far, on disk at once
plans.py       which sweeps there are, and what each would try
gate.py        whether numbers are right
result.py      what came of a sweep, as an entry with its evidence
merge.py       that entry in a file of configs
tune.py        all of it, one sweep after the other
"""
