"""rankopt: which tensor decomposition, at which rank, for every layer, under one budget."""

from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.budget import Limit, parse_budget
from rankopt.core.errors import BudgetError, PlanError, RankoptError, StudyError, TaskError
from rankopt.core.records import Candidate, Choice, Cost, Layer, Plan, Task, Trial
from rankopt.decompositions.plan import load, read_plan
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.export.fuse import fuse
from rankopt.model.counting import count
from rankopt.model.inventory import inventory, unfolded
from rankopt.search.api import compress
from rankopt.search.result import Result
from rankopt.strategies.registry import STRATEGIES
from rankopt.training.finetune import finetune
from rankopt.training.recipe import Recipe

__version__ = "0.1.0"

__all__ = [
    "DECOMPOSITIONS",
    "STRATEGIES",
    "BudgetError",
    "Candidate",
    "Choice",
    "Cost",
    "Layer",
    "Limit",
    "Plan",
    "PlanError",
    "RankoptError",
    "Recipe",
    "Result",
    "SearchSpace",
    "StudyError",
    "Task",
    "TaskError",
    "Trial",
    "compress",
    "count",
    "finetune",
    "fuse",
    "inventory",
    "load",
    "load_space",
    "parse_budget",
    "read_plan",
    "unfolded",
]
