"""Blocks moved layer by layer from the device that ends last, as long as all then end sooner; no torch."""

from collections.abc import Sequence
from typing import NamedTuple

from throughline.planning.blocks import Block, Device, Models

MOST_MOVES = 300
TARGETS = 6  # devices, those that end first, that a layer is offered to


class _Piece(NamedTuple):
    model: str
    first: int
    stop: int


def level(models: Models, devices: Sequence[Device], blocks: list[Block]) -> list[Block]:
    """The same layers on the same devices, the last of which ends no later than before."""
    on = [[_Piece(*block[:3]) for block in blocks if block.device == d] for d in range(len(devices))]
    for _ in range(MOST_MOVES):
        ends = [_seconds(models, device, pieces) for device, pieces in zip(devices, on, strict=True)]
        slowest = max(range(len(devices)), key=lambda d: ends[d])
        targets = sorted(range(len(devices)), key=lambda d: ends[d])[:TARGETS]
        better = _best_move(models, devices, on, slowest, [d for d in targets if d != slowest], ends[slowest])
        if better is None:
            break
        target, giving, taking = better
        on[slowest], on[target] = giving, taking
    return [block for d, device in enumerate(devices) for block in _in_turn(models, device, d, on[d])]


def _best_move(
    models: Models,
    devices: Sequence[Device],
    on: list[list[_Piece]],
    slowest: int,
    targets: list[int],
    end: float,
) -> tuple[int, list[_Piece], list[_Piece]] | None:
    """The move after which the later of the two devices ends soonest; None if none ends before `end`."""
    best, found = end * (1 - 1e-9), None
    for piece in on[slowest]:
        for moved in {
            _Piece(piece.model, piece.first, piece.first + 1),
            _Piece(piece.model, piece.stop - 1, piece.stop),
        }:
            left = _Piece(
                piece.model, piece.first + (moved.first == piece.first), piece.stop - (moved.first != piece.first)
            )
            giving = [p for p in on[slowest] if p != piece] + ([left] if left.first < left.stop else [])
            given = _seconds(models, devices[slowest], giving)
            for target in targets:
                taking = _joined(on[target], moved)
                if not _fit(models, devices[target], taking):
                    continue
                later = max(given, _seconds(models, devices[target], taking))
                if later < best:
                    best, found = later, (target, giving, taking)
    return found


def _joined(pieces: list[_Piece], moved: _Piece) -> list[_Piece]:
    """The pieces with one more, as part of the one it is next to."""
    for piece in pieces:
        if piece.model == moved.model and moved.first in (piece.first - 1, piece.stop):
            whole = _Piece(piece.model, min(piece.first, moved.first), max(piece.stop, moved.stop))
            return [whole if p == piece else p for p in pieces]
    return [*pieces, moved]


def _fit(models: Models, device: Device, pieces: list[_Piece]) -> bool:
    return all(models[p.model][device.kind].fits(p.first, p.stop, device.memory_bytes) for p in pieces)


def _seconds(models: Models, device: Device, pieces: list[_Piece]) -> float:
    return sum(models[p.model][device.kind].seconds(p.first, p.stop) for p in pieces)


def _in_turn(models: Models, device: Device, number: int, pieces: list[_Piece]) -> list[Block]:
    """The pieces one after another, the longest first: what is left for the end is short."""
    timed = sorted(((models[p.model][device.kind].seconds(p.first, p.stop), p) for p in pieces), reverse=True)
    blocks, start = [], 0.0
    for seconds, piece in timed:
        blocks.append(Block(*piece, number, start, seconds))
        start += seconds
    return blocks
