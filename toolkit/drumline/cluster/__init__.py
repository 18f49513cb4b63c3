"""A cluster as seen from a command: its site file, Slurm, Kubernetes, the links of its nodes."""
