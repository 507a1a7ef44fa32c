"""Work on many batches, or pairs of layers, at once."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

W = TypeVar("W")
R = TypeVar("R")


def threads_of(device: torch.device) -> int:
    """How many threads work beside one another: torch's on a CPU; a GPU is kept busy by one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def spread(work: Callable[[W], R], items: Iterable[W], device: torch.device) -> Iterator[R]:
    """What `work` gives for each item, in order.

    On a CPU each of torch's threads works on an item alone, which small matrices gain more from than from splitting every product.
    """
    with ThreadPoolExecutor(threads_of(device), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, items)
