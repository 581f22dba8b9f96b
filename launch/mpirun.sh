#!/bin/bash
# Trains on 2 hosts with 4 ranks each, started by Open MPI:
#     bash mpirun.sh
# Name the hosts by --host a:4,b:4 or --hostfile FILE, unless a scheduler does.
# Ranks find each other by MPI (mpi4py), or through MASTER_ADDR where that is set. With --transport mpi compressed bytes
# travel by MPI, too.
set -euo pipefail

exec mpirun -n 8 --map-by ppr:4:node \
    python -m efficient_dl.cli train --model gpt-micro --data stdlib --bits 2.0 --steps 500
