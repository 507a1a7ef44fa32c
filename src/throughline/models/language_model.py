"""A causal language model whose residual stream can be read and edited after every block.

Hooks sit on the blocks and live only inside a `with`. `hidden_states` of transformers is never used: its last entry is
already normed, and it shows the unpatched value once its own hooks are installed.
"""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from throughline.errors import InputError
from throughline.model_files import check_layers
from throughline.models.attention import use_short_attention_
from throughline.models.structure import find_structure

Edit = Callable[[Tensor], Tensor]


class ModelOutput(NamedTuple):
    """`residuals[i]` [B, T, D] is the stream after block i before any final norm, in the model's dtype."""

    logits: Tensor | None  # [B, T, V] float32; [B, 1, V] with last_only, [B, P, V] with `at`; None if not asked for
    residuals: dict[int, Tensor]


class Inputs(NamedTuple):
    """What a forward pass takes, on the model's device. Positions and mask are both None for plain causal text."""

    ids: Tensor  # [B, T] int64
    positions: Tensor | None  # [B, T] int64
    mask: Tensor | None  # [B, 1, T, T] added to the attention logits: row query, column key


class Past(NamedTuple):
    """Keys and values [1, heads, T, d] of one text in every block: what copies of it that differ only later attend to."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def before(self, position: int) -> "Past":
        """Of the tokens before a position alone."""
        return Past(*(tuple(t[:, :, :position] for t in each) for each in self))

    def copies(self, num: int) -> DynamicCache:
        """For a batch of `num` rows, as transformers takes it; a forward pass adds to it, so each needs its own."""
        cache = DynamicCache()
        for block, (keys, values) in enumerate(zip(*self, strict=True)):
            cache.update(keys.expand(num, -1, -1, -1), values.expand(num, -1, -1, -1), block)
        return cache


class _Stop(Exception):
    """Raised by a hook once everything asked for has been seen."""


class LanguageModel:
    """An opened model in evaluation mode; its parameters take no gradient, its activations do."""

    def __init__(self, name: str, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, device: str = "cpu") -> None:
        """Move `hf` to `device` and find its parts; InputError if its structure is not understood."""
        self.structure = find_structure(hf)
        self.name = name
        self.tokenizer: Any = tokenizer  # transformers says that decode may return a list
        self.device = torch.device(device)
        self.hf = hf.requires_grad_(False).eval().to(self.device)  # pyright: ignore[reportArgumentType]
        self.family = self.structure.family
        config: Any = hf.config.get_text_config()
        self.num_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        self.context: int = getattr(config, self.family.context)
        self.vocab_size = int(self._unembedding_weight().shape[0])
        self._window = _window_of(config)
        self._suffixes: dict[int, LanguageModel] = {}

    def in_dtype(self, dtype: torch.dtype) -> "LanguageModel":
        """A copy whose weights are of another dtype; buffers (rotary frequencies, masks) keep theirs, as in loaded models."""
        if dtype == self.hf.dtype:
            return self
        hf: Any = copy.deepcopy(self.hf)
        hf.to(dtype)
        for mine, other in zip(self.hf.modules(), hf.modules(), strict=True):
            other._buffers.update(mine._buffers)
        if dtype == torch.bfloat16 and self.device.type == "cpu":
            use_short_attention_(hf)
        return LanguageModel(self.name, hf, self.tokenizer, str(self.device))

    def after(self, layer: int) -> "LanguageModel":
        """The same model without the work of blocks 0 to `layer`, which pass on what they are given.

        Run it with the stream after block `layer` put in by `edits[layer]`. Weights are shared; layers keep their numbers.
        """
        if layer not in self._suffixes:
            check_layers(self.name, [layer], self.num_layers)
            kept = list(self.structure.blocks)[layer + 1 :]
            blocks = nn.ModuleList([*(_PassOn() for _ in range(layer + 1)), *kept])
            suffix = copy.copy(self)
            suffix.hf = _replace_module(self.hf, self.structure.blocks_path.split("."), blocks)
            suffix.structure = self.structure._replace(blocks=blocks)
            self._suffixes[layer] = suffix
        return self._suffixes[layer]

    def layers(self, wanted: Literal["all"] | list[int]) -> list[int]:
        """The layers wanted, ascending, each once; InputError names the first that does not exist."""
        if wanted == "all":
            return list(range(self.num_layers))
        check_layers(self.name, wanted, self.num_layers)
        return sorted(set(wanted))

    def inputs(
        self,
        ids: np.ndarray | Tensor,
        positions: np.ndarray | Tensor | None = None,
        pieces: np.ndarray | Tensor | None = None,
    ) -> Inputs:
        """What `run` takes for `ids` [B, T].

        `pieces` [B, T] numbers the texts that share a row (-1: padding): a token attends to the earlier tokens of its
        own piece. `positions` [B, T] start again at 0 with each piece unless given. Rows that are one piece from
        position 0, padded at the end at most, need neither mask nor positions.
        InputError if there are no tokens, a position lies beyond the model's context, or a masked piece is longer than
        an attention window.
        """
        ids_BT = torch.as_tensor(ids).to(self.device, torch.int64)
        if ids_BT.numel() == 0:
            raise InputError(f"a text without tokens was given to {self.name}, which needs at least one")
        pieces_BT = torch.zeros_like(ids_BT, device="cpu") if pieces is None else torch.as_tensor(pieces).cpu()
        times_T = torch.arange(ids_BT.shape[1])
        if positions is None:
            first_BT = torch.ones_like(pieces_BT, dtype=torch.bool)
            first_BT[:, 1:] = pieces_BT[:, 1:] != pieces_BT[:, :-1]
            positions_BT = times_T - torch.where(first_BT, times_T, 0).cummax(1).values
        else:
            positions_BT = torch.as_tensor(positions).cpu().long()
        real_BT = pieces_BT >= 0
        longest = 1 + int(torch.where(real_BT, positions_BT, 0).max())
        if longest > self.context:
            raise InputError(f"a text of {longest} tokens was given to {self.name}, whose context is {self.context}")
        plain_BT = ~real_BT | ((pieces_BT == pieces_BT[:, :1]) & (positions_BT == times_T))
        ends_padded = not bool((real_BT[:, 1:] & ~real_BT[:, :-1]).any())
        if bool(plain_BT.all()) and ends_padded and len(times_T) <= self.context:
            return Inputs(ids_BT, None, None)
        positions_BT = torch.where(real_BT, positions_BT, 0)
        return Inputs(ids_BT, positions_BT.to(self.device), self._mask(pieces_BT, longest))

    def run(
        self,
        inputs: Inputs,
        *,
        capture: Iterable[int] = (),
        edits: Mapping[int, Edit] | None = None,
        logits: bool = True,
        last_only: bool = False,
        at: Tensor | None = None,
        past: Past | None = None,
    ) -> ModelOutput:
        """One forward pass: the residual streams of the layers in `capture`, and the logits.

        `edits[i]` takes the stream after block i [B, T, D] and returns what takes its place: what the next block sees
        and what capture records. Gradients flow unless the caller says otherwise. `last_only` gives the logits of each
        row's last token, `at` those of some positions [P]; with `logits=False` the blocks after the last captured or
        edited one are not computed. With `past` every row is what comes after those tokens.
        """
        wanted, edits = set(capture), edits or {}
        residuals: dict[int, Tensor] = {}
        stop = None if logits else max(wanted | set(edits), default=None)
        if not logits and stop is None:
            return ModelOutput(None, {})

        def watch(layer: int) -> Edit:
            def seen(residual_BTD: Tensor) -> Tensor:
                if layer in edits:
                    residual_BTD = _edited(edits[layer], residual_BTD)
                if layer in wanted:
                    residuals[layer] = residual_BTD
                if layer == stop:
                    raise _Stop
                return residual_BTD

            return seen

        with ExitStack() as stack:
            for layer in sorted(wanted | set(edits)):
                stack.enter_context(self.editing(layer, watch(layer)))
            with suppress(_Stop):
                output = self._forward(inputs, 1 if last_only else 0 if at is None else at, past)
                return ModelOutput(output.float() if logits else None, residuals)
        return ModelOutput(None, residuals)

    @torch.no_grad()
    def remember(self, ids: list[int]) -> Past:
        """Keys and values of a text, for `run(past=...)`."""
        cache = DynamicCache()
        inputs = self.inputs(torch.tensor([ids]))
        with quiet_transformers():
            self.hf(input_ids=inputs.ids, use_cache=True, past_key_values=cache, logits_to_keep=1)
        layers: Any = cache.layers
        return Past(tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers))

    @contextmanager
    def editing(self, layer: int, edit: Edit) -> Iterator[None]:
        """Every run of the model inside, by whatever way, has `edit` applied to the stream after block `layer`.

        Runs in other threads are left alone, so that threads can share a model.
        """
        owner = threading.get_ident()

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if threading.get_ident() != owner:
                return output
            # transformers 5 returns the stream itself, 4 a tuple that begins with it
            if isinstance(output, tuple):
                return (_edited(edit, output[0]), *output[1:])
            return _edited(edit, output)

        handle = self._block(layer).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def unembed(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """The logits, float32, that the model makes of streams after its last block."""
        last, parts = self.num_layers - 1, []
        for part in x_ND.split(self.context):  # as rows of a text, whose blocks do nothing
            ids = torch.zeros(1, len(part), dtype=torch.int64, device=self.device)
            made = self.after(last).run(Inputs(ids, None, None), edits={last: lambda _, part=part: part[None]})
            assert made.logits is not None
            parts.append(made.logits[0])
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    @torch.no_grad()
    def unembedding(self) -> Float[Tensor, "V D"]:
        """Row v: the direction of the residual stream that raises the logit of token v above the mean token's; float32.

        W * scale of the final norm, minus its mean over the vocabulary; where the norm centres, minus each row's mean
        over D too. With the norm frozen at its divisor r, a step of the stream changes centred logits by W @ step / r.
        """
        scale_D = self.family.scale_of_norm(self.structure.final_norm).float()
        W_VD = self._unembedding_weight().detach().float() * scale_D
        W_VD -= W_VD.mean(0)
        return W_VD - W_VD.mean(1, keepdim=True) if self.family.centres else W_VD

    @torch.no_grad()
    def generate(self, ids: list[int], max_new_tokens: int) -> list[int]:
        """The tokens that greedily follow `ids`, without the end-of-text that stops them; fewer if the context ends."""
        ends, made = self.end_ids, []
        room = max(1, self.context - len(ids) + 1)  # at least one try, so that a prompt that is too long is refused
        for _ in range(min(max_new_tokens, room)):
            inputs = self.inputs(np.array([ids + made]))
            output = self.run(inputs, last_only=True)
            assert output.logits is not None
            token = int(output.logits[0, -1].argmax())
            if token in ends:
                break
            made.append(token)
        return made

    @property
    def end_ids(self) -> set[int]:
        """The tokens that end a text: the tokenizer's, and the model's own."""
        configured = getattr(self.hf.generation_config, "eos_token_id", None)
        several = configured if isinstance(configured, list) else [configured]
        return {end for end in (*several, self.tokenizer.eos_token_id) if isinstance(end, int)}

    def module_path(self, layer: int) -> str:
        """Dotted path of a block, such as `transformer.h.3`."""
        self._block(layer)
        return f"{self.structure.blocks_path}.{layer}"

    def _block(self, layer: int) -> nn.Module:
        check_layers(self.name, [layer], self.num_layers)
        return self.structure.blocks[layer]

    def _unembedding_weight(self) -> Tensor:
        assert isinstance(self.structure.unembedding.weight, Tensor)
        return self.structure.unembedding.weight

    def _mask(self, pieces_BT: Tensor, longest: int) -> Tensor:
        if self._window is not None and longest > self._window:
            # transformers uses a mask of ours in all layers alike, so it cannot hold the window of some
            raise InputError(
                f"a packed text of {longest} tokens was given to {self.name}, whose layers see {self._window} at once; "
                f"set data.context to at most {self._window}"
            )
        allowed_BTT = (pieces_BT[:, :, None] == pieces_BT[:, None, :]).tril()
        zeros = torch.zeros(allowed_BTT.shape, dtype=self.hf.dtype)
        mask_BTT = zeros.masked_fill(~allowed_BTT, torch.finfo(self.hf.dtype).min)
        return mask_BTT[:, None].to(self.device)

    def _forward(self, inputs: Inputs, logits_to_keep: int | Tensor, past: Past | None) -> Tensor:
        options: dict[str, Any] = {"use_cache": False, "logits_to_keep": logits_to_keep}
        if past is not None:
            options["past_key_values"] = past.copies(len(inputs.ids))
        if inputs.mask is not None:
            options |= {"attention_mask": inputs.mask, "position_ids": inputs.positions}
        with quiet_transformers():
            return self.hf(input_ids=inputs.ids, **options).logits


class _PassOn(nn.Module):
    """A block that does nothing."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_options: Any) -> Tensor:
        return hidden_states


def _replace_module(module: Any, path: list[str], new: nn.Module) -> Any:
    """`module` with another submodule at `path`; what lies off the path is shared, and nothing is changed in place."""
    out = copy.copy(module)
    out._modules = dict(module._modules)
    out._modules[path[0]] = _replace_module(module._modules[path[0]], path[1:], new) if path[1:] else new
    return out


def _edited(edit: Edit, residual_BTD: Tensor) -> Tensor:
    new_BTD = edit(residual_BTD)
    assert new_BTD.shape == residual_BTD.shape, f"edit made {tuple(new_BTD.shape)} of {tuple(residual_BTD.shape)}"
    return new_BTD.to(residual_BTD.dtype)


def _window_of(config: Any) -> int | None:
    """How many tokens the layers with a sliding window see at once; None if there are no such layers."""
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if slides else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Only errors of transformers are logged inside."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
