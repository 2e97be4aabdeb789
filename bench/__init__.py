"""Microbenchmarks and counts; their results are under results/."""
