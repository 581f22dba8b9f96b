#!/bin/bash
# Trains on 2 hosts with 4 workers each. On every host, in the same folder of a shared file system:
#     HEAD=first-host bash torchrun.sh
# HEAD names the host that holds the rendezvous, the same one everywhere. If a worker or a host fails, torchrun starts
# all workers again, up to 3 times, and edl train goes on from its last checkpoint.
set -euo pipefail

: "${HEAD:?name the first host: HEAD=first-host bash torchrun.sh}"
exec python -m torch.distributed.run \
    --nnodes=2 --nproc-per-node=4 --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:29400" --rdzv-id=edl \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=60 \
    -m efficient_dl.cli train --model gpt-micro --data stdlib --bits 2.0 --steps 500 --resume-or-start --out runs/edl
