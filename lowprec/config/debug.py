"""The named debug modes, ``trainer.debug``: each is a run of the same stages on less."""

from __future__ import annotations

from lowprec.config.schema import OptimConfig, RunConfig

# Optimizer steps on one batch after which a network of a healthy size knows it by heart.
OVERFIT_EPOCHS = 60
# Enough for the profiler's steps, after those in which caches are filled.
PROFILED_BATCHES = 12


def apply_debug(config: RunConfig) -> None:
    """Changes ``config`` to what its debug mode, if it has one, means.

    one_batch: one batch to train on, one to test on, one epoch. overfit: the same batch again and again, unaugmented, on its
    labels alone, so that the loss has to go to 0. profile: an epoch of some batches.
    """
    mode, trainer, data = config.trainer.debug, config.trainer, config.data
    if mode is None:
        return
    batch = data.batch_size * trainer.devices * trainer.nodes * trainer.accumulate_grad_batches
    data.limit_train = batch * (PROFILED_BATCHES if mode == "profile" else 1)
    data.limit_test = data.batch_size
    epochs = OVERFIT_EPOCHS if mode == "overfit" else 1
    trainer.max_epochs = min(trainer.max_epochs, 1) * epochs
    config.baseline.max_epochs = epochs
    config.calibration.images = min(config.calibration.images, batch)
    if mode == "overfit":
        data.augment = False
        trainer.distillation.weight = 0.0
        trainer.label_smoothing = 0.0
    for optim, length in ((config.optim, trainer.max_epochs), (config.baseline.optim, epochs)):
        _shorten_warmup(optim, length)


def _shorten_warmup(optim: OptimConfig, epochs: int) -> None:
    if optim.warmup_epochs >= epochs:
        optim.warmup_epochs = 0.0
