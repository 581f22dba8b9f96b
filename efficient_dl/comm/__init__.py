"""Collectives over compressed tensors: what moves the bytes, what decides, and what counts.

An all-reduce is one-shot. Every rank owns one shard of a bucket:

    encode the others' shards -> exchange -> decode and sum in rank order -> encode the sum -> gather -> decode

so a value is rounded once on its way up and once on its way down, however many ranks there are (a ring rounds at every
hop), and what is applied is what was decoded from the owner's packet, on the owner too: all ranks end bitwise equal.

What each part promises:

- `Transport` moves bytes and never looks inside. Messages have any length, which the receiver does not know; the sizes
  travel first and are counted. One transfer at a time, in one order on all ranks; whoever waits in vain gets a
  `TransportError` that names the peer. `LoopbackHub` joins threads of one process; `ProcessGroupTransport` joins
  processes, and so does `MpiTransport` (in comm.mpi), between those that mpirun started.
- `BucketLayout` cuts a flat bucket of named parameters into one shard a rank, on the codecs' block boundaries.
- `Compressor` is plan + codecs + rates + residuals + meter. Its state is keyed by parameter names, never by buckets.
  Parameters with different codecs (`Plan.overrides`) travel as several packets in one message (`sections`); `Rates`
  follows a bound on error or bytes, `Residuals` keeps what lossy packets leave out.
- `CommonStep` is one step size for all packets of a model, which all ranks agree on after a training step.
- `all_reduce` reduces one bucket and waits; `OverlappedReducer` takes one bucket after the other and works on them in a
  `Pipeline`: one thread and one process group for each phase, first in, first out, so that the order of collectives is
  the same on all ranks. A failure ends all that is queued.
- `Topology` says which ranks share a node. A `HierarchicalReduction` sums up inside the nodes in full precision and
  all-reduces compressed between them, one rank of each node for each of its shards; `HierarchicalReducer` pipelines it.
- A `GroupedReduction` is compressed inside as well, among many ranks with links of their own: fewer messages, and
  packets that are passed on as they are; `GroupedReducer` pipelines it.
- `all_reduce_coalesced`, `broadcast`, `all_gather` and `all_to_all` do the same for lists and dicts of tensors.
- `reduce_scatter_chunks` and `all_gather_chunks` do the same for parameters of which every rank keeps one part:
  `ChunkLayout` says how they lie in rank-chunked buffers, padding included; `ReplicaReduction` is the all-reduce of a
  rank's chunk over those that hold the same one (HSDP); `OverlappedSharding` runs them in threads of its own.
- `sum_at_owners` is the way up alone, for sharded optimizers that need a sum at one rank only.
- `ShadowReducer` counts what that would have sent, beside the native collective.
- `Meter` counts what really left: packets with their headers, and size messages; `summary` makes ratios of it.
- `handshake` compares what ranks are about to do, `check_equal` what they have done: their parameters, bit by bit.
- `Watch` raises alarms about what a meter shows; `KillSwitch` ends compression on all ranks after the same step.
"""

from efficient_dl.comm.alarm import Alarm, OnAlarm, Watch, check_options
from efficient_dl.comm.chunks import ChunkLayout
from efficient_dl.comm.collectives import Reduction, all_reduce
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.exchanges import all_gather, all_reduce_coalesced, all_to_all, broadcast
from efficient_dl.comm.gathers import (
    AllGather,
    GatherSource,
    OwnPacket,
    SizeRound,
    all_gather_chunks,
    shadow_round,
)
from efficient_dl.comm.grouped import GroupedReduction, grouped_all_reduce
from efficient_dl.comm.guard import check_equal
from efficient_dl.comm.handshake import gather_json, handshake
from efficient_dl.comm.hierarchy import HierarchicalReduction, Levels, hierarchical_all_reduce
from efficient_dl.comm.layout import BucketLayout, Shard
from efficient_dl.comm.loopback import LoopbackHub
from efficient_dl.comm.meter import Meter, combined, native_tally, since, sparse_tally, summary
from efficient_dl.comm.overlap import GroupedReducer, HierarchicalReducer, OverlappedReducer
from efficient_dl.comm.owner_sum import sum_at_owners
from efficient_dl.comm.pipeline import Pipeline
from efficient_dl.comm.plan import Plan
from efficient_dl.comm.process_group import DEFAULT_TIMEOUT_SECONDS, ProcessGroupTransport
from efficient_dl.comm.replicas import ReplicaReduction, replica_bucket, shard_numels
from efficient_dl.comm.residuals import Residuals
from efficient_dl.comm.scalars import parameter_scalars, total_scalars
from efficient_dl.comm.shadow import ShadowReducer
from efficient_dl.comm.sharded import ReduceScatter, reduce_scatter_chunks, sharded_native_tally
from efficient_dl.comm.sharded_shadow import ShadowGather, ShadowReplicas, ShadowScatter, ShardedShadow
from efficient_dl.comm.sharding import GradientReduction, OverlappedSharding, ReplicaTransports
from efficient_dl.comm.switch import KillSwitch
from efficient_dl.comm.topology import Topology
from efficient_dl.comm.transport import Divisible, Transport, Work

__all__ = [
    "DEFAULT_TIMEOUT_SECONDS",
    "Alarm",
    "AllGather",
    "BucketLayout",
    "ChunkLayout",
    "Compressor",
    "Divisible",
    "GatherSource",
    "GradientReduction",
    "GroupedReducer",
    "GroupedReduction",
    "HierarchicalReducer",
    "HierarchicalReduction",
    "KillSwitch",
    "Levels",
    "LoopbackHub",
    "Meter",
    "OnAlarm",
    "OverlappedReducer",
    "OverlappedSharding",
    "OwnPacket",
    "Pipeline",
    "Plan",
    "ProcessGroupTransport",
    "ReduceScatter",
    "Reduction",
    "ReplicaReduction",
    "ReplicaTransports",
    "Residuals",
    "ShadowGather",
    "ShadowReducer",
    "ShadowReplicas",
    "ShadowScatter",
    "Shard",
    "ShardedShadow",
    "SizeRound",
    "Topology",
    "Transport",
    "Watch",
    "Work",
    "all_gather",
    "all_gather_chunks",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "broadcast",
    "check_equal",
    "check_options",
    "combined",
    "gather_json",
    "grouped_all_reduce",
    "handshake",
    "hierarchical_all_reduce",
    "native_tally",
    "parameter_scalars",
    "reduce_scatter_chunks",
    "replica_bucket",
    "shadow_round",
    "shard_numels",
    "sharded_native_tally",
    "since",
    "sparse_tally",
    "sum_at_owners",
    "summary",
    "total_scalars",
]
