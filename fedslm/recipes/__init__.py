"""Settings that learned in measured runs, for everything that a private config leaves out."""

from fedslm.recipes.choice import Completed, completed, read_recipe, write_recipe
from fedslm.recipes.expected import Expectation, expected
from fedslm.recipes.table import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "Completed",
    "Expectation",
    "Recipe",
    "completed",
    "expected",
    "read_recipe",
    "write_recipe",
]
