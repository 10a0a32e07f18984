"""What is quantized and how: typed, checked before any work starts, and written down layer by layer when applied.

A :class:`Recipe` holds one weight scheme, one activation scheme and ordered rules. The shipped recipes are the YAML
files in ``lowprec/recipes/quant``; this module imports no torch, so a mistyped recipe is found at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Optional

import yaml

WEIGHT_BITS = (2, 4, 8)
PLANES = (1, 2)
ACTIVATION_BITS = (8,)
LAYOUTS = ("kernel", "element")
SOLVERS = ("exact", "rms", "paper", "twn")
CALIBRATORS = ("mse", "max", "percentile")
RESIDUALS = ("requantized", "accumulator")
ROLES = ("first_convolution", "depthwise", "classifier")

RECIPE_FOLDER = Path(__file__).parent / "recipes" / "quant"


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key and the valid choices."""


# Optional[...] rather than "| None": OmegaConf reads these annotations as its schema.
@dataclass
class WeightScheme:
    """How the weights of a layer are quantized.

    bits: 2 (ternary), 4 or 8 (one exponent per output channel, no clusters). cluster_size: input channels that share a
    scale. layout: ``kernel`` (whole kernels share it, arXiv 1701.08978) or ``element`` (the weights at one kernel
    position do, arXiv 1705.01462). solver: of ternary scales. planes: 2 adds a residual ternary plane with scales of its own
    in the same clusters (arXiv 1707.04679): a weight is s1·t1 + s2·t2; only with bits=2.
    """

    bits: int = 2
    cluster_size: int = 4
    layout: str = "kernel"
    solver: str = "exact"
    planes: int = 1


@dataclass
class ActivationScheme:
    """How activations are quantized: their bits, what chooses the exponent, the share (%) that ``percentile`` keeps.

    residual: ``requantized`` adds two 8-bit tensors; ``accumulator`` adds the shortcut to the convolution's 32-bit sums, which
    are rounded once.
    """

    bits: int = 8
    calibrator: str = "mse"
    percentile: float = 99.99
    residual: str = "requantized"


@dataclass
class Rule:
    """Changes the weight scheme of the layers whose name matches ``pattern``; what is left out stays as it is.

    pattern: a layer's name with the wildcards ``* ? [...]``, or a role: ``@first_convolution``, ``@depthwise``,
    ``@classifier``. Bits other than 2 mean one plane, which a rule that gives them need not say.
    """

    pattern: str = "*"
    bits: Optional[int] = None  # noqa: UP045
    cluster_size: Optional[int] = None  # noqa: UP045
    layout: Optional[str] = None  # noqa: UP045
    solver: Optional[str] = None  # noqa: UP045
    planes: Optional[int] = None  # noqa: UP045

    def given(self) -> dict[str, Any]:
        """The fields of the weight scheme that this rule names."""
        return {key: value for key, value in asdict(self).items() if key != "pattern" and value is not None}

    def changes(self) -> dict[str, Any]:
        """The fields of the weight scheme that this rule sets: those it names, and one plane where it names 4 or 8 bits."""
        return self.given() if self.bits in (None, 2) else {"planes": 1, **self.given()}


# Holds for every recipe; a rule of the recipe itself comes later and so has the last word.
FIRST_CONVOLUTION_RULE = Rule(pattern="@first_convolution", bits=8)


@dataclass(frozen=True)
class LayerTraits:
    """What a recipe may know of a layer: its name and the roles (of :data:`ROLES`) that it plays."""

    name: str
    roles: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LayerAssignment:
    """The scheme that a layer got and the patterns of the rules that made it so, in order."""

    name: str
    scheme: WeightScheme
    rules: tuple[str, ...]


@dataclass
class Recipe:
    """What is quantized and how. See :class:`WeightScheme`, :class:`ActivationScheme` and :class:`Rule`."""

    name: str = "custom"
    weights: WeightScheme = field(default_factory=WeightScheme)
    activations: ActivationScheme = field(default_factory=ActivationScheme)
    rules: list[Rule] = field(default_factory=list)

    @staticmethod
    def names() -> list[str]:
        """Names of the shipped recipes."""
        return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))

    @staticmethod
    def load(name_or_path: str | Path) -> Recipe:
        """The recipe of that name, or in that YAML file.

        Raises:
            RecipeError: there is no such recipe, or it holds a key or a value that no recipe can have.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = RECIPE_FOLDER / f"{name_or_path}.yaml"
        if not path.is_file():
            raise RecipeError(
                f"no recipe {str(name_or_path)!r}: give the path of a YAML file or one of {', '.join(Recipe.names())}"
            )
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is no YAML: {error}") from error
        if not isinstance(content, dict):
            raise RecipeError(f"{path}: a recipe is a mapping with the keys {_keys(Recipe)}")
        return Recipe.from_dict(content)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Recipe:
        """The recipe that a mapping (of YAML, or of a composed config) describes.

        Raises:
            RecipeError: an unknown key or an impossible value, named.
        """
        rules = content.get("rules") or []
        if not isinstance(rules, list):
            raise RecipeError(f"quant.rules={rules!r}: expected a list of mappings with the keys {_keys(Rule)}")
        recipe = Recipe(
            **{
                **_checked(Recipe, content, "quant"),
                "weights": WeightScheme(**_checked(WeightScheme, content.get("weights") or {}, "quant.weights")),
                "activations": ActivationScheme(
                    **_checked(ActivationScheme, content.get("activations") or {}, "quant.activations")
                ),
                "rules": [_rule(rule, f"quant.rules[{index}]") for index, rule in enumerate(rules)],
            }
        )
        recipe.validate()
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain mappings and lists; :meth:`from_dict` is its inverse."""
        content = asdict(self)
        # Left out where they say nothing, as in checkpoints and files that are older than planes.
        if self.weights.planes == 1:
            del content["weights"]["planes"]
        for rule in content["rules"]:
            if rule["planes"] is None:
                del rule["planes"]
        return content

    def to_yaml(self) -> str:
        """The recipe as the text of a file for :meth:`load`; rules with what they name alone."""
        rules = [{"pattern": rule.pattern, **rule.given()} for rule in self.rules]
        return yaml.safe_dump({**self.to_dict(), "rules": rules}, sort_keys=False)

    def validate(self) -> None:
        """Raises RecipeError for a value that no recipe can have; the message names its key and the valid choices."""
        check_weight_scheme(self.weights, "quant.weights")
        for index, rule in enumerate(self.rules):
            key = f"quant.rules[{index}]"
            if (
                not isinstance(rule.pattern, str)
                or not rule.pattern
                or (rule.pattern.startswith("@") and rule.pattern[1:] not in ROLES)
            ):
                roles = ", ".join("@" + role for role in ROLES)
                raise RecipeError(
                    f"{key}.pattern={rule.pattern!r}: give a layer name with wildcards, or one of {roles}"
                )
            if not rule.changes():
                raise RecipeError(
                    f"{key} ({rule.pattern}) changes nothing: give bits, cluster_size, layout, solver or planes"
                )
            _check_scheme(rule.changes(), key)
        _check_choice("quant.activations.bits", self.activations.bits, ACTIVATION_BITS)
        _check_choice("quant.activations.calibrator", self.activations.calibrator, CALIBRATORS)
        _check_choice("quant.activations.residual", self.activations.residual, RESIDUALS)
        percentile = self.activations.percentile
        if not isinstance(percentile, int | float) or not 50.0 < percentile <= 100.0:
            raise RecipeError(f"quant.activations.percentile={percentile!r}: give a number above 50, at most 100")

    def assign(self, layers: Iterable[LayerTraits]) -> list[LayerAssignment]:
        """Applies the rules, in order, to all layers.

        Raises:
            RecipeError: a rule whose pattern matches no layer, or a second plane for a layer that is not ternary.
        """
        layers = list(layers)
        schemes = {layer.name: self.weights for layer in layers}
        applied: dict[str, list[str]] = {layer.name: [] for layer in layers}
        for rule in [FIRST_CONVOLUTION_RULE, *self.rules]:
            matching = [layer.name for layer in layers if _matches(rule.pattern, layer)]
            if not matching and rule is not FIRST_CONVOLUTION_RULE:
                names = [layer.name for layer in layers]
                near = difflib.get_close_matches(rule.pattern, names, n=3, cutoff=0.3) or names[:3]
                raise RecipeError(
                    f"recipe {self.name}: the rule {rule.pattern!r} matches none of the {len(names)} layers; "
                    f"nearest names: {', '.join(near)}"
                )
            for name in matching:
                schemes[name] = replace(schemes[name], **rule.changes())
                applied[name].append(rule.pattern)
        for name, scheme in schemes.items():
            if scheme.planes == 2 and scheme.bits != 2:
                raise RecipeError(
                    f"recipe {self.name}: layer {name} got planes=2 and bits={scheme.bits} from the rules "
                    f"{', '.join(applied[name])}: a second plane is for bits=2; let the rule that gives planes give bits too, or "
                    "match fewer layers"
                )
        return [LayerAssignment(layer.name, schemes[layer.name], tuple(applied[layer.name])) for layer in layers]


def _rule(content: Any, key: str) -> Rule:
    checked = _checked(Rule, content, key)
    if "pattern" not in checked:
        roles = ", ".join("@" + role for role in ROLES)
        raise RecipeError(
            f"{key} has no pattern: give a layer name with wildcards (* for all layers), or one of {roles}"
        )
    return Rule(**checked)


def check_weight_scheme(scheme: WeightScheme, key: str) -> None:
    """Raises RecipeError for an impossible value; ``key`` is where the scheme stands, for the message."""
    _check_scheme(asdict(scheme), key)


def _matches(pattern: str, layer: LayerTraits) -> bool:
    if pattern.startswith("@"):
        return pattern[1:] in layer.roles
    return fnmatchcase(layer.name, pattern)


def _keys(kind: type) -> str:
    return ", ".join(item.name for item in fields(kind))


def _checked(kind: type, content: Any, key: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise RecipeError(f"{key}={content!r}: expected a mapping with the keys {_keys(kind)}")
    valid = [item.name for item in fields(kind)]
    for name in content:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RecipeError(f"unknown key {key}.{name}: the keys are {_keys(kind)}{hint}")
    return dict(content)


def _check_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices or type(value) is not type(choices[0]):
        raise RecipeError(f"{key}={value!r}: choose one of {', '.join(map(str, choices))}")


def _check_scheme(scheme: dict[str, Any], key: str) -> None:
    for name, choices in (("bits", WEIGHT_BITS), ("layout", LAYOUTS), ("solver", SOLVERS), ("planes", PLANES)):
        if name in scheme:
            _check_choice(f"{key}.{name}", scheme[name], choices)
    size = scheme.get("cluster_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise RecipeError(f"{key}.cluster_size={size!r}: give a whole number of input channels, at least 1")
    if scheme.get("planes") == 2 and scheme.get("bits", 2) != 2:
        raise RecipeError(
            f"{key}.planes=2: only ternary weights (bits=2) have a second plane, not bits={scheme['bits']}"
        )
