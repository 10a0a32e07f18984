"""Random weights of lowprec's own networks."""

from torch import nn

__all__ = ["initialize"]


def initialize(model: nn.Module, classifier: nn.Linear) -> None:
    """He et al.'s normal distribution (arXiv 1502.01852) in all convolutions and the classifier, whose biases become zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.kaiming_normal_(classifier.weight, nonlinearity="linear")
    nn.init.zeros_(classifier.bias)
