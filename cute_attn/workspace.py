"""Device memory that a launch has to itself: partial results, which the same launch reads again. Never initialised."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

SMALLEST = 1 << 16  # bytes; sizes above are rounded up to a power of two, so that few are kept

_kept: dict[tuple[int, int, int], Tensor] = {}  # by device, stream and size
_lock = threading.Lock()


def get(index: int, nbytes: int) -> Tensor:
    """At least so many bytes, for one launch on the current stream of the device with this index.

    Two launches that may run at once never share them: launches of one stream follow each other, so a stream keeps its
    own. A captured launch may be replayed beside anything, so it gets new ones of its graph's memory; the caller drops
    them after the launch, and what the graph does later with that memory comes behind it.
    """
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return get(index, nbytes)
    if torch.cuda.is_current_stream_capturing():
        return _new(index, nbytes)
    key = index, torch._C._cuda_getCurrentRawStream(index), size_class(nbytes)
    found = _kept.get(key)
    return _keep(key) if found is None else found


def size_class(nbytes: int) -> int:
    """The smallest power of two that holds so many bytes."""
    return max(SMALLEST, 1 << (nbytes - 1).bit_length())


def _keep(key: tuple[int, int, int]) -> Tensor:
    index, _, size = key
    stream = torch.cuda.current_stream(index)

    def on_the_stream() -> Tensor:
        with torch.cuda.stream(stream):
            return _new(index, size)

    with _lock:
        if key not in _kept:
            # In a thread of its own: the caller's allocations may be a memory pool's, and end with it.
            with ThreadPoolExecutor(1) as thread:
                _kept[key] = thread.submit(on_the_stream).result()
        return _kept[key]


def _new(index: int, nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", index))
