"""What runs in a rank: with `trace`, the only package that imports torch."""
