"""rankopt: which tensor decomposition, at which rank, for every layer, under one budget."""

from rankopt import data, tensorly
from rankopt.api.bonds import Bonds, bonds
from rankopt.api.compress import compress
from rankopt.api.inspection import Inspection, inspect
from rankopt.api.plugins import register
from rankopt.api.prepared import PreparedModel, prepare, sweep
from rankopt.api.result import Result
from rankopt.api.runs import export, load_run, save
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.budget import Limit, parse_budget
from rankopt.core.errors import BudgetError, PlanError, RankoptError, StudyError, TaskError
from rankopt.core.records import Candidate, Choice, Cost, Layer, Plan, Task, Trial
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.plan import load, read_plan
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.export.fuse import fuse
from rankopt.model.counting import count
from rankopt.model.inventory import inventory, unfolded
from rankopt.strategies.base import Strategy
from rankopt.strategies.registry import STRATEGIES
from rankopt.training.finetune import finetune
from rankopt.training.recipe import Recipe

__version__ = "0.1.0"

__all__ = [
    "DECOMPOSITIONS",
    "STRATEGIES",
    "Bonds",
    "BudgetError",
    "Candidate",
    "Choice",
    "Cost",
    "Decomposition",
    "Inspection",
    "Layer",
    "Limit",
    "Plan",
    "PlanError",
    "PreparedModel",
    "RankoptError",
    "Recipe",
    "Result",
    "SearchSpace",
    "Strategy",
    "StudyError",
    "Task",
    "TaskError",
    "Trial",
    "bonds",
    "compress",
    "count",
    "data",
    "export",
    "finetune",
    "fuse",
    "inspect",
    "inventory",
    "load",
    "load_run",
    "load_space",
    "parse_budget",
    "prepare",
    "read_plan",
    "register",
    "save",
    "sweep",
    "tensorly",
    "unfolded",
]
