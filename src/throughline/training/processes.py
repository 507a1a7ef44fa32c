"""Ranks that are processes of one `torch.distributed` group: gloo between CPUs, nccl between GPUs.

What goes over the wire, for L layers of width D with F features and batches of N tokens:

    each step           gradients, 2 D F + D + F floats a layer, summed; counts of F features, and three sums
                        batch_topk, matryoshka: up to N k activations of each rank, from which all find the same largest
    each token          its activations, L D numbers of the model's dtype, once to every rank
    twenty times a run  a batch and its errors, 2 N D floats a layer, from which tokens for dead features are drawn

A step's gradients are 8 D F bytes a layer and a batch's activations 4 N D: where F is larger than N / 2, as it usually is, the
gradients are the greater part, and ranks pay only where a batch takes longer to compute than its gradients to send. A W-th of the
activations would do for a rank's own tokens; it has all of them, for mean and scale and to keep the exchange simple.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from throughline.dictionaries.share import Share
from throughline.training.checkpoints import Checkpoint
from throughline.training.dividing import DividedSource, DivisibleSource
from throughline.training.ranks import Ranks
from throughline.training.sources import ActivationSource


class Processes(Ranks):
    """The ranks of an initialised process group; `device` is this process's own, with nccl the current CUDA device."""

    def __init__(self, device: str = "cpu", group: dist.ProcessGroup | None = None) -> None:
        self._device, self._group = device, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def share_of(self, batch_tokens: int) -> Share:
        """As `Ranks` has it."""
        return Part(self, batch_tokens)

    def sum_(self, *tensors: Tensor) -> None:
        """As `Ranks` has it."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def minimum_(self, tensor: Tensor) -> None:
        """As `Ranks` has it."""
        self._reduce([tensor], dist.ReduceOp.MIN)

    def _reduce(self, tensors: Sequence[Tensor], how: dist.ReduceOp.RedOpType) -> None:
        works = [dist.all_reduce(tensor, how, group=self._group, async_op=True) for tensor in tensors]
        for work in works:
            assert work is not None
            work.wait()

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, stacked."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor, group=self._group)
        return torch.stack(found)

    def gather_objects(self, given: object) -> list:
        """As `Ranks` has it."""
        found: list = [None] * self.size
        dist.all_gather_object(found, given, group=self._group)
        return found

    def gather_batch(self, x_LND: Float[Tensor, "L n D"], batch_tokens: int) -> Float[Tensor, "L N D"]:
        """As `Ranks` has it. A rank's token i is the batch's i W + r, so ranks are the inner axis; what was padded is the last."""
        L, n, D = x_LND.shape
        room = -(-batch_tokens // self.size)
        padded_LRD = torch.cat([x_LND, x_LND.new_zeros(L, room - n, D)], 1)
        return self.gather(padded_LRD).permute(1, 2, 0, 3).reshape(L, room * self.size, D)[:, :batch_tokens]

    def take_(self, tensor: Tensor, owner: int) -> None:
        """As `Ranks` has it; sent as bytes, since not every backend knows every dtype."""
        assert tensor.is_contiguous()
        dist.broadcast(tensor.detach().reshape(-1).view(torch.uint8), group_src=owner, group=self._group)

    def divide(self, source: ActivationSource) -> ActivationSource:
        """As `Ranks` has it; a source that cannot leave batches out is read by every rank for itself."""
        return DividedSource(source, self, self._device) if isinstance(source, DivisibleSource) else source

    def load(self, load: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        """As `Ranks` has it: ranks that read the file at different times could go on from different steps."""
        found = load() if self.rank == 0 else None
        shapes = found and {name: (tensor.shape, tensor.dtype) for name, tensor in found.tensors.items()}
        described = self.gather_objects(found and (found.step, found.cursor, shapes))[0]
        if described is None:
            return None
        step, cursor, shapes = described
        tensors = {}
        for name, (shape, dtype) in shapes.items():
            tensors[name] = torch.empty(shape, dtype=dtype, device=self._device)
            if found:
                tensors[name].copy_(found.tensors[name])
            self.take_(tensors[name], 0)
        return Checkpoint(step, cursor, tensors)


class Part(Share):
    """Every `size`-th token of a batch of `batch_tokens`, from the one of the rank's number on."""

    def __init__(self, ranks: Processes, batch_tokens: int) -> None:
        self._ranks, self._batch_tokens = ranks, batch_tokens

    def num_tokens(self, here: int) -> int:
        """As `Share` has it."""
        return self._batch_tokens

    def num_of_first(self, num_tokens: int) -> int:
        """As `Share` has it."""
        return len(range(self._ranks.rank, num_tokens, self._ranks.size))

    def weight_of_first(self, num_tokens: int) -> float:
        """As `Share` has it; 1 where the ranks divide both numbers."""
        of_first = self.num_of_first(num_tokens) / num_tokens
        return of_first / (self.num_of_first(self._batch_tokens) / self._batch_tokens)

    def mean_of_first(self, x_LND: Float[Tensor, "L n D"], num_tokens: int, dim: tuple[int, ...]) -> Tensor:
        """As `Share` has it."""
        mean = x_LND.mean(dim, keepdim=True) * (x_LND.shape[1] / num_tokens)
        self._ranks.sum_(mean)
        return mean

    def keep_largest(self, values_LA: Float[Tensor, "L A"], num_kept: int) -> Float[Tensor, "L A"]:
        """As `Share` has it. Of equal values every rank chooses the same."""
        return torch.where(self._is_kept(values_LA.detach(), num_kept), values_LA, 0)

    def _is_kept(self, values_LA: Tensor, num_kept: int) -> Bool[Tensor, "L A"]:
        L, A = values_LA.shape
        here, most = (len(range(rank, self._batch_tokens, self._ranks.size)) for rank in (self._ranks.rank, 0))
        # padded to what rank 0 has, which is the most: all ranks come to the same number, from `num_kept` values or from fewer
        room = min(num_kept, -(-A // here) * most)
        everyone_WLR = self._ranks.gather(torch.cat([values_LA, values_LA.new_zeros(L, room - A)], 1))
        flat = everyone_WLR.transpose(0, 1).reshape(L, -1)
        largest = flat.topk(min(num_kept, flat.shape[1]), dim=1, sorted=False).indices
        kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, largest, True)
        return kept.view(L, self._ranks.size, room)[:, self._ranks.rank, :A]
