"""Peak memory of one rank, before a GPU is booked."""
