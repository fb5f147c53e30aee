"""int8run: INT8 (W8A8) diffusion models, declared in YAML, measured against the float model."""

__version__ = "0.1.0"
