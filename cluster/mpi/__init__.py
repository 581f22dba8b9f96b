"""MPI jobs on emulated hosts: `python -m cluster.mpi --hosts 2 --rate 100mbit -n 4 -- python train.py`."""

from cluster.mpi.hosts import MpiHosts, mpi_hosts
from cluster.mpi.programs import Mpirun, find_mpirun

__all__ = ["MpiHosts", "Mpirun", "find_mpirun", "mpi_hosts"]
