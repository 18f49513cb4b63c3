"""Services that several commands share: read this machine, plan, prepare data, train, submit."""
