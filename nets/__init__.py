"""Networks: constructor and forward, nothing else."""
