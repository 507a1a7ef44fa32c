"""What a block of consecutive layers takes in time and memory, and what no placement of blocks can beat; no torch.

A block of layers i to j - 1 of one model costs a start, the forward pass up to its last layer, and the training of each.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import ceil, inf
from typing import NamedTuple

MEMORY_SHARE = 0.8  # as training/memory.py, which needs torch; a test compares them


@dataclass(frozen=True)
class Costs:
    """One model's pending layers on one kind of device; lists are by layer, ascending."""

    layers: Sequence[int]
    train_seconds: Sequence[float]
    forward_seconds: Sequence[float]  # one epoch, up to and with the layer: never less than the layer before
    layer_bytes: Sequence[int]
    fixed_bytes: int  # whatever the layers
    start_seconds: float
    epochs: int = 1
    cache_seconds: Sequence[float] | None = None  # to write a layer's activations once and read them again; None: never
    always_cached: bool = False

    @cached_property
    def train_until(self) -> list[float]:
        """Seconds of the layers before each, and of all."""
        return [0.0, *accumulate(self.train_seconds)]

    @cached_property
    def bytes_until(self) -> list[int]:
        """The same of bytes."""
        return [0, *accumulate(self.layer_bytes)]

    @cached_property
    def cache_until(self) -> list[float]:
        """The same of the cache's seconds."""
        return [0.0, *accumulate(self.cache_seconds or [inf] * len(self.layers))]

    def is_cached(self, i: int, j: int) -> bool:
        """True if activations of layers i to j - 1 are kept: always, or where that takes less time."""
        if self.cache_seconds is None or self.epochs == 1:
            return False
        again = (self.epochs - 1) * self.forward_seconds[j - 1]
        return self.always_cached or self.cache_until[j] - self.cache_until[i] < again

    def seconds(self, i: int, j: int) -> float:
        """Of a job on layers i to j - 1."""
        forward = self.forward_seconds[j - 1]
        if self.is_cached(i, j):
            activations = forward + self.cache_until[j] - self.cache_until[i]
        else:
            activations = self.epochs * forward
        return self.start_seconds + activations + self.train_until[j] - self.train_until[i]

    def trained(self, i: int, j: int) -> float:
        """Seconds of the training alone."""
        return self.train_until[j] - self.train_until[i]

    def bytes(self, i: int, j: int) -> int:
        """Peak memory of such a job."""
        return self.fixed_bytes + self.bytes_until[j] - self.bytes_until[i]

    def fits(self, i: int, j: int, memory_bytes: int) -> bool:
        """True if the layers take no more than their share of what the rest leaves."""
        return self.bytes_until[j] - self.bytes_until[i] <= self.room(memory_bytes)

    def room(self, memory_bytes: int) -> int:
        """Bytes for layers on a device of so much memory."""
        return int(MEMORY_SHARE * (memory_bytes - self.fixed_bytes))

    def memory_for(self, i: int, j: int) -> int:
        """The smallest device on which such a job fits."""
        return self.fixed_bytes + ceil((self.bytes_until[j] - self.bytes_until[i]) / MEMORY_SHARE)

    def longest(self, i: int, room: int, seconds: float) -> int:
        """The largest j so that layers i to j - 1 fit into `room` and take at most `seconds`; i if not even one does."""
        most = bisect_right(self.bytes_until, self.bytes_until[i] + room) - 1
        if most <= i or self.seconds(i, i + 1) > seconds:
            return i
        if self.seconds(i, most) <= seconds:
            return most
        low, high = i + 1, most  # low does, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.seconds(i, middle) <= seconds else (low, middle)
        return low


class Device(NamedTuple):
    """What placing needs of a device."""

    kind: str
    memory_bytes: int


class Block(NamedTuple):
    """Layers first to stop - 1, counted among a model's pending ones, on a device."""

    model: str
    first: int
    stop: int
    device: int
    start: float
    seconds: float


Models = dict[str, dict[str, Costs]]  # by model, then by kind of device


def find_misfit(models: Models, devices: Sequence[Device]) -> tuple[str, int] | None:
    """The first model and layer (counted among the pending) that fit on no device; None if all do."""
    largest = {kind: max(d.memory_bytes for d in devices if d.kind == kind) for kind in {d.kind for d in devices}}
    for name, costs in models.items():
        for i in range(len(next(iter(costs.values())).layers)):
            if not any(costs[kind].fits(i, i + 1, memory) for kind, memory in largest.items()):
                return name, i
    return None


def work_of(models: Models, kind: str) -> float:
    """Seconds that one device of this kind would take for all models, unsplit."""
    return sum(costs[kind].seconds(0, len(costs[kind].layers)) for costs in models.values() if costs[kind].layers)


def bound_below(models: Models, devices: Sequence[Device]) -> float:
    """No placement ends sooner: the longest job that cannot be split, or all work shared by all devices without a gap.

    Devices of several kinds: kind b does at most r times of what kind a does, r the largest ratio of their seconds over the
    parts of the work that b can hold. Work in seconds of a, over the sum of these ratios, is a bound for every a.
    """
    kinds = {device.kind: device.memory_bytes for device in devices}
    counts = {kind: sum(device.kind == kind for device in devices) for kind in kinds}
    longest = work = 0.0
    held = {
        name: {kind: _held(costs[kind], kinds[kind]) for kind in kinds}
        for name, costs in models.items()
        if next(iter(costs.values())).layers
    }
    for name, on in held.items():
        for i in range(len(models[name][next(iter(kinds))].layers)):
            longest = max(
                longest, min((models[name][kind].seconds(i, i + 1) for kind in kinds if on[kind][i]), default=0)
            )
    for reference in kinds:
        ratios = {kind: _best_ratio(models, held, reference, kind) for kind in kinds}
        speed = sum(counts[kind] * ratio for kind, ratio in ratios.items())
        if speed > 0:
            work = max(work, work_of(models, reference) / speed)
    return max(longest, work)


def _held(costs: Costs, memory_bytes: int) -> list[bool]:
    return [costs.fits(i, i + 1, memory_bytes) for i in range(len(costs.layers))]


def _best_ratio(models: Models, held: dict[str, dict[str, list[bool]]], reference: str, kind: str) -> float:
    """The most seconds of `reference` that a second of `kind` stands for, over parts of the work."""
    best = 0.0
    for name, on in held.items():
        a, b = models[name][reference], models[name][kind]
        if any(on[kind]):
            parts = [(x, y) for x, y, fits in zip(a.train_seconds, b.train_seconds, on[kind], strict=True) if fits]
            n = len(a.layers)
            whole = ((costs.seconds(0, n) - costs.train_until[n]) for costs in (a, b))  # start and activations
            best = max(best, *(x / y for x, y in [*parts, tuple(whole)] if y > 0), 0.0)
    return best
