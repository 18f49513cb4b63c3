"""Resolves a recipe into a Plan: batch, steps, sample order, schedule, memory. Pure; no torch."""

import sys

import drumline

sys.modules[__name__].__class__ = drumline.PlanPackage
