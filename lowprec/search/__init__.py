"""Searches for hyper-parameters: the space, the study that several processes share, and the pruning of hopeless trials."""
