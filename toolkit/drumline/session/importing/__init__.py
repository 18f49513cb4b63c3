"""Recipes from the files of other tools: which tool a file is of, and what its keys mean here.

`draft.py` collects; one module a tool says what its keys mean; `reading.py` reads files and scripts, of which
nothing is executed; `writing.py` writes the recipe with its comments.
"""
