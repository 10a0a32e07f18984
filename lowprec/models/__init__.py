"""Full-precision models and their checkpoints. Nothing here knows of quantization.

- ``registry``: ``create_model`` by name (our own, timm's, torchvision's) and ``list_models`` by wildcard
- ``cifar_resnet``: the small residual networks of He et al. for 28×28 and 32×32 images
- ``pretrained``: the input size and normalisation that a model's pretrained weights expect
- ``checkpoint``: strict loading of the usual checkpoint files, and atomic saving
"""

from lowprec.models.checkpoint import CheckpointError, checkpoint_metadata, load_checkpoint, save_checkpoint
from lowprec.models.pretrained import pretrained_data_config
from lowprec.models.registry import create_model, list_models

__all__ = [
    "CheckpointError",
    "checkpoint_metadata",
    "create_model",
    "list_models",
    "load_checkpoint",
    "pretrained_data_config",
    "save_checkpoint",
]
