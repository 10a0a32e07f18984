"""lowprec: low-precision fine-tuning for PyTorch, from a full-precision model to an integer one that is equal to it."""
