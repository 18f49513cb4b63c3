"""Access to a cluster: its site file, Slurm and Kubernetes jobs, and link measurements of its nodes."""
