"""What LLVM can and Python cannot say: bfloat16 numbers as their bits, and sixteen comparisons at once.

Compiled functions have bfloat16 as int16 arrays, since numpy has no such type.
"""

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from throughline.kernel_cache import njit

# Reassociation lets sums be vectorised; NaN and infinity are left alone, since training must notice them.
# A call that is not inlined goes to whichever copy of the function the process loaded first, and each caller's copy may
# round differently: bits would depend on whether this process compiled or read what an earlier one compiled.
COMPILED: Any = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz"},
    "forceinline": True,
}
LANES = 16
HAS_AVX512 = "avx512f" in {name for name, has in llvm.get_host_cpu_features().items() if has}

_compiled: Any = intrinsic  # the caller gives all arguments but the first
_I1, _I16, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _lanes(kind: Any) -> Any:
    return ir.VectorType(kind, LANES)


def _all_lanes(builder: Any, value: Any) -> Any:
    """One number in every lane."""
    nothing = ir.Constant(_lanes(value.type), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_lanes(_I32), [0] * LANES))


@_compiled
def number(_context: Any, entry: Any) -> Any:
    """An entry of an array as float32: a float32 itself, or the bits of a bfloat16."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if entry != types.int16:
            return arguments[0]
        high = builder.shl(builder.zext(arguments[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(high, _F32)

    return types.float32(entry), generate


@_compiled
def narrow(_context: Any, given: Any) -> Any:
    """The bits (int16) of the bfloat16 nearest to a float32 number, ties to even."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        up = builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(up, ir.Constant(_I32, 16)), _I16)

    return types.int16(given), generate


@_compiled
def trailing_zeros(_context: Any, word: Any) -> Any:
    """How many low bits of an integer other than 0 are 0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(_I1, 1))

    return word(word), generate


class _Arrays:
    """Sixteen entries at a time of the arrays among an intrinsic's arguments."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self._builder, self._arguments = builder, arguments
        self._data = [
            context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else None
            for kind, value in zip(signature.args, arguments, strict=True)
        ]

    def _at(self, which: int, first: Any, kind: Any) -> Any:
        pointer = self._builder.gep(self._data[which], [first])
        return self._builder.bitcast(pointer, _lanes(kind).as_pointer())

    def load(self, which: int, first: Any, kind: Any) -> Any:
        """Entries `first` to `first + 16` of argument `which`."""
        loaded = self._builder.load(self._at(which, first, kind))
        loaded.align = kind.width // 8 if isinstance(kind, ir.IntType) else 4
        return loaded

    def store_packed(self, which: int, first: Any, lanes: Any, mask: Any) -> None:
        """The lanes of `mask` side by side from entry `first` of argument `which` on; zeros behind them. AVX-512."""
        builder, vector = self._builder, lanes.type
        kind, suffix = (_F32, "v16f32") if vector.element == _F32 else (_I32, "v16i32")
        signature = ir.FunctionType(vector, [vector, vector, _lanes(_I1)])
        pack = cgutils.get_or_insert_function(builder.module, signature, f"llvm.x86.avx512.mask.compress.{suffix}")
        packed = builder.call(pack, [lanes, ir.Constant(vector, [0] * LANES), mask])
        builder.store(packed, self._at(which, first, kind)).align = 4


def _above(builder: Any, lanes: Any, limit: Any) -> Any:
    return builder.fcmp_ordered(">", lanes, _all_lanes(builder, limit))


def _count(builder: Any, mask: Any) -> Any:
    return builder.zext(builder.ctpop(builder.bitcast(mask, _I16)), _I64)


@_compiled
def _lanes_above(_context: Any, value_A: Any, first: Any, limit: Any) -> Any:
    """How many of the sixteen float32 entries from `first` on are above `limit`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        entries = _Arrays(context, builder, signature, arguments).load(0, arguments[1], _F32)
        return _count(builder, _above(builder, entries, arguments[2]))

    return types.int64(value_A, types.int64, types.float32), generate


@_compiled
def _pack_entries(
    _context: Any, row_F: Any, bias_F: Any, first: Any, limit: Any, index_A: Any, value_A: Any, num: Any
) -> Any:
    """Of entries `first` to `first + 16` of row + bias, write those above `limit` and where they are to A[num : ...].

    Returns `num` and how many were found.
    """
    is_bfloat16 = row_F.dtype == types.int16

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays, begin, end = _Arrays(context, builder, signature, arguments), arguments[2], arguments[6]
        if is_bfloat16:
            high = builder.zext(arrays.load(0, begin, _I16), _lanes(_I32))
            entries = builder.bitcast(builder.shl(high, ir.Constant(_lanes(_I32), [16] * LANES)), _lanes(_F32))
        else:
            entries = arrays.load(0, begin, _F32)
        entries = builder.fadd(entries, arrays.load(1, begin, _F32))
        mask = _above(builder, entries, arguments[3])
        steps = ir.Constant(_lanes(_I32), list(range(LANES)))
        arrays.store_packed(4, end, builder.add(_all_lanes(builder, builder.trunc(begin, _I32)), steps), mask)
        arrays.store_packed(5, end, entries, mask)
        return builder.add(end, _count(builder, mask))

    result = types.int64(row_F, bias_F, types.int64, types.float32, index_A, value_A, types.int64)
    return result, generate


@_compiled
def _pack_kept(_context: Any, index_A: Any, value_A: Any, first: Any, limit: Any, num: Any) -> Any:
    """Of entries `first` to `first + 16`, move those above `limit` to A[num : ...]; returns `num` and how many they are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays, begin, end = _Arrays(context, builder, signature, arguments), arguments[2], arguments[4]
        places, entries = arrays.load(0, begin, _I32), arrays.load(1, begin, _F32)
        mask = _above(builder, entries, arguments[3])
        arrays.store_packed(0, end, places, mask)
        arrays.store_packed(1, end, entries, mask)
        return builder.add(end, _count(builder, mask))

    return types.int64(index_A, value_A, types.int64, types.float32, types.int64), generate


@njit(**COMPILED, inline="always")
def count_above(value_A: Any, num: int, limit: Any) -> int:
    """How many of the first `num` entries lie above a limit of at least 0; the sixteen that follow them have to be 0."""
    count = 0
    for first in range(0, num, LANES):
        count += _lanes_above(value_A, first, limit)
    return count


# ---- taking out what is above a limit, in two ways


@njit(**COMPILED)
def entries_above_by_words(row_F: Any, bias_F: Any, limit: Any, index_A: Any, value_A: Any) -> int:
    """Where row + bias is above `limit`, ascending, and how much it is there; how many that are.

    A and F contiguous; A has room for 16 more than are found. Flags are set a byte each and read a word at a time.
    """
    num_features, num = len(row_F), 0
    words = np.zeros((num_features + 7) // 8, np.uint64)
    flag_F = words.view(np.uint8)
    for f in range(num_features):
        flag_F[f] = number(row_F[f]) + bias_F[f] > limit
    for w in range(len(words)):
        word = words[w]
        while word != 0:
            f = 8 * w + np.int64(trailing_zeros(word) >> np.uint64(3))
            index_A[num], value_A[num] = f, number(row_F[f]) + bias_F[f]
            num += 1
            word &= word - np.uint64(1)  # the flag is one bit of its byte
    return num


@njit(**COMPILED)
def entries_above_by_lanes(row_F: Any, bias_F: Any, limit: Any, index_A: Any, value_A: Any) -> int:
    """The same with AVX-512, without a branch."""
    num = 0
    whole = len(row_F) - len(row_F) % LANES
    for f in range(0, whole, LANES):
        num = _pack_entries(row_F, bias_F, f, limit, index_A, value_A, num)
    for f in range(whole, len(row_F)):
        value = number(row_F[f]) + bias_F[f]
        if value > limit:
            index_A[num], value_A[num] = f, value
            num += 1
    return num


@njit(**COMPILED)
def keep_above_one_by_one(index_A: Any, value_A: Any, num: int, limit: Any) -> int:
    """Of the first `num` entries leave those above a limit of at least 0, in their order; how many they are.

    The sixteen entries behind `num` have to be 0, and so are those behind the kept ones afterwards.
    """
    kept = 0
    for a in range(num):
        index_A[kept], value_A[kept] = index_A[a], value_A[a]
        kept += 1 if value_A[a] > limit else 0
    value_A[kept : kept + LANES] = np.float32(0)
    return kept


@njit(**COMPILED)
def keep_above_by_lanes(index_A: Any, value_A: Any, num: int, limit: Any) -> int:
    """The same with AVX-512."""
    kept = 0
    for first in range(0, num, LANES):
        kept = _pack_kept(index_A, value_A, first, limit, kept)
    for a in range(LANES):
        value_A[kept + a] = np.float32(0)
    return kept


entries_above = entries_above_by_lanes if HAS_AVX512 else entries_above_by_words
keep_above = keep_above_by_lanes if HAS_AVX512 else keep_above_one_by_one
