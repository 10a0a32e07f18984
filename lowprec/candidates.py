"""The weight schemes that each layer could have, and what each costs, from shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx

from lowprec.cost import LayerCost, cost
from lowprec.layers import QuantizedLayer, quantized_layers
from lowprec.layers.weights import WeightQuantizer
from lowprec.recipe import (
    FIRST_CONVOLUTION_RULE,
    LayerAssignment,
    Recipe,
    RecipeError,
    WeightScheme,
    check_weight_scheme,
)

# What a rule may change of a layer's scheme, the cheapest first: ternary, with a residual plane (1707.04679), 4 and 8 bits.
CANDIDATES: tuple[dict[str, Any], ...] = (
    {"bits": 2, "planes": 1},
    {"bits": 2, "planes": 2},
    {"bits": 4, "planes": 1},
    {"bits": 8, "planes": 1},
)


@dataclass(frozen=True)
class LayerOption:
    """A layer with one scheme. label: of the candidate. changes: what a rule has to set for it; empty for the recipe's own."""

    layer: str
    label: str
    changes: dict[str, Any]
    scheme: WeightScheme
    cost: LayerCost


@dataclass(frozen=True)
class Choices:
    """What can be chosen in a model: the options of each layer, by name, in the network's order.

    recipe: without any choice. fixed: layers whose scheme a rule of the recipe decides, or the rule of the first convolution.
    others: costs that no recipe changes, such as products of activations.
    """

    recipe: Recipe
    options: dict[str, list[LayerOption]]
    fixed: frozenset[str]
    others: list[LayerCost]

    def open_to(self, layer: str) -> list[LayerOption]:
        """The options that an assignment may take: the recipe's own alone where a rule fixes it."""
        return [option for option in self.options[layer] if layer not in self.fixed or not option.changes]


def scheme_choices(qmodel: fx.GraphModule, candidates: Sequence[dict[str, Any]] = CANDIDATES) -> Choices:
    """The options of all layers of a prepared model (on the meta device too), whose state does not change.

    candidates: fields of :class:`WeightScheme` and their values; what is left out stays as the recipe has it for the layer,
    whose own scheme is always among the options. A rule that sets a field which candidates change fixes its layers.

    Raises:
        RecipeError: an unknown field or an impossible value; none at all.
    """
    recipe: Recipe = qmodel.meta["recipe"]
    assignments: list[LayerAssignment] = qmodel.meta["assignments"]
    if not candidates:
        raise RecipeError("candidates=[]: give at least one scheme, such as {'bits': 4}")
    own = {assignment.name: assignment.scheme for assignment in assignments}
    schemes = [
        {name: _changed(scheme, changes, f"candidates[{index}]") for name, scheme in own.items()}
        for index, changes in enumerate(candidates)
    ]
    twin = copy.deepcopy(qmodel).to("meta")
    example = torch.empty(2, *qmodel.meta["image_shape"], device="meta")
    costs = [_costs(twin, example, chosen) for chosen in [*schemes, own]]
    labels = [*map(_label, candidates), "recipe"]
    options: dict[str, list[LayerOption]] = {name: [] for name in own}
    for label, chosen, found in zip(labels, [*schemes, own], costs, strict=True):
        for name, scheme in chosen.items():
            if all(scheme != option.scheme for option in options[name]):
                changes = _differences(scheme, own[name])
                options[name].append(LayerOption(name, label, changes, scheme, found[name]))
    decided = {key for changes in candidates for key in changes}
    deciding = {rule.pattern for rule in [FIRST_CONVOLUTION_RULE, *recipe.rules] if decided & rule.changes().keys()}
    fixed = frozenset(assignment.name for assignment in assignments if deciding.intersection(assignment.rules))
    return Choices(recipe, options, fixed, [item for name, item in costs[-1].items() if name not in own])


def take_scheme(layer: QuantizedLayer, scheme: WeightScheme) -> None:
    """Gives a layer another scheme, solved for its weights."""
    layer.scheme = scheme
    layer.weight_quantizer = WeightQuantizer(tuple(layer.weight.shape), scheme).to(layer.weight.device)
    layer.weight_quantizer.solve(layer.weight, layer.name)


def _costs(twin: fx.GraphModule, example: torch.Tensor, schemes: dict[str, WeightScheme]) -> dict[str, LayerCost]:
    for name, layer in quantized_layers(twin):
        take_scheme(layer, schemes[name])
    return {layer.name: layer for layer in cost(twin, example).layers}


def _changed(scheme: WeightScheme, changes: dict[str, Any], key: str) -> WeightScheme:
    known = [item.name for item in fields(WeightScheme)]
    for name in changes:
        if name not in known:
            raise RecipeError(f"unknown key {key}.{name}: the keys are {', '.join(known)}")
    changed = replace(scheme, **changes)
    check_weight_scheme(changed, key)
    return changed


def _differences(scheme: WeightScheme, own: WeightScheme) -> dict[str, Any]:
    names = [item.name for item in fields(WeightScheme)]
    return {name: getattr(scheme, name) for name in names if getattr(scheme, name) != getattr(own, name)}


def _label(changes: dict[str, Any]) -> str:
    """``2-bit``, and whatever else is not WeightScheme's default."""
    bits = [f"{changes['bits']}-bit"] if "bits" in changes else []
    default = WeightScheme()
    rest = [f"{key}={value}" for key, value in changes.items() if key != "bits" and value != getattr(default, key)]
    return " ".join([*bits, *rest]) or "recipe"
