"""A Slurm cluster on one machine, each node behind a shaped link: `python -m cluster.slurm up --nodes 2`."""

from cluster.slurm.cluster import RunningCluster, SlurmCluster, missing_requirements
from cluster.slurm.config import SlurmOptions

__all__ = ["RunningCluster", "SlurmCluster", "SlurmOptions", "missing_requirements"]
