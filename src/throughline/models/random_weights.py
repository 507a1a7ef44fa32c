"""An architecture at its full size with random weights: for measuring speed and memory where no trained weights are at hand.

    1. build the modules on the meta device, which allocates nothing
    2. allocate them once, in the wanted dtype, on the wanted device; tie what the architecture ties
    3. let the architecture's own rules fill them, with normal numbers copied out of a pool in place of drawn ones

Step 3 also rebuilds what no checkpoint holds and step 2 left undefined: rotary frequencies, Gemma's embedding scale. Norms
are 1 and biases 0, as these rules have it.
"""

from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from throughline.errors import InputError

POOL = 4_194_301  # normal numbers drawn; a prime, so that rows of a matrix are not copies of one another
END_OF_TEXT = "<|endoftext|>"


class _PooledNormal(TorchFunctionMode):
    """Inside, `tensor.normal_(mean, std)` copies from a seeded pool, each run of it from a random place: 30 times faster."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(POOL, generator=self._generator)
        self._scaled: dict[tuple, Tensor] = {}  # by standard deviation, dtype and device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.normal_:
            return self._fill(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _fill(self, tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: object = None) -> Tensor:
        flat = tensor.view(-1)
        key = (mean, std, tensor.dtype, tensor.device)
        if key not in self._scaled:
            self._scaled[key] = (self._pool * std + mean).to(tensor.dtype).to(tensor.device)
        pool = self._scaled[key]
        for start in range(0, flat.numel(), POOL):
            run = flat[start : start + POOL]
            offset = int(torch.randint(POOL, (), generator=self._generator))
            ahead = min(len(run), POOL - offset)
            run[:ahead].copy_(pool[offset : offset + ahead])
            run[ahead:].copy_(pool[: len(run) - ahead])
        return tensor


def build_empty(
    config: PreTrainedConfig, *, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The modules of the causal language model of `config` on the meta device: shapes, and no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
        )


def build_random(
    config: PreTrainedConfig, *, name: str, dtype: torch.dtype, attn_implementation: str | None, device: str
) -> PreTrainedModel:
    """The causal language model of `config` with random weights, the same ones for the same `name`.

    Memory: the weights once, and 32 MB. InputError if the architecture's own rules leave something undefined.
    """
    hf: Any = build_empty(config, dtype=dtype, attn_implementation=attn_implementation)
    hf.to_empty(device=device)
    hf.tie_weights()
    for tensor_name, tensor in _tensors(hf):
        if not tensor.is_floating_point():
            raise InputError(
                f"model type {config.model_type!r} cannot have random weights: nothing says how to make its {tensor_name}"
            )
        tensor.data.view(-1)[:1] = torch.nan  # so that what nothing fills is found below
    seed = crc32(name.encode())
    with torch.random.fork_rng(devices=[]), _PooledNormal(seed):
        torch.manual_seed(seed)  # for rules that draw otherwise than by normal_
        hf.initialize_weights()
    for tensor_name, tensor in _tensors(hf):
        if not tensor.view(-1)[:1].isfinite().all():
            raise InputError(
                f"model type {config.model_type!r} cannot have random weights: its rules leave {tensor_name} undefined"
            )
    return hf


def _tensors(hf: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return [*hf.named_parameters(), *hf.named_buffers()]


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A stand-in where an architecture comes without a tokenizer: token i < 256 is one byte, 256 the end of text.

    InputError if the vocabulary has no room for them.
    """
    if vocab_size <= 256:
        raise InputError(
            f"a vocabulary of {vocab_size} has no room for 256 bytes and an end of text; put a tokenizer.json beside config.json"
        )
    bytes_ = {_character_of(byte): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_ | {END_OF_TEXT: 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _character_of(byte: int) -> str:
    """The printable character by which ByteLevel writes a byte: itself, or the next free one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))
