"""The data of a run, transformed as its model expects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowprec.config import ConfigError, RunConfig
from lowprec.config.schema import PHOTOGRAPHS
from lowprec.data import DataModule, create_data
from lowprec.models import create_model, pretrained_data_config


def run_data(config: RunConfig) -> DataModule:
    """The data module of ``config.data``; order, splits and augmentation follow ``config.seed``.

    Raises:
        ConfigError: the data set has another number of classes or channels than ``config.data`` says.
        DataError: files are missing or wrong.
    """
    settings = config.data
    specific: dict[str, Any] = {"padding": settings.padding}
    if settings.name in PHOTOGRAPHS:
        specific = {
            "data_config": published_data_config(config),
            "input_size": None,
            "auto_augment": settings.auto_augment,
            "random_erasing": settings.random_erasing,
            "max_corrupted": settings.max_corrupted,
        }
        if settings.image_size is not None:
            specific["input_size"] = (settings.in_channels, settings.image_size, settings.image_size)
    try:
        data = create_data(
            settings.name,
            root=settings.root,
            batch_size=settings.batch_size,
            eval_batch_size=settings.eval_batch_size,
            num_workers=settings.num_workers,
            seed=config.seed,
            validation_share=settings.validation_share,
            augment=settings.augment,
            limit_train=settings.limit_train,
            limit_test=settings.limit_test,
            **specific,
        )
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    for key, found in (("num_classes", data.num_classes), ("in_channels", data.in_channels)):
        if getattr(settings, key) not in (None, found):
            where = f" in {settings.root}" if settings.root is not None else ""
            raise ConfigError(f"data.{key}={getattr(settings, key)}: the data set {settings.name}{where} has {found}")
    return data


def published_data_config(config: RunConfig) -> dict[str, Any]:
    """Size and normalisation of the images that the model's published weights expect; builds it without any memory."""
    try:
        with torch.device("meta"):
            model = create_model(config.model.name, in_channels=config.data.in_channels, **config.model.arguments)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    return pretrained_data_config(model)


def evaluation_images(data: DataModule, limit: int | None = None) -> Iterator[Tensor]:
    """The images of the test split (the first ``limit`` of them), batch by batch: no data set needs to fit into memory.

    Where several processes share the loader, each gets its share of these.
    """
    loader = data.test_dataloader()
    share = list(loader.sampler)
    left = len(share) if limit is None else sum(index < limit for index in share)
    for images, _ in loader:
        if left <= 0:
            return
        yield images[:left]
        left -= len(images)
