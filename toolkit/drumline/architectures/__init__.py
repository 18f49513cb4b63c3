"""Model shapes from transformers configs, and the table of GPUs; no torch."""
