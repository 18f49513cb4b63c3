"""The code that runs in a rank; only this package and `trace` import torch."""
