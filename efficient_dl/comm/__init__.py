"""Collectives over compressed tensors: what moves the bytes, what decides, and what counts.

An all-reduce is one-shot. Every rank owns one shard of a bucket:

    encode the others' shards -> exchange -> decode and sum in rank order -> encode the sum -> gather -> decode

so a value is rounded once on its way up and once on its way down, however many ranks there are, and what is applied
is what was decoded from the owner's packet, on the owner too: all ranks end bitwise equal.

`Transport` moves bytes (`LoopbackHub`: threads of one process; `ProcessGroupTransport`: torch.distributed).
`BucketLayout` cuts buckets into shards. `Compressor` is codec + plan + meter. `all_reduce` does it at once, and
`OverlappedReducer` beside the
caller, in the steps of `Reduction`, one thread each. `handshake` and `check_equal` compare ranks.
"""

from efficient_dl.comm.collectives import Reduction, all_reduce
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.guard import check_equal
from efficient_dl.comm.handshake import gather_json, handshake
from efficient_dl.comm.layout import BucketLayout, Shard
from efficient_dl.comm.loopback import LoopbackHub
from efficient_dl.comm.meter import Meter, combined, native_tally, summary
from efficient_dl.comm.overlap import OverlappedReducer
from efficient_dl.comm.pipeline import Pipeline
from efficient_dl.comm.plan import Plan
from efficient_dl.comm.process_group import DEFAULT_TIMEOUT_SECONDS, ProcessGroupTransport
from efficient_dl.comm.shadow import ShadowReducer
from efficient_dl.comm.transport import Transport, Work

__all__ = [
    "DEFAULT_TIMEOUT_SECONDS",
    "BucketLayout",
    "Compressor",
    "LoopbackHub",
    "Meter",
    "OverlappedReducer",
    "Pipeline",
    "Plan",
    "ProcessGroupTransport",
    "Reduction",
    "ShadowReducer",
    "Shard",
    "Transport",
    "Work",
    "all_reduce",
    "check_equal",
    "combined",
    "gather_json",
    "handshake",
    "native_tally",
    "summary",
]
