"""Training with autograd: all layers of a group in batched products, on any device, for every architecture.

The reference for `compiled.py`, and what GPUs use. Ranks, if there are several, compute a share of each batch and add up what
they found between the gradients and Adam: from there on all are alike again.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from jaxtyping import Int
from torch import Tensor

from throughline.dictionaries.stack import StepLoss
from throughline.errors import TrainingError
from throughline.training.chunks import Chunk
from throughline.training.group import BETAS, EPSILON, Course, Group, Measures
from throughline.training.ranks import ALONE, Ranks
from throughline.training.resampling import is_due, resample_
from throughline.training.watching import EVERY_STEPS, MOST_SETBACKS, Watch


class PlainTrainer:
    """One group's steps. Micro-batches shrink when memory runs out, and `say` is told.

    Several ranks raise TrainingError instead: what they say to one another within a batch would fall out of step.
    """

    def __init__(self, group: Group, course: Course, say: Callable[[str], None], ranks: Ranks = ALONE) -> None:
        self._group, self._course, self._say, self._ranks = group, course, say, ranks
        self._share = ranks.share_of(course.batch_tokens)
        self._optimizer = torch.optim.Adam(
            list(group.stack.trained().values()), lr=group.learning_rate, betas=BETAS, eps=EPSILON, fused=True
        )
        self._num_parts = 1  # micro-batches of a batch
        self._watches = [Watch(group.single(i)) for i in range(len(group.layers))]
        self._slow_S = self._find_slow()  # known without asking the device at every step

    def train(self, chunk: Chunk, first_step: int, num_steps: int, tick: Callable[[float], None]) -> None:
        """Steps on consecutive batches of the chunk; `tick` hears how many are done."""
        self._remember(first_step)
        group, N = self._group, self._course.batch_tokens
        order_C = chunk.order_C.to(chunk.x_LCD.device)
        everything = len(group.columns) == len(chunk.x_LCD)
        columns = torch.tensor(group.columns, device=chunk.x_LCD.device)[:, None]
        for i in range(num_steps):
            order_N = order_C[i * N + self._ranks.rank : (i + 1) * N : self._ranks.size]
            x_LND = chunk.x_LCD[:, order_N] if everything else chunk.x_LCD[columns, order_N]
            self._step((x_LND.float() - group.mean_LD[:, None]) * group.scale_LD[:, None], first_step + i)
            if (i + 1) % EVERY_STEPS == 0 or i + 1 == num_steps:
                self._look(first_step + i + 1)
            tick(i + 1)

    def _look(self, step: int) -> None:
        group = self._group
        # copied once: each layer's numbers would else be waited for
        group.latest = Measures(*(getattr(group.latest, f.name).cpu() for f in fields(Measures)))
        went_back = False
        for index, watch in enumerate(self._watches):
            if not watch.has_failed:
                one = slice(index, index + 1)
                went_back |= watch.look(step, Measures(*(getattr(group.latest, f.name)[one] for f in fields(Measures))))
        if went_back:
            self._slow_S = self._find_slow()

    def _find_slow(self) -> Int[Tensor, "S"]:
        """The layers that were set back, by their place in the group."""
        return (self._group.setbacks_L > 0).nonzero()[:, 0]

    def _remember(self, step: int) -> None:
        """The group's moments are the optimizer's."""
        for name, weight in self._group.stack.trained().items():
            first, second = self._group.moments[name]
            count = torch.tensor(float(step), device=weight.device)
            self._optimizer.state[weight] = {"step": count, "exp_avg": first, "exp_avg_sq": second}

    def _step(self, x_LND: Tensor, step: int) -> None:
        group, course, N = self._group, self._course, self._course.batch_tokens
        dead_LF = group.idle_tokens_LF >= course.dead_after_of(group)
        losses = self._losses(x_LND, dead_LF, course.progress(step))
        error_LND = x_LND - losses.x_hat_LND
        squares = [x.square().sum((1, 2)) for x in (error_LND, x_LND)]
        loss_L = losses.loss_L * (x_LND.shape[1] / N)
        gradients = [weight.grad for weight in group.stack.parameters() if weight.grad is not None]
        self._ranks.sum_(*gradients, losses.fired_LF, loss_L, *squares)
        if losses.smallest_L is not None:
            self._ranks.minimum_(losses.smallest_L)
        group.stack.remove_parallel_gradient_()
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = group.learning_rate * course.rate(step)
        with self._slowed():
            self._optimizer.step()
        self._optimizer.zero_grad()
        group.stack.normalize_()
        with torch.no_grad():
            l0_L = losses.fired_LF.sum(1) / N
            group.controller.update_(l0_L, step, course.num_steps, course.rate(step))
            group.architecture.after_step_(
                group.stack, losses.smallest_L, group.controller.trim(step, course.num_steps)
            )
            group.idle_tokens_LF += N
            group.idle_tokens_LF[losses.fired_LF > 0] = 0
            if is_due(step, course.num_steps, group.k):
                all_x_LND, all_error_LND = (self._ranks.gather_batch(x, N) for x in (x_LND, error_LND))
                resample_(group, all_x_LND, all_error_LND, step, course)
                # whitened on another processor, directions differ in their last bits
                for tensor in group.stack.tensors().values():
                    self._ranks.take_(tensor.detach(), 0)
            group.latest = Measures(loss_L, l0_L, squares[0] / squares[1], dead_LF.float().mean(1))

    @contextmanager
    def _slowed(self) -> Iterator[None]:
        """Layers that were set back go a part of the optimizer's step, those given up none of it."""
        group, which_S = self._group, self._slow_S
        if not len(which_S):
            yield
            return
        slowed_S = torch.where(group.setbacks_L > MOST_SETBACKS, 0.0, group.slowed_L)[which_S]
        before = {name: weight.detach()[which_S].clone() for name, weight in group.stack.trained().items()}
        yield
        with torch.no_grad():
            for name, weight in group.stack.trained().items():
                factor = slowed_S.view(-1, *[1] * (weight.ndim - 1))
                moved = before[name] + factor * (weight[which_S] - before[name])
                weight[which_S] = torch.where(factor > 0, moved, before[name])

    def _losses(self, x_LND: Tensor, dead_LF: Tensor, progress: float) -> StepLoss:
        """Losses of the batch; their gradients are left in the weights."""
        while True:
            try:
                parts = [self._part(part, x_LND, dead_LF, progress) for part in x_LND.chunk(self._num_parts, dim=1)]
                return parts[0] if len(parts) == 1 else _join(parts, [p.x_hat_LND.shape[1] for p in parts])
            except torch.OutOfMemoryError as error:
                if self._ranks.size > 1:
                    raise TrainingError(
                        f"memory ran out on rank {self._ranks.rank} of {self._ranks.size}; "
                        f"set training.batch_tokens (now {self._course.batch_tokens}) lower or give more devices"
                    ) from error
                if self._num_parts >= x_LND.shape[1]:
                    raise
                self._optimizer.zero_grad()
                self._num_parts *= 2
                tokens = math.ceil(x_LND.shape[1] / self._num_parts)
                self._say(
                    f"memory ran out; each batch of {x_LND.shape[1]} tokens is computed {tokens} at a time from here"
                )

    def _part(self, part_LND: Tensor, x_LND: Tensor, dead_LF: Tensor, progress: float) -> StepLoss:
        group = self._group
        with torch.autocast(x_LND.device.type, torch.bfloat16, enabled=self._course.bfloat16):
            losses = group.architecture.loss(
                group.stack,
                part_LND,
                dead_LF,
                progress,
                k=group.k,
                penalty_L=group.controller.penalty_L,
                share=self._share,
            )
        (losses.loss_L.sum() * (part_LND.shape[1] / self._course.batch_tokens)).backward()
        return StepLoss(losses.loss_L.detach(), losses.x_hat_LND.detach(), *losses[2:])


def _join(parts: list[StepLoss], sizes: list[int]) -> StepLoss:
    """The losses of a batch from those of its micro-batches."""
    weights = torch.tensor(sizes, dtype=torch.float32, device=parts[0].loss_L.device) / sum(sizes)
    smallest = [p.smallest_L for p in parts if p.smallest_L is not None]
    return StepLoss(
        torch.stack([p.loss_L for p in parts], 1) @ weights,
        torch.cat([p.x_hat_LND for p in parts], 1),
        torch.stack([p.fired_LF for p in parts]).sum(0),
        torch.stack(smallest).amin(0) if smallest else None,
    )
