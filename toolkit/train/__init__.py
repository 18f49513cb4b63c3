"""What runs in a worker: the only package (with memory/trace.py) that imports torch."""
