"""The recipes, as data, each with the runs that support it.

A recipe is chosen by the task and the kind of base. Its values fill in what a private config leaves
out; the user's own values always win. :mod:`fedslm.recipes.choice` computes what depends on the base,
on the budget and on the public size of a client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedslm.config.base import TaskName

Value = str | int | float


@dataclass(frozen=True)
class Recipe:
    """Settings for one kind of job.

    Attributes:
        name: Its name.
        tasks: Tasks that it was measured on.
        values: Dotted key to value.
        sample_rate: Probability with which a unit joins a step.
        clip_norm: Largest norm of a unit's gradient; of features of length 1 if ``on_features``.
        on_features: Whether the head on normalized features learns nearly everything: clip norm and
            rate are then derived from the width of the base and from the noise.
        least_parameters: The recipe is for bases of at least this many parameters, and for smaller ones
            where no other recipe fits better.
        evidence: The runs.
        needed: Signal-to-noise ratio (:func:`fedslm.privacy.planning.signal_to_noise`) below which the
            measured runs kept less than half of what they learned without privacy; 0: not measured.
        enough: Ratio from which on they kept three quarters of it or more; 0: not measured.
    """

    name: str
    tasks: tuple[TaskName, ...]
    values: Mapping[str, Value]
    sample_rate: float
    clip_norm: float
    evidence: str
    on_features: bool = False
    least_parameters: int = 0
    needed: float = 0.0
    enough: float = 0.0


_ONE_STEP: Mapping[str, Value] = {"training.local_steps": 1, "training.optimizer": "sgd"}

_SMALL_DECODER = {
    "lora.rank": 8,
    "lora.alpha": 16.0,
    "training.local_steps": 6,
    "training.learning_rate": 1e-2,
    "federation.rounds": 6,
}
RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="features",
        tasks=("classification",),
        values={
            "task.pooling": "normalized",
            "task.head": "labels",
            "lora.rank": 1,
            **_ONE_STEP,
            "federation.rounds": 16,
            "aggregation.method": "head",
            "aggregation.server_optimizer": "fedavgm",
            "aggregation.server_momentum": 0.8,
        },
        sample_rate=1.0,
        clip_norm=0.3,
        on_features=True,
        needed=1.0,
        enough=10.0,
        evidence="banking77, clinc150, medical_abstracts, sms_spam on all-MiniLM-L6-v2, 10 clients",
    ),
    Recipe(
        name="several-labels",
        tasks=("multi-label",),
        values={
            "task.pooling": "mean",
            "lora.rank": 2,
            "lora.alpha": 0.2,
            "training.local_steps": 12,
            "training.learning_rate": 0.02,
            "federation.rounds": 4,
        },
        sample_rate=0.05,
        clip_norm=0.3,
        evidence="bc5cdr_kinds on minilm-l3-pruned, 5 clients",
    ),
    Recipe(
        name="tags",
        tasks=("token-classification",),
        values={
            "lora.rank": 1,
            "training.local_steps": 12,
            "training.learning_rate": 0.02,
            "federation.rounds": 8,
            "aggregation.method": "head",
        },
        sample_rate=0.1,
        clip_norm=0.3,
        needed=1.5,
        enough=11.0,
        evidence="bc5cdr on minilm-l3-pruned and on four layers of all-MiniLM-L6-v2, 5 clients",
    ),
    Recipe(
        name="small-decoder",
        tasks=("causal-lm", "instruction"),
        values=_SMALL_DECODER,
        sample_rate=0.1,
        clip_norm=1.0,
        needed=0.7,
        enough=12.0,
        evidence="shakespeare and medquad on stories260K, 20 and 9 clients",
    ),
    Recipe(
        name="preferences",
        tasks=("preference",),
        values=_SMALL_DECODER,
        sample_rate=0.1,
        clip_norm=1.0,
        needed=5.0,
        evidence="medquad_preference on stories260K, 9 clients",
    ),
    Recipe(
        name="decoder",
        tasks=("causal-lm", "instruction", "preference"),
        values={
            "lora.rank": 8,
            "lora.alpha": 16.0,
            "lora.target_modules": "v_proj",
            **_ONE_STEP,
            "training.learning_rate": 1.4,
            "federation.rounds": 8,
        },
        sample_rate=0.03,
        clip_norm=1.0,
        least_parameters=50_000_000,
        evidence="medquad on SmolLM2-135M-Instruct, 9 clients",
    ),
    Recipe(
        name="encoder-decoder",
        tasks=("seq2seq",),
        values={
            "lora.rank": 8,
            "lora.alpha": 16.0,
            "training.local_steps": 5,
            "training.learning_rate": 2e-2,
            "federation.rounds": 8,
        },
        sample_rate=0.1,
        clip_norm=1.0,
        evidence="e2e on a T5 of 0.9 million parameters, 8 clients",
    ),
)


def recipe_for(task: TaskName, parameters: int) -> Recipe:
    """Returns the recipe for a task and a size of the base, or else the nearest one.

    >>> recipe_for("instruction", 135_000_000).name, recipe_for("instruction", 260_000).name
    ('decoder', 'small-decoder')
    """
    fits = [recipe for recipe in RECIPES if task in recipe.tasks]
    large = [recipe for recipe in fits if parameters >= recipe.least_parameters]
    return max(large or fits, key=lambda each: each.least_parameters)


def as_table() -> str:
    """Returns the table of ``docs/recipes.md``."""
    head = "| recipe | tasks | base | settings | measured on |\n|---|---|---|---|---|\n"
    return head + "".join(map(_row, RECIPES))


def _row(recipe: Recipe) -> str:
    """One row of the table."""
    tasks = ", ".join(recipe.tasks)
    cells = (f"`{recipe.name}`", tasks, _size(recipe), _settings(recipe), recipe.evidence)
    return f"| {' | '.join(cells)} |\n"


def _size(recipe: Recipe) -> str:
    """Sizes of the bases that a recipe is for."""
    if recipe.least_parameters == 0:
        return "any"
    return f"{recipe.least_parameters // 1_000_000} million parameters or more"


def _settings(recipe: Recipe) -> str:
    """A recipe's settings on one line."""
    clip = f"{recipe.clip_norm:g}" + (" · √width" if recipe.on_features else "")
    derived = {"privacy.sample_rate": recipe.sample_rate, "privacy.clip_norm": clip}
    rate = {"training.learning_rate": "from the noise"} if recipe.on_features else {}
    values = {**recipe.values, **derived, **rate}
    return ", ".join(f"`{key} = {value}`" for key, value in values.items())
