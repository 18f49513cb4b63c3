"""The fact: batch, steps, order, schedule and memory, resolved. Pure; never imports torch."""
