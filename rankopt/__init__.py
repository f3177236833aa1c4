"""rankopt: which tensor decomposition, at which rank, for every layer, under one budget."""

from rankopt.budget import Limit, parse_budget
from rankopt.core import (
    BudgetError,
    Candidate,
    Choice,
    Cost,
    Layer,
    Plan,
    PlanError,
    RankoptError,
    StudyError,
    Task,
    TaskError,
    Trial,
)
from rankopt.decompositions import DECOMPOSITIONS
from rankopt.finetune import finetune
from rankopt.fuse import fuse
from rankopt.inventory import count, inventory, unfolded
from rankopt.job import compress
from rankopt.plan import load, read_plan
from rankopt.recipe import Recipe
from rankopt.result import Result
from rankopt.space import SearchSpace, load_space
from rankopt.strategies import STRATEGIES

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
