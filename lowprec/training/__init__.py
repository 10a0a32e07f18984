"""Training with Lightning: the full-precision baseline and the fine-tuning of a fake-quant model.

- ``module``: the LightningModule, its loss (``distillation``) and its optimizer (``optimizer``)
- ``fit``: a trainer that resumes where it was and ends with the best checkpoint
- ``checkpoints`` and ``resume``: best and last, a Ctrl-C that leaves one, going on in the middle of an epoch
- ``codes`` and ``progress``: what is logged of a layer's codes, what is shown
- ``loggers``: metrics.csv and Weights & Biases
- ``precision``: bf16 where the processor is fast at it
- ``evaluation``: top-1 of any model, in float32
"""
