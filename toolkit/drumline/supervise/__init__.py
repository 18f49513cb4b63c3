"""Runs the attempts of one run: starts the launcher, watches the ranks, decides what comes next."""
