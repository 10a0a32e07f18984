"""The configuration of a run: its typed schema, and the checks of its values. Imports no torch."""

from lowprec.config.schema import (
    INCIDENTAL_KEYS,
    ConfigError,
    DistillationConfig,
    ExportConfig,
    LoggerConfig,
    OptimConfig,
    RunConfig,
    TrainerConfig,
    schema_keys,
)

__all__ = [
    "INCIDENTAL_KEYS",
    "ConfigError",
    "DistillationConfig",
    "ExportConfig",
    "LoggerConfig",
    "OptimConfig",
    "RunConfig",
    "TrainerConfig",
    "schema_keys",
]
