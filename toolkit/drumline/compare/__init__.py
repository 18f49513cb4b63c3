"""Reads logged runs, compares them step by step, and renders them as an HTML page."""
