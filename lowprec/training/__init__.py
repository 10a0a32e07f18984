"""Training with Lightning: the full-precision baseline and the fine-tuning of a fake-quant model.

- ``module``: the LightningModule, its loss (``distillation``) and its optimizer (``optimizer``)
- ``fit``: a trainer that resumes where it was and ends with the best checkpoint
- ``processes``, ``batch_norm``, ``equality``: several processes: who they are, statistics over all, the same model in all
- ``checkpoints`` and ``resume``: best and last, a signal that leaves one, going on in the middle of an epoch
- ``differences``: what makes a checkpoint, or a run's folder, another training's
- ``watch``: ``throughput``, ``non_finite``, ``progress``: what a training says while it runs, and what stops it
- ``codes`` and ``profile``: what is logged of a layer's codes; where the time of a step goes
- ``loggers``: metrics.csv and Weights & Biases
- ``precision``: bf16 where the processor is fast at it
- ``evaluation``: top-1 of any model, in float32
"""
