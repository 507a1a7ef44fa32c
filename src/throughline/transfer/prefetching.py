"""What LLVM can and Python cannot say: fetch an entry of an array into the cache before it is needed."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_compiled: Any = intrinsic  # the caller gives all arguments but the first
_I32 = ir.IntType(32)
_BYTES = ir.IntType(8).as_pointer()
READ, KEEP, DATA = (
    ir.Constant(_I32, number) for number in (0, 3, 1)
)  # of LLVM's intrinsic: to read, to keep in all caches


@_compiled
def prefetch(_context: Any, array: Any, index: Any) -> Any:
    """Fetch the cache line of array[index]; an index past the end does no harm. Changes no result, only the time."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.bitcast(builder.gep(data, [arguments[1]]), _BYTES)
        builder.call(function, [place, READ, KEEP, DATA])
        return context.get_dummy_value()

    return types.void(array, index), generate
