"""What several commands share: read this machine, plan, prepare data, train here, submit."""
