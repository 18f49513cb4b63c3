"""Logged runs read back, compared step by step, and shown on one page."""
