"""drumline: every rank in step. One recipe, one batch equation, the same training however it is split."""

__version__ = "0.1.0"
