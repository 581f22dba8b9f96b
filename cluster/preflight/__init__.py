"""Before a job: do its hosts have what it needs, and all the same? `srun python -m cluster.preflight`."""
