"""Keys of their own for the workers of one start, in a store that has seen others.

torchrun's agents keep one store over restarts, and count restarts each for itself, so that workers started together
have nothing in common that earlier ones had not; and a second job may be given the first one's address and port.
Reading another worker's key would be fatal, therefore every
rank proves that it lives: it leaves a random token, rank 0 answers with a name for all and the tokens it has seen, and
each rank that finds its own token there confirms the name.
"""

from __future__ import annotations

import json
import time
import uuid

import torch.distributed as dist

from efficient_dl.errors import TransportError

_POLL_SECONDS = 0.02
_SHOWN_RANKS = 10


def session(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """The store under a prefix that exactly these ranks know; all of them call it, within `timeout` seconds.

    Raises TransportError, which names the ranks that did not come.
    """
    prefix, deadline = f"session/{size}", time.monotonic() + timeout
    name = _led(store, size, prefix, deadline) if rank == 0 else _joined(store, rank, prefix, deadline)
    return dist.PrefixStore(name, store)


def _led(store: dist.Store, size: int, prefix: str, deadline: float) -> str:
    name, answered, missing = uuid.uuid4().hex, None, set(range(1, size))
    while missing:
        tokens = {
            str(rank): store.get(f"{prefix}/token/{rank}").decode()
            for rank in sorted(missing)
            if store.check([f"{prefix}/token/{rank}"])
        }
        if tokens != answered:
            store.set(f"{prefix}/answer", json.dumps({"name": name, "tokens": tokens}))
            answered = tokens
        confirmed = {rank for rank in missing if store.check([f"{prefix}/{name}/{rank}"])}
        missing -= confirmed
        if time.monotonic() > deadline:
            late = ", ".join(map(str, sorted(missing)[:_SHOWN_RANKS]))
            raise TransportError(
                "not all ranks have started",
                expected=f"{size} ranks",
                found=f"none of rank {late}{', ...' if len(missing) > _SHOWN_RANKS else ''}",
                fix="look at the launcher's messages on their hosts",
            )
        if not confirmed:
            time.sleep(_POLL_SECONDS)
    return name


def _joined(store: dist.Store, rank: int, prefix: str, deadline: float) -> str:
    token = uuid.uuid4().hex
    store.set(f"{prefix}/token/{rank}", token)
    while time.monotonic() < deadline:
        if store.check([f"{prefix}/answer"]):
            answer = json.loads(store.get(f"{prefix}/answer"))
            if answer["tokens"].get(str(rank)) == token:
                store.set(f"{prefix}/{answer['name']}/{rank}", "")
                return answer["name"]
        time.sleep(_POLL_SECONDS)
    raise TransportError(
        "rank 0 does not answer",
        expected=f"an answer to rank {rank}",
        found="a store without one",
        fix="look at the launcher's messages on rank 0's host; with hosts that come and go, start torchrun with "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    )
