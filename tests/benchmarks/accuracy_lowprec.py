"""lowprec's candidates of accuracy.py, and the control: the full-precision model, fine-tuned as they are."""

from __future__ import annotations

import copy
from functools import partial

import torch
from accuracy_peer import END_BITS, Candidate, Quantized, Start
from torch import nn

import lowprec
from lowprec.integer.fast import FastModel
from lowprec.recipe import Recipe, Rule

RECIPES = ("w2a8_n4", "w2a8_n64", "w4a8_n4", "w8a8")


def control(start: Start) -> Quantized:
    """The full-precision model, which is trained with no quantizer in it."""
    return Quantized(copy.deepcopy(start.model), 32)


def prepared(recipe_name: str, start: Start) -> Quantized:
    """The fake-quant model of a shipped recipe (first convolution in 8 bits) with the classifier in 8 bits."""
    recipe = Recipe.load(recipe_name)
    recipe.rules.append(Rule(pattern="@classifier", bits=END_BITS))
    images = start.calibration[0]
    # Random, so that checks of the traced graph see every path, as in a run.
    example = torch.randn(2, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    qmodel = lowprec.prepare(start.model, recipe, example)
    lowprec.reconstruct(qmodel, start.calibration)
    return Quantized(qmodel, lowprec.cost(qmodel, example).weight_bits)


def integer(qmodel: nn.Module) -> FastModel:
    """The integer model: what lowprec ships."""
    return FastModel(lowprec.convert(qmodel))


CONTROL = Candidate("full precision, fine-tuned", control)
CANDIDATES = [Candidate(f"lowprec {name}", partial(prepared, name), integer) for name in RECIPES]
