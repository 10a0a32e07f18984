"""The shipped recipes: one YAML file each in ``quant/``, the config group of the same name."""
