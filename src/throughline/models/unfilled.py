"""Weights that have no place in memory yet are not drawn.

transformers builds a model on the meta device, where tensors have no numbers, and puts the file's numbers in afterwards; buffers
that no file holds, such as rotary frequencies, it computes anew. On that device torch does all arithmetic by the rules of its
compiler, and the first drawn or computed tensor imports sympy for it: half a second.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

NAMES = (
    "normal_",
    "uniform_",
    "trunc_normal_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "xavier_normal_",
    "xavier_uniform_",
)
DRAWING = {torch.Tensor.normal_, torch.Tensor.uniform_, *(getattr(init, name) for name in NAMES)}


class Unfilled(TorchFunctionMode):
    """Inside, drawing the numbers of a tensor on the meta device does nothing, and with `counting` numbers are counted on the CPU.

    Families that count (`torch.arange`) for their rotary frequencies alone may do so anywhere. Others may go on with a tensor of
    the meta device, to which one of the CPU cannot be added.
    """

    def __init__(self, counting: bool) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in DRAWING:
            tensor = args[0] if args else options["tensor"]
            if tensor.is_meta:
                return tensor
        if func is torch.arange and self._counting and options.get("device") == torch.device("meta"):
            options["device"] = "cpu"
        return func(*args, **options)
