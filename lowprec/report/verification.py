"""What a verification found: differing codes by tensor and implementation, and the gate."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from torch import Tensor

# Of the images, where some operators compute in float.
REQUIRED_AGREEMENT = 0.99
# Tensors that a printed report lists at most.
LISTED = 20


class VerificationError(AssertionError):
    """Some codes differ; the message names the first tensor where they do."""


@dataclass
class TensorComparison:
    """One tensor against the integer executor's: how many codes were compared, how many differ, by how much at most."""

    tensor: str
    against: str
    compared: int = 0
    mismatched: int = 0
    largest_difference: int = 0

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Counts the codes of one batch: all of them as different where the shapes are, which ``!=`` would broadcast."""
        self.compared += expected.numel()
        if found.shape != expected.shape:
            self.mismatched += expected.numel()
            return
        difference = (found.double() - expected.double()).abs()
        self.mismatched += int((difference != 0).sum())
        # Sums may be 32 bits wide, and a value off the grid differs by less than one.
        self.largest_difference = max(self.largest_difference, ceil(float(difference.max())) if len(difference) else 0)


@dataclass
class VerificationReport:
    """What :func:`verify` found. Counts are over all tensors, images and implementations."""

    images: int = 0
    comparisons: list[TensorComparison] = field(default_factory=list)
    fake_quant_dtype: str = "float32"
    # Tensors behind operators that compute in float, and in how many images each implementation found the same class.
    inexact: set[str] = field(default_factory=set)
    agreed: dict[str, int] = field(default_factory=dict)
    # The exported file, if it is not as it was exported: equal codes on some images are then no proof.
    changed_file: str = ""

    @property
    def equal(self) -> bool:
        """Whether all codes are equal, no operator computes in float, and the file is as it was exported."""
        return bool(self.compared_codes) and not (self.mismatched_codes or self.inexact or self.changed_file)

    @property
    def agreement(self) -> float:
        """The least share of images in which an implementation finds the integer executor's class; 0 of none."""
        return min(self.agreed.values(), default=0) / self.images if self.images else 0.0

    @property
    def compared_codes(self) -> int:
        """Codes compared with the integer executor's."""
        return sum(comparison.compared for comparison in self.comparisons)

    @property
    def mismatched_codes(self) -> int:
        """Codes that differ from the integer executor's."""
        return sum(comparison.mismatched for comparison in self.comparisons)

    def raise_if_different(self) -> None:
        """Raises VerificationError if any code differs that must not, if nothing was compared, or if the file was changed.

        Behind float operators codes may differ, but the class must be the same for REQUIRED_AGREEMENT of the images.
        """
        if not self.compared_codes:
            raise VerificationError("nothing was compared: give verify at least one batch of images")
        first = next((comparison for comparison in self._exact if comparison.mismatched), None)
        if first is not None:
            raise VerificationError(
                f"{self.mismatched_codes} of {self.compared_codes} codes differ; the first in {first.tensor} "
                f"({first.against} against the integer executor: {first.mismatched} of {first.compared}, by up to "
                f"{first.largest_difference}){f'. {self._changed_note}' if self.changed_file else ''}"
            )
        if self.changed_file:
            raise VerificationError(f"no code differs on these images, but {self._changed_note}")
        if self.inexact and self.agreement < REQUIRED_AGREEMENT:
            worst = min(self.agreed, key=lambda name: self.agreed[name])
            raise VerificationError(
                f"{worst} finds the integer executor's class in {self.agreement:.2%} of {self.images} images; at least "
                f"{REQUIRED_AGREEMENT:.0%} are required of a model that computes partly in float"
            )

    def __str__(self) -> str:
        """What was compared, in a few lines; of single tensors those that differ and must not."""
        differing = [item for item in self._exact if item.mismatched]
        rows = _table(differing[:LISTED]) if differing else []
        if len(differing) > LISTED:
            rows.append(f"... and {len(differing) - LISTED} more; details() lists all")
        return "\n".join([*rows, *self._summary()])

    def details(self) -> str:
        """A line for each tensor and implementation, then the summary."""
        return "\n".join([*_table(self.comparisons), *self._summary()])

    @property
    def _exact(self) -> list[TensorComparison]:
        return [comparison for comparison in self.comparisons if comparison.tensor not in self.inexact]

    def _summary(self) -> list[str]:
        lines = []
        for against in dict.fromkeys(comparison.against for comparison in self.comparisons):
            mine = [comparison for comparison in self.comparisons if comparison.against == against]
            differ = sum(comparison.mismatched for comparison in mine)
            compared = sum(comparison.compared for comparison in mine)
            lines.append(f"{against}: {_count(len(mine), 'tensor')}, {_count(compared, 'code')}, {_differ(differ)}")
        lines.append(
            f"{_count(self.images, 'image')}, {_count(self.compared_codes, 'code')} compared, {_differ(self.mismatched_codes)}"
        )
        if self.changed_file:
            lines.append(self._changed_note)
        behind = [comparison for comparison in self.comparisons if comparison.tensor in self.inexact]
        if behind:
            compared, differ = (sum(getattr(item, key) for item in behind) for key in ("compared", "mismatched"))
            share = differ / compared if compared else 0.0
            lines.append(
                f"not equal: {differ:,} of {_count(compared, 'code')} ({share:.2%}) differ in "
                f"{_count(len(self.inexact), 'tensor')} behind softmax or layer norm, which stay in float and which every "
                f"implementation rounds in its own way; the same class in {self.agreement:.2%} of the images"
            )
        return lines

    @property
    def _changed_note(self) -> str:
        return f"{self.changed_file} was changed or damaged after it was exported (its checksum does not match): export it again"


def _table(comparisons: list[TensorComparison]) -> list[str]:
    width = max([len(comparison.tensor) for comparison in comparisons], default=6)
    head = f"{'tensor':{width}}  {'against':12}  {'codes':>13}  {'differing':>10}  {'by up to':>8}"
    return [head] + [
        f"{comparison.tensor:{width}}  {comparison.against:12}  {comparison.compared:>13,}  {comparison.mismatched:>10,}"
        f"  {comparison.largest_difference:>8,}"
        for comparison in comparisons
    ]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _differ(number: int) -> str:
    return f"{number:,} differ{'s' if number == 1 else ''}"
