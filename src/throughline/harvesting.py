"""Activations of all wanted layers from one forward pass, which stops after the last of them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from throughline.models import LanguageModel
from throughline.models.language_model import quiet_transformers
from throughline.pools import threads_of
from throughline.tokens import TokenRows

Harvested = tuple[TokenRows, Float[Tensor, "L N D"]]
TOKENS_ON_GPU = 16_384


def tokens_of_a_pass(model: LanguageModel) -> int:
    """How many tokens go through a model at once: what a processor's cache holds, or enough to keep a GPU busy."""
    return tokens_at_once(model.d_model, on_cpu=model.device.type == "cpu")


def tokens_at_once(d_model: int, on_cpu: bool) -> int:
    """The same for a model that is not open."""
    if not on_cpu:
        return TOKENS_ON_GPU
    return 1024 if d_model >= 256 else 2048


def harvest(
    model: LanguageModel,
    batches: Iterable[TokenRows],
    layers: Sequence[int],
    num_threads: int = 1,
    dtype: torch.dtype | None = torch.float32,
) -> Iterator[Harvested]:
    """For each batch of rows the residual stream after `layers` at its N kept tokens (row by row), as `dtype` (None: the model's).

    With several threads each takes a batch at a time and computes it alone: small models gain more from that than from
    splitting every product. The order of the batches is kept.
    """
    if num_threads == 1:
        yield from (_read(model, rows, layers, dtype) for rows in batches)
        return
    waiting: deque[Future[Harvested]] = deque()
    with (
        quiet_transformers(),
        ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        for rows in batches:
            waiting.append(pool.submit(_read, model, rows, layers, dtype))
            if len(waiting) > num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@torch.no_grad()
def _read(model: LanguageModel, rows: TokenRows, layers: Sequence[int], dtype: torch.dtype | None) -> Harvested:
    inputs = model.inputs(rows.ids, rows.positions, rows.pieces)
    residuals = model.run(inputs, capture=layers, logits=False).residuals
    all_BTD = residuals[layers[0]]
    x_LND = all_BTD.new_empty(len(layers), rows.num_tokens, all_BTD.shape[-1], dtype=dtype or all_BTD.dtype)
    if rows.keep.all():
        for x_ND, layer in zip(x_LND, layers, strict=True):
            x_ND.copy_(residuals[layer].flatten(0, 1))
    else:
        keep = torch.from_numpy(rows.keep).to(inputs.ids.device)
        for x_ND, layer in zip(x_LND, layers, strict=True):
            x_ND.copy_(residuals[layer][keep])
    return rows, x_LND


class TextSource:
    """Activations of a text for training (`training.sources.ActivationSource`, and divisible).

    `open_rows` starts the text's rows anew; each of the `epochs` takes the first `num_tokens` of it. Batches that are
    skipped are tokenised and not run through the model. Activations keep the dtype that the model computes in.
    """

    def __init__(
        self,
        model: LanguageModel,
        layers: Sequence[int],
        open_rows: Callable[[], Iterable[TokenRows]],
        *,
        num_tokens: int,
        epochs: int = 1,
    ) -> None:
        self._model, self._layers, self._open_rows = model, layers, open_rows
        self._num_tokens, self._epochs = num_tokens, epochs

    def batches(self, start: int = 0) -> Iterator[Float[Tensor, "L n D"]]:
        """As the protocol has it."""
        return self.every(1, start)

    def every(self, step: int, start: int = 0) -> Iterator[Float[Tensor, "L n D"]]:
        """As the protocol of divisible sources has it."""
        taken: deque[int] = deque()

        def wanted() -> Iterator[TokenRows]:
            for rows, num_tokens in islice(self._all_rows(), start, None, step):
                taken.append(num_tokens)
                yield rows

        threads = threads_of(self._model.device)
        for _, x_LND in harvest(self._model, wanted(), self._layers, threads, dtype=None):
            yield x_LND[:, : taken.popleft()]

    def _all_rows(self) -> Iterator[tuple[TokenRows, int]]:
        """Rows of all epochs, and how many tokens of each are wanted."""
        for _ in range(self._epochs):
            left = self._num_tokens
            for rows in self._open_rows():
                yield rows, min(rows.num_tokens, left)
                left -= rows.num_tokens
                if left <= 0:
                    break
