"""Who owns backward and the optimizer step inside the process."""
