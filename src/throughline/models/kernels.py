"""Compiled loops of language models on a CPU, imported where one of them runs: numba takes half a second to import."""

from typing import Any

from throughline.kernel_cache import njit


@njit(nogil=True)
def look_up(bits: Any, table: Any, out: Any) -> None:
    """The entry of `table` for each of `bits`, into `out`."""
    for i in range(bits.size):
        out[i] = table[bits[i]]
