"""For users of Ray Tune: a searcher that proposes plans under a budget, for a trainable of their own.

`import rankopt` does not import it; `from rankopt.ray import RankSearch` needs `pip install 'rankopt[ray]'`.
"""

from rankopt.search.ray.rank_search import PlanBuilder, RankSearch

__all__ = ["PlanBuilder", "RankSearch"]
