"""The analysis of each layer alone in a run, and the recipe that is assigned from it for the run's budget."""

from __future__ import annotations

import json

from torch import nn

from lowprec.assign import assign, expected_signal_to_noise
from lowprec.recipe import Recipe
from lowprec.report.summary import plural
from lowprec.run.current import Run
from lowprec.run.directory import write_text
from lowprec.sensitivity import Sensitivity, sensitivity
from lowprec.training.precision import float32_evaluation


def analyse(current: Run, full_precision: nn.Module, labelled: bool) -> Sensitivity:
    """Quantizes each layer alone, and writes sensitivity.json and sensitivity.csv; top-1 is measured if ``labelled``."""
    config, data, file = current.config, current.data, current.directory.sensitivity_file
    count = min(config.sensitivity.images, config.calibration.images, data.sizes["train"])
    with current.stage("sensitivity", f"sensitivity: each layer quantized alone, on {plural(count, 'image')}"):
        batches = data.calibration_batches(count)
        few = config.sensitivity.labelled_images if labelled else 0
        pairs = data.validation_batches(few) if few else None
        with float32_evaluation(current.device), current.progress.messages("lowprec.sensitivity", "sensitivity"):
            found = sensitivity(full_precision.cpu(), config.recipe, batches, pairs, device=current.device)
    write_text(file, json.dumps(found.to_dict(), indent=2) + "\n")
    write_text(file.with_suffix(".csv"), found.to_csv())
    return found


def assign_for_budget(current: Run, full_precision: nn.Module) -> None:
    """Writes the recipe that meets the run's budget, if it has one, to recipe.yaml; one that is there already stays.

    Raises:
        RecipeError: no assignment meets the budget.
    """
    directory, budget = current.directory, current.config.budget
    if not budget.given:
        return
    if not directory.recipe_file.is_file():
        found = analyse(current, full_precision, labelled=False)
        recipe = assign(found, budget.weight_bits, budget.multiplications_replaced)
        decibels = expected_signal_to_noise(found, recipe)
        comment = (
            f"# {current.config.recipe.name}, assigned for budget.{budget.name}={budget.value:g}: the least error of the logits "
            f"on {plural(found.images, 'image')}, expected {decibels:.1f} dB of weights alone.\n"
        )
        write_text(directory.recipe_file, comment + recipe.to_yaml())
    show_assignment(current, directory.recipe)


def show_assignment(current: Run, recipe: Recipe) -> None:
    """Says what a recipe that was assigned for the run's budget changes."""
    budget, configured = current.config.budget, current.config.recipe
    rules = recipe.rules[len(configured.rules) :]
    others = plural(len(rules), "layer")
    current.console.print(f"budget.{budget.name}={budget.value:g}: {others} other than in {configured.name}")
    for rule in rules:
        current.console.print(f"  {rule.pattern}: {', '.join(f'{key}={value}' for key, value in rule.given().items())}")
