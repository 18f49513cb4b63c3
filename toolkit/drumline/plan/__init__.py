"""Resolves a recipe into a Plan: batch, steps, sample order, schedule, memory. Pure; no torch."""
