"""What training needs of memory, what there is, and the blocks of layers that follow."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from throughline.errors import TrainingError

USABLE_SHARE = 0.8  # of what is free; the rest is for what is not counted
PRE_ACTIVATIONS = 4  # float32 arrays of tokens by features that autograd holds at once
CGROUP = Path("/sys/fs/cgroup")


class LayerBytes(NamedTuple):
    """Memory of one layer's training at its end, which is when most is held: its dictionary is folded beside its moments.

    Twins are counted in.
    """

    parameters: int  # float32 weights
    optimizer: int  # two moments
    activations: int  # the chunk
    # Encoder and last good state in bfloat16, the folded dictionary; where autograd trains, gradients and what a step holds.
    buffers: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self)


def measure_layer(
    d_model: int,
    d_sae: int,
    chunk_tokens: int,
    batch_tokens: int,
    by_autograd: bool,
    bytes_per_number: int = 4,
    num_dictionaries: int = 1,
) -> LayerBytes:
    """What one layer holds while it is trained. `bytes_per_number` is of the activations: 2 where they are bfloat16.

    Its own dictionary and its twins (`num_dictionaries`) share the chunk, and take turns with what autograd needs for a step.
    """
    weights = 4 * (2 * d_model * d_sae + d_model + d_sae)
    rounded_encoder, good_state, folded = 2 * d_model * d_sae, 4 * d_model * d_sae, weights
    step = weights + PRE_ACTIVATIONS * 4 * batch_tokens * d_sae if by_autograd else 0
    chunk = bytes_per_number * chunk_tokens * d_model
    buffers = num_dictionaries * (rounded_encoder + good_state + folded) + step
    return LayerBytes(num_dictionaries * weights, num_dictionaries * 2 * weights, chunk, buffers)


def free_bytes(device: str) -> int:
    """Memory that can be had on a device, now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    found = [_available(), _left_in_cgroup()]
    return min(b for b in found if b is not None) if any(b is not None for b in found) else 2**62


def split_blocks(layers: Sequence[int], bytes_per_layer: Sequence[int], free: int) -> list[list[int]]:
    """Consecutive layers in as few blocks as fit, all of about the same size; TrainingError if one layer alone does not fit."""
    usable = int(USABLE_SHARE * free)
    for layer, need in zip(layers, bytes_per_layer, strict=True):
        if need > usable:
            raise TrainingError(
                f"layer {layer} needs {need / 2**30:.1f} GiB to train, found {usable / 2**30:.1f} usable; "
                "set dictionary.expansion or training.batch_tokens lower"
            )
    num_blocks = max(1, -(-sum(bytes_per_layer) // max(usable, 1)))
    while True:
        blocks = _evenly(len(layers), num_blocks)
        if all(sum(bytes_per_layer[a:b]) <= usable for a, b in blocks):
            return [list(layers[a:b]) for a, b in blocks]
        num_blocks += 1


def _evenly(count: int, parts: int) -> list[tuple[int, int]]:
    cuts = [round(i * count / parts) for i in range(parts + 1)]
    return [(a, b) for a, b in pairwise(cuts) if b > a]


def _available() -> int | None:
    """What the system says is available, in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_cgroup() -> int | None:
    """What the limit of a container leaves, page cache not counted."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        cached = next(
            int(line.split()[1])
            for line in (CGROUP / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, ValueError, StopIteration):
        return None
    return None if limit == "max" else int(limit) - used + cached
