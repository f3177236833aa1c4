"""Search spaces for tests."""

from rankopt.candidates.search_space import SearchSpace

QUICK = SearchSpace(name="quick", families=("svd_out", "cp_merged"), points=6, steps=20)
