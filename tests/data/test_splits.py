"""Splits are disjoint, complete, stratified, and fixed by the seed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowprec.data.sources import DataError
from lowprec.data.splits import Splits, split, stratified_order

LABELS = torch.randint(0, 10, (1000,), generator=torch.Generator().manual_seed(1))
TEST_LABELS = torch.arange(200) % 10


def divide(train: Tensor = LABELS, validation: Tensor | None = None, **arguments: Any) -> Splits:
    defaults: dict[str, Any] = {"validation_share": 0.1, "limit_train": None, "limit_test": None, "seed": 0}
    return split(train, validation, TEST_LABELS, **{**defaults, **arguments})


def members(indices: Tensor) -> set[int]:
    return set(indices.tolist())


def test_train_and_validation_are_disjoint_and_complete() -> None:
    splits = divide()
    assert members(splits.train) | members(splits.validation) == set(range(1000))
    assert len(splits.train) == 900
    assert len(splits.validation) == 100
    assert torch.equal(splits.test, torch.arange(200))


def test_fixed_by_the_seed() -> None:
    assert torch.equal(divide(seed=3).validation, divide(seed=3).validation)
    assert not torch.equal(divide(seed=3).validation, divide(seed=4).validation)


@pytest.mark.parametrize("part", [10, 100, 500, 990])
def test_every_first_part_is_stratified(part: int) -> None:
    order = stratified_order(LABELS, 0)
    assert torch.equal(order.sort().values, torch.arange(1000))
    expected = torch.bincount(LABELS) * part / 1000
    assert (torch.bincount(LABELS[order[:part]], minlength=10) - expected).abs().max() <= 1


def test_limits_take_subsets_and_never_mix_the_splits() -> None:
    full, limited = divide(), divide(limit_train=90, limit_test=50)
    assert len(limited.train) == 90
    assert len(limited.validation) == 10
    assert len(limited.test) == 50
    assert members(limited.train) <= members(full.train)
    assert members(limited.validation) <= members(full.validation)
    assert torch.equal(limited.test, limited.test.sort().values)
    assert torch.bincount(TEST_LABELS[limited.test]).tolist() == [5] * 10


def test_limits_beyond_the_set_change_nothing() -> None:
    assert divide(limit_train=10_000, limit_test=10_000).train.equal(divide().train)


def test_own_validation_images_leave_the_training_images_whole() -> None:
    splits = divide(validation=torch.arange(40) % 10)
    assert len(splits.train) == 1000
    assert torch.equal(splits.validation, torch.arange(40))


def test_small_share_still_validates_on_an_image() -> None:
    assert len(divide(validation_share=1e-6).validation) == 1


def test_too_few_images() -> None:
    with pytest.raises(DataError, match="too few"):
        divide(train=torch.zeros(1, dtype=torch.int64))
