"""Whether products are made in bfloat16: where the device multiplies it faster, unless the study says otherwise.

Decided from what the processor can do and not from timing, so that two runs on one kind of machine are the same to the bit.
"""

import torch

HARVEST_FROM_WIDTH = 256  # narrower models spend their time outside of products


def multiplies_bfloat16(device: str) -> bool:
    """True where bfloat16 products are faster than float32 ones."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    if kind == "cpu":
        return any(
            getattr(torch.cpu, name, lambda: False)()
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return False


def trains_in_bfloat16(precision: str, device: str) -> bool:
    """Encoder products; weights and moments stay float32."""
    return multiplies_bfloat16(device) if precision == "auto" else precision == "bfloat16"


def harvests_in_bfloat16(precision: str, device: str, d_model: int) -> bool:
    """The language model's forward pass during training; evaluation and tracing keep the model's own dtype."""
    return trains_in_bfloat16(precision, device) and is_wide_enough(precision, d_model)


def is_wide_enough(precision: str, d_model: int) -> bool:
    """True if a model of this width is run in bfloat16 where its dictionaries are trained so."""
    return precision != "auto" or d_model >= HARVEST_FROM_WIDTH
