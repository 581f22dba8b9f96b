"""Counts the bytes that autograd keeps for backward: the same number on a CPU and on a GPU."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor, nn


class SavedTensors:
    """Meters what forward passes save for backward while it is entered, also when it is released later.

    A storage counts once, however many views of it are saved, with all its bytes; the storages of parameters and
    buffers of `without` do not count. What torch.utils.checkpoint recomputes during backward is not seen, its inputs
    are. Entered, left and read on one thread; backward may release on others.

    bytes: saved now. peak_bytes: the most that was saved at once. storages: data pointer -> bytes of what is saved now.

        with SavedTensors(model) as saved:
            loss = model(x).sum()
        print(saved.bytes)      # what this graph holds; 0 after loss.backward()
    """

    def __init__(self, *without: nn.Module) -> None:
        self._without = without
        self._excluded: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        # Re-entrant: a collection of garbage may release a saved tensor in the midst of counting another.
        self._lock = threading.RLock()
        self._holders: dict[int, int] = {}
        self.storages: dict[int, int] = {}
        self.bytes = 0
        self.peak_bytes = 0

    def __enter__(self) -> SavedTensors:
        tensors = (one for module in self._without for one in (*module.parameters(), *module.buffers()))
        self._excluded = {one.untyped_storage().data_ptr() for one in tensors}
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Held:
        # Detached: a saved output that kept its graph would keep itself alive.
        held = _Held(tensor.detach(), tensor._version)
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if storage.nbytes() == 0 or key in self._excluded:
            return held
        with self._lock:
            self._holders[key] = self._holders.get(key, 0) + 1
            if key not in self.storages:
                self.storages[key] = storage.nbytes()
                self.bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(held, self._release, key).atexit = False
        return held

    def _release(self, key: int) -> None:
        with self._lock:
            self._holders[key] -= 1
            if self._holders[key] == 0:
                del self._holders[key]
                self.bytes -= self.storages.pop(key)


def saved_bytes(run: Callable[[], object], without: Iterable[nn.Module] = ()) -> int:
    """Bytes that the graph of run()'s result holds for backward; see SavedTensors."""
    with SavedTensors(*without) as saved:
        result = run()
    held = saved.bytes
    del result
    return held


class _Held:
    """A saved tensor, whose release by autograd can be watched. version: its count of changes in place when saved."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor, version: int) -> None:
        self.tensor = tensor
        self.version = version


def _unpack(held: _Held) -> Tensor:
    # Autograd leaves this check to the hooks.
    if held.tensor._version != held.version:
        raise RuntimeError(
            "a tensor that backward needs has been changed by an operation in place: "
            f"{tuple(held.tensor.shape)} {held.tensor.dtype}, version {held.tensor._version} after {held.version}"
        )
    return held.tensor
