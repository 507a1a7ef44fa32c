"""Blocks on devices so that the slowest device ends first: numbers in, numbers out, no torch.

1. guess a makespan; give each device in turn the longest blocks of consecutive layers that it ends by then, and fill
   what is left of its time with blocks of other models
2. halve the gap between the shortest guess that worked and the longest that did not
3. do this for several orders of models and devices, and for small studies in a closer way, and keep the best
    4. move single layers from the device that ends last to those that end first
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import NamedTuple

from throughline.planning.blocks import Block, Device, Models, bound_below, work_of
from throughline.planning.levelling import level

CLOSE_ENOUGH = 0.004  # of the makespan, where halving the gap ends
FILL_INS = 12  # models tried for what is left of a device's time
MOST_LEVELLED = 64  # devices; with more, what is left at the end of each is little
SMALL = 20_000  # devices times models squared, up to which close filling is tried
SHORTER = 2  # layers less than the longest block that close filling tries
NEAR = 1.005  # times the training found, from which on another way to begin is better


class Placement(NamedTuple):
    """Blocks in the order in which they start, the last one's end, and what no placement can beat."""

    blocks: list[Block]
    makespan: float
    lower_bound: float


def place(models: Models, devices: Sequence[Device]) -> Placement:
    """Every pending layer on a device that holds it. The caller has made sure that one does (`find_misfit`)."""
    models = {name: costs for name, costs in models.items() if next(iter(costs.values())).layers}
    bound = bound_below(models, devices)
    if not models:
        return Placement([], 0.0, 0.0)
    best = _fill(models, devices, *_widest_first(models, devices), _fill_in_order, inf)
    assert best is not None, "a layer fits on no device"
    for orders in _orders(models, devices):
        best = _improve(models, devices, orders, bound, best)
    if len(devices) <= MOST_LEVELLED:
        best = level(models, devices, best)
    blocks = sorted(best, key=lambda block: (block.start, block.device))
    return Placement(blocks, _end(best), bound)


# ---- filling


def _orders(models: Models, devices: Sequence[Device]) -> list[tuple[list[str], list[int]]]:
    """Orders of models and devices that are tried; the first one fits whatever fits."""
    kind = max({device.kind for device in devices}, key=lambda k: -work_of(models, k))
    by_layer = sorted(models, key=lambda name: -max(models[name][kind].train_seconds))
    by_work = sorted(models, key=lambda name: -models[name][kind].seconds(0, len(models[name][kind].layers)))
    work = {k: work_of(models, k) for k in {device.kind for device in devices}}
    fastest = sorted(range(len(devices)), key=lambda d: (work[devices[d].kind], -devices[d].memory_bytes, d))
    smallest = sorted(range(len(devices)), key=lambda d: (devices[d].memory_bytes, -work[devices[d].kind], d))
    device_orders = [fastest] if len(work) == 1 else [fastest, smallest]
    model_orders = [by_layer] if by_layer == by_work else [by_layer, by_work]
    return [(m, d) for d in device_orders for m in [*model_orders, by_layer[::-1]]]


def _widest_first(models: Models, devices: Sequence[Device]) -> tuple[list[str], list[int]]:
    return list(models), sorted(range(len(devices)), key=lambda d: -devices[d].memory_bytes)


def _improve(
    models: Models, devices: Sequence[Device], orders: tuple[list[str], list[int]], bound: float, best: list[Block]
) -> list[Block]:
    """The best of `best` and what these orders give."""
    is_small = len(devices) * len(models) ** 2 <= SMALL
    for fill in (_fill_in_order, _fill_closely) if is_small else (_fill_in_order,):
        best = _halve(partial(_fill, models, devices, *orders, fill), bound, best)
    return best


def _halve(try_: Callable[[float], list[Block] | None], bound: float, best: list[Block]) -> list[Block]:
    """The blocks of the shortest makespan that `try_` reaches, or `best` if they do not end sooner."""
    high, low = _end(best) * (1 - CLOSE_ENOUGH), bound
    if high <= low:
        return best
    guess = min(high, 1.03 * low)
    while True:
        found = try_(guess)
        if found is None:
            low = guess
        else:
            best, high = found, _end(found)
        if high - low <= CLOSE_ENOUGH * high:
            return best
        guess = (low + high) / 2 if high < 1.5 * low else 1.2 * low


Following = dict[str, int]  # the first layer of each model that no block has yet; models without one are left out
Filled = list[tuple[str, int, int]]  # blocks of one device: model, first, stop


def _fill(
    models: Models,
    devices: Sequence[Device],
    model_order: list[str],
    device_order: list[int],
    fill: Callable[[Models, Device, Following, float], Filled],
    makespan: float,
) -> list[Block] | None:
    """Blocks of all layers that end by `makespan`; None if these orders do not find them."""
    following: Following = dict.fromkeys(model_order, 0)
    blocks: list[Block] = []
    for device in device_order:
        start = 0.0
        for name, i, j in fill(models, devices[device], following, makespan):
            costs = models[name][devices[device].kind]
            blocks.append(Block(name, i, j, device, start, costs.seconds(i, j)))
            start += blocks[-1].seconds
            following[name] = j
            if j == len(costs.layers):
                del following[name]
        if not following:
            return blocks
    return None


def _fill_in_order(models: Models, device: Device, following: Following, seconds: float) -> Filled:
    """The longest blocks of each model in turn."""
    filled: Filled = []
    tried = 0
    for name, first in following.items():
        costs, i = models[name][device.kind], first
        room = costs.room(device.memory_bytes)
        while i < len(costs.layers) and (j := costs.longest(i, room, seconds)) > i:
            filled.append((name, i, j))
            seconds -= costs.seconds(i, j)
            i = j
        tried += i == first
        if tried == FILL_INS:
            break
    return filled


def _fill_closely(models: Models, device: Device, following: Following, seconds: float) -> Filled:
    """Of several ways to begin, each filled up in order, the one with the most training in it.

    Ways: any of the models first, with its longest block or one of up to two layers less. Near enough to the most is as good,
    and then the model that is first in order goes first: what is hard to place is placed early.
    """
    best: Filled = []
    most = 0.0
    for name, i in following.items():
        costs = models[name][device.kind]
        longest = costs.longest(i, costs.room(device.memory_bytes), seconds)
        for j in range(longest, max(i, longest - SHORTER - 1), -1):
            others = {n: f for n, f in following.items() if n != name}
            rest = _fill_in_order(models, device, others, seconds - costs.seconds(i, j))
            trained = sum(models[n][device.kind].trained(a, b) for n, a, b in [(name, i, j), *rest])
            if trained > most * NEAR:
                best, most = [(name, i, j), *rest], trained
    return best


def _end(blocks: list[Block]) -> float:
    return max((block.start + block.seconds for block in blocks), default=0.0)
