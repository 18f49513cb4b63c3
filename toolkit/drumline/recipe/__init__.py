"""The recipe: what the user asks for, read and validated. Never imports torch."""
