"""Training on CPUs: a thread takes one layer at a time, gradients stay sparse, weights stay in the cache.

Nothing couples layers, so each goes through a chunk of activations by itself. `plain.py` does the same arithmetic with
autograd and is this file's oracle; `kernels.py` holds the loops.
"""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401 - numba multiplies with its BLAS, and only what is loaded can be limited
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from throughline.dictionaries.auxk import AUX_TOKENS, AUX_WEIGHT
from throughline.dictionaries.matryoshka import prefixes
from throughline.dictionaries.relu import WARM_UP
from throughline.training import kernels
from throughline.training.chunks import Chunk
from throughline.training.group import BETAS, EPSILON, Course, Group
from throughline.training.resampling import is_due, resample_
from throughline.training.watching import EVERY_STEPS, Watch

ARCHITECTURES = ("topk", "batch_topk", "matryoshka", "relu")
BLOCK_STEPS = EVERY_STEPS  # a thread stays with its layer for so long before it looks for one further behind
SMALL_PRODUCT = (
    5e7  # operations of an encoder's product that a call from the interpreter, and waiting for it, would outlast
)
LOOSER = np.float32(0.9)  # of the last batch's limit: nearly always keeps enough candidates
SAMPLE_ROWS = 64


def can_train(architecture: str, device: str) -> bool:
    """True if an architecture has compiled steps, and the device is a CPU."""
    return device == "cpu" and architecture in ARCHITECTURES


def workspace_bytes(num_tokens: int, d_model: int, d_sae: int, k: float | None) -> int:
    """What a `Workspace` of one prefix takes, in bfloat16; `k` None: a penalty decides how many features are active."""
    num_aux = min(num_tokens, AUX_TOKENS)
    per_token = d_model * (4 + 2 + 4) + 2 * d_sae
    gradients = (num_tokens + num_aux) * d_model * (4 + 2) + 4 * num_aux * d_model
    entries = 2 * num_tokens * int(k or d_model) + num_aux * max(1, d_model // 2)
    return num_tokens * per_token + gradients + 28 * entries


class Workspace:
    """What one thread needs beside a layer's weights, for batches of N tokens of one shape."""

    def __init__(self, num_tokens: int, d_model: int, d_sae: int, room: int, num_prefixes: int, bfloat16: bool) -> None:
        num_aux = min(num_tokens, AUX_TOKENS)
        rows = num_tokens + num_aux
        self.num_aux, self.aux_room = num_aux, num_aux * max(1, d_model // 2)
        x, rounded = torch.empty(num_tokens, d_model), torch.empty(num_tokens if bfloat16 else 0, d_model).bfloat16()
        self.x_ND, self.rounded_ND = x.numpy(), rounded.view(torch.int16).numpy()
        self.x = rounded if bfloat16 else x
        self.pre = torch.empty(num_tokens, d_sae, dtype=self.x.dtype)
        self.pre_NF = self.pre.view(torch.int16).numpy() if bfloat16 else self.pre.numpy()
        self.error_ND = np.empty((num_tokens, d_model), np.float32)  # x_hat - x, where G does not have it
        self.aux_AD = np.empty((num_aux, d_model), np.float32)
        self.G_RD = np.empty((num_prefixes * num_tokens + num_aux, d_model), np.float32)
        self.rounded_G_RD = np.empty((len(self.G_RD) if bfloat16 else 0, d_model), np.int16)
        self.starts_R, self.counts_R = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.starts_F = np.empty(d_sae + 1, np.int64)
        self.room = 0
        self.make_room(room)

    def make_room(self, room: int) -> None:
        """Codes for at least `room` active features beside AuxK's; what they held is lost."""
        if room <= self.room:
            return
        self.room, entries = room, room + self.aux_room
        self.features_A, self.token_A, self.row_A = (np.empty(entries, np.int32) for _ in range(3))
        self.values_A, self.slopes_A = np.empty(entries, np.float32), np.empty(entries, np.float32)
        self.value_A, self.slope_A = np.empty(entries, np.float32), np.empty(entries, np.float32)


class CompiledLayer:
    """One layer's weights and moments as arrays, and its steps."""

    def __init__(self, group: Group, course: Course) -> None:
        """`group` is of one layer; its tensors are changed in place."""
        self.group, self.course, self.name = group, course, group.architecture.name
        tensors = {name: tensor[0] for name, tensor in group.tensors().items()}
        self._a = {name: tensor.numpy() for name, tensor in tensors.items()}
        self._W_enc = tensors["W_enc"]
        work = 2 * course.batch_tokens * self._W_enc.numel()
        self._is_small = self.name == "topk" and work <= SMALL_PRODUCT
        self._bfloat16 = course.bfloat16 and not self._is_small
        self._rounded = self._W_enc[: None if self._bfloat16 else 0].bfloat16()
        self._encoder = (self._rounded if self._bfloat16 else self._W_enc).T
        d_sae, self.d_model = self._W_enc.shape
        self._ends_P = np.array(prefixes(d_sae) if self.name == "matryoshka" else [d_sae])
        prefix_F = np.searchsorted(self._ends_P, np.arange(d_sae), side="right")
        self._first_row_F = prefix_F.astype(np.int64) * course.batch_tokens
        self._scale_D, self._idle_F = self._a["scale"], self._a["idle"]
        self._dead_after = float(course.dead_after_of(group))
        moments = [self._a[f"{name}.{which}"] for name in ("W_enc", "b_enc", "W_dec") for which in "mv"]
        encoder = (self._a["W_enc"], self._rounded.view(torch.int16).numpy(), self._a["b_enc"])
        self._trained = (*encoder, self._a["W_dec"], *moments)
        self._zero_D = np.zeros(self.d_model, np.float32)
        self._guess = np.float32(0)  # where a selection begins to look; changes its time alone
        self._watch = Watch(group)

    @property
    def shape(self) -> tuple[int, ...]:
        """What a workspace depends on."""
        per_token = self.group.k or self.d_model
        tokens = self.course.batch_tokens
        return (tokens, self.d_model, len(self._W_enc), 2 * tokens * per_token, len(self._ends_P), self._bfloat16)

    def train(
        self, chunk_CD: np.ndarray, order_C: np.ndarray, first_step: int, num_steps: int, space: Workspace
    ) -> None:
        """Steps on consecutive batches of `order_C`; measures are those of the last one. A layer that was given up takes none.

        Where the loss is not finite, the steps that are left of these are not taken.
        """
        if self._watch.has_failed:
            return
        N, loss, error, num_codes, done = self.course.batch_tokens, math.nan, math.nan, 0, 0
        while done < num_steps:
            step = first_step + done
            taken = self._steps_in_one_call(step, num_steps - done) if self._is_small else 1
            order = order_C[done * N : (done + taken) * N]
            if self._is_small:
                loss, error, num_codes = self._call_steps(chunk_CD, order, step, taken, space)
            else:
                with np.errstate(over="ignore", invalid="ignore"):  # the loss shows it
                    loss, error, num_codes = self._step(chunk_CD, order, step, space)
            done += taken
            if not math.isfinite(loss):
                break
        squares = max(float(np.vdot(space.x_ND, space.x_ND)), 1e-30)
        dead = float((self._idle_F >= self._dead_after).mean())
        for name, value in {"loss": loss, "l0": num_codes / N, "fvu": error / squares, "dead": dead}.items():
            getattr(self.group.latest, name)[0] = value
        if self._watch.look(first_step + done, self.group.latest):
            self._rounded.copy_(self._W_enc[: len(self._rounded)])

    def _steps_in_one_call(self, step: int, most: int) -> int:
        """How many steps from `step` on need nothing in between: up to and with the next that resamples."""
        due = (i + 1 for i in range(most) if is_due(step + i, self.course.num_steps, self.group.k))
        return next(due, most)

    def _call_steps(
        self, chunk_CD: np.ndarray, order_C: np.ndarray, step: int, num_steps: int, s: Workspace
    ) -> tuple[float, float, int]:
        """TopK: several steps in one compiled call; loss, squared error and active features of the last."""
        a = self._a
        adam_S = np.stack([self._adam(step + i) for i in range(num_steps)])
        codes = (s.starts_R, s.counts_R, s.features_A, s.values_A, s.slopes_A)
        by_feature = (s.starts_F, s.token_A, s.row_A, s.value_A, s.slope_A)
        _, loss, error, num_codes, guess = kernels.steps_topk(
            chunk_CD,
            order_C,
            a["mean"],
            self._scale_D,
            self.group.k or 0,
            AUX_WEIGHT,
            self._dead_after,
            adam_S,
            self._guess,
            (s.x_ND, s.rounded_ND),
            s.pre_NF,
            codes,
            by_feature,
            s.G_RD,
            s.aux_AD,
            self._trained,
            (a["b_dec"], a["b_dec.m"], a["b_dec.v"]),
            self._idle_F,
        )
        self._guess = np.float32(guess)  # a float, as it comes back, would have everything compiled once more
        self._after_step(step + num_steps - 1, num_codes, math.inf, s)
        return loss, error, num_codes

    def _step(self, chunk_CD: np.ndarray, order_N: np.ndarray, step: int, s: Workspace) -> tuple[float, float, int]:
        """One step; loss, summed squared error and active features of the batch."""
        a, N = self._a, len(s.x_ND)
        kernels.gather(chunk_CD, order_N, a["mean"], self._scale_D, s.x_ND, s.rounded_ND)
        torch.mm(s.x, self._encoder, out=s.pre)
        num_codes, smallest = self._select(s)
        loss, error = self._decode(step, num_codes, s)
        num_rows = N
        if self.group.k is not None:
            dead_U = np.flatnonzero(self._idle_F >= self._dead_after)
            if len(dead_U):
                loss += self._auxiliary(dead_U.astype(np.int32), num_codes, s)
                num_rows += s.num_aux
        by_feature = (s.starts_F, s.token_A, s.row_A, s.value_A, s.slope_A)
        codes = (s.starts_R, s.counts_R, s.features_A, s.values_A, s.slopes_A)
        kernels.transpose(num_rows, N, *codes, self._first_row_F, *by_feature)
        adam = self._adam(step)
        rows = (s.rounded_ND, s.rounded_G_RD) if self._bfloat16 else (s.x_ND, s.G_RD)
        gradients = (*rows, len(self._ends_P) * N, *by_feature)
        kernels.update(*gradients, *self._trained, *(self._idle_F, adam))  # pyright: ignore[reportCallIssue]
        kernels.update_bias(s.G_RD[:N], a["b_dec"], a["b_dec.m"], a["b_dec.v"], adam)
        self._after_step(step, num_codes, smallest, s)
        return loss, error, num_codes

    def _select(self, s: Workspace) -> tuple[int, float]:
        """Codes of the batch; how many there are, and the smallest that a batch-wide selection kept."""
        b_enc_F, N, k = self._a["b_enc"], len(s.x_ND), self.group.k
        if self.name == "topk":
            assert k is not None
            codes = (s.starts_R, s.counts_R, s.features_A, s.values_A)
            self._guess = np.float32(kernels.select_topk(s.pre_NF, b_enc_F, k, self._guess, *codes))
            return int(s.counts_R[:N].sum()), math.inf
        if k is None:
            return self._select_above(np.float32(0), s), math.inf
        wanted = N * k
        limit = self._guess if self._guess > 0 else _limit_of_sample(s.pre, b_enc_F, k)
        num = self._select_above(limit, s)
        while num < wanted and limit > 0:
            limit = limit * np.float32(0.7) if limit > 1e-3 else np.float32(0)
            num = self._select_above(limit, s)
        if num > wanted:
            codes = (s.starts_R, s.counts_R, N, s.features_A, s.values_A)
            smallest = kernels.keep_largest(num, wanted, *codes)
        else:
            smallest = s.values_A[:num].min() if num else math.inf
        self._guess = np.float32(smallest) * LOOSER if num else np.float32(0)
        return min(num, wanted), float(smallest)

    def _select_above(self, limit: np.float32, s: Workspace) -> int:
        """All above `limit`; the workspace grows if they do not fit."""
        select = (s.pre_NF, self._a["b_enc"], limit, s.starts_R, s.counts_R)
        num = kernels.select_above(*select, s.features_A[: s.room], s.values_A)
        if num > s.room:
            s.make_room(num)
            kernels.select_above(*select, s.features_A[: s.room], s.values_A)
        return num

    def _decode(self, step: int, num_codes: int, s: Workspace) -> tuple[float, float]:
        """Loss of the batch and its summed squared error; G and slopes are filled."""
        a, (N, D) = self._a, s.x_ND.shape
        codes = (s.starts_R[:N], s.counts_R[:N], s.features_A, s.values_A)
        P = len(self._ends_P)
        factor = np.float32(2 / (N * D * P))
        if P > 1:
            both = (G_RD[: P * N].reshape(-1, N, D) for G_RD in (s.G_RD, s.rounded_G_RD))
            nested = (a["W_dec"], a["b_dec"], self._ends_P, *codes, factor, s.error_ND, *both, s.slopes_A)
            error, total = kernels.decode_nested(s.x_ND, *nested)  # pyright: ignore[reportCallIssue]
            return total / (N * D * P), error
        error = kernels.decode(s.x_ND, a["W_dec"], a["b_dec"], *codes, factor, s.G_RD, s.rounded_G_RD, s.slopes_A)
        if self.group.k is not None:
            return error / (N * D), error
        strength = float(self.group.controller.penalty_L[0]) * min(1.0, self.course.progress(step) / WARM_UP) / (N * D)
        s.slopes_A[:num_codes] += np.float32(strength)
        return error / (N * D) + strength * float(s.values_A[:num_codes].sum()), error

    def _auxiliary(self, dead_U: np.ndarray, num_codes: int, s: Workspace) -> float:
        """AuxK on the first tokens: codes, G and slopes of its rows; what it adds to the loss."""
        a, (N, D), A, P = self._a, s.x_ND.shape, s.num_aux, len(self._ends_P)
        error_AD = s.aux_AD
        if P > 1:
            np.negative(s.error_ND[:A], out=error_AD)
        else:
            np.multiply(s.G_RD[:A], np.float32(-N * D / 2), out=error_AD)
        variance = max(float(np.square(error_AD - error_AD.mean(0)).sum()), 1e-12 * A * D)
        start = int(s.starts_R[N - 1]) + (self.group.k or 0) if self.name == "topk" else num_codes
        codes = (s.starts_R[N:], s.counts_R[N:], s.features_A, s.values_A)
        kernels.select_dead(s.pre_NF[:A], a["b_enc"], dead_U, min(D // 2, len(dead_U)), start, *codes)
        factor = np.float32(2 * AUX_WEIGHT / variance)
        G = (s.G_RD[P * N :], s.rounded_G_RD[P * N :])
        error = kernels.decode(error_AD, a["W_dec"], self._zero_D, *codes, factor, *G, s.slopes_A)
        return AUX_WEIGHT * error / variance

    def _adam(self, step: int) -> np.ndarray:
        """Rate and root with bias correction, betas, epsilon."""
        rate = (
            self.group.learning_rate
            * float(self.group.slowed_L[0])
            * self.course.rate(step)
            / (1 - BETAS[0] ** (step + 1))
        )
        return np.array([rate, 1 / math.sqrt(1 - BETAS[1] ** (step + 1)), *BETAS, EPSILON], np.float32)

    def _after_step(self, step: int, num_codes: int, smallest: float, s: Workspace) -> None:
        group, course, N = self.group, self.course, len(s.x_ND)
        trim_L = group.controller.trim(step, course.num_steps)
        if self.name in ("batch_topk", "matryoshka"):
            group.architecture.after_step_(group.stack, torch.tensor([smallest]), trim_L)
        if group.k is None:
            group.architecture.after_step_(group.stack, None, trim_L)
            group.controller.update_(torch.tensor([num_codes / N]), step, course.num_steps, course.rate(step))
        if is_due(step, course.num_steps, group.k) and (self._idle_F >= course.dead_after).any():
            x_ND = torch.from_numpy(s.x_ND)
            if len(self._ends_P) > 1:
                error_ND = torch.from_numpy(-s.error_ND)
            else:
                error_ND = torch.from_numpy(s.G_RD[:N]) * (-N * self.d_model / 2)
            resample_(group, x_ND[None], error_ND[None], step, course)
            self._rounded.copy_(self._W_enc[: len(self._rounded)])


def _as_array(x_CD: Tensor) -> np.ndarray:
    """The same memory as an array, bfloat16 as its bits."""
    return x_CD.view(torch.int16).numpy() if x_CD.dtype == torch.bfloat16 else x_CD.numpy()


def _limit_of_sample(pre: Tensor, b_enc_F: np.ndarray, k: int) -> np.float32:
    """Above which about k pre-activations of each of the first tokens lie."""
    some = (pre[:SAMPLE_ROWS].float() + torch.from_numpy(b_enc_F)).flatten()
    kth = some.numel() - min(SAMPLE_ROWS, len(pre)) * k + 1
    return np.float32(max(0.0, float(some.kthvalue(max(1, kth)).values))) * LOOSER


class CompiledTrainer:
    """Layers and twins of all groups that this file can train, beside each other on `num_threads` threads."""

    def __init__(self, groups: Sequence[Group], course: Course, num_threads: int) -> None:
        singles = [group.single(i) for group in groups for i in range(len(group.layers))]
        self._layers = [CompiledLayer(single, course) for single in singles]
        self._course = course
        num_own = sum(not single.twin for single in singles)
        # a thread's own products use what the others leave idle; twins do not count, since the last bits may depend on it
        self._inner_threads = max(1, num_threads // max(1, min(num_threads, num_own)))
        self._num_threads = max(1, min(num_threads // self._inner_threads, len(self._layers)))
        # numpy's products, in compiled loops, would start threads of their own
        self._libraries = ThreadpoolController()
        self._spaces: list[dict[tuple, Workspace]] = [{} for _ in range(self._num_threads)]

    def train(self, chunk: Chunk, first_step: int, num_steps: int, tick: Callable[[float], None]) -> None:
        """All layers through the chunk; `tick` hears, now and then, how many steps are done in the mean of the layers."""
        work = _Work(len(self._layers), num_steps)
        arrays = [_as_array(chunk.x_LCD[layer.group.columns[0]]) for layer in self._layers]
        order_C = chunk.order_C.numpy()

        def run(thread: int) -> None:
            torch.set_num_threads(self._inner_threads)  # of this thread alone
            while (task := work.take()) is not None:
                index, done, size = task
                layer = self._layers[index]
                if layer.shape not in self._spaces[thread]:
                    self._spaces[thread][layer.shape] = Workspace(*layer.shape)  # pyright: ignore[reportArgumentType]
                N = self._course.batch_tokens
                order = order_C[done * N : (done + size) * N]
                try:
                    layer.train(arrays[index], order, first_step + done, size, self._spaces[thread][layer.shape])
                except BaseException:
                    work.stop()
                    raise
                work.give_back(index)

        with self._libraries.limit(limits=1, user_api="blas"), ThreadPoolExecutor(self._num_threads) as pool:
            futures = [pool.submit(run, thread) for thread in range(self._num_threads)]
            try:
                while not work.wait(futures):
                    tick(work.mean_done())
            except BaseException:
                work.stop()
                raise
            for future in futures:
                future.result()


class _Work:
    """Which layer is how far; a thread takes the one furthest behind that nobody works on."""

    def __init__(self, num_layers: int, num_steps: int) -> None:
        self._done, self._free = [0] * num_layers, set(range(num_layers))
        self._num_steps, self._stopped = num_steps, False
        self._block = max(1, min(BLOCK_STEPS, num_steps // 4))
        self._lock = threading.Lock()

    def take(self) -> tuple[int, int, int] | None:
        """A layer, its steps done, and how many to do now; None when nothing is left for this thread."""
        with self._lock:
            waiting = [(self._done[i], i) for i in self._free if self._done[i] < self._num_steps]
            if self._stopped or not waiting:
                return None
            done, index = min(waiting)
            self._free.discard(index)
            return index, done, min(self._block, self._num_steps - done)

    def give_back(self, index: int) -> None:
        """The steps taken of this layer are done."""
        with self._lock:
            self._done[index] = min(self._num_steps, self._done[index] + self._block)
            self._free.add(index)

    def wait(self, futures: list[Future[None]], seconds: float = 0.2) -> bool:
        """True if all threads have ended; waits a little for that."""
        return not wait(futures, timeout=seconds).not_done

    def mean_done(self) -> float:
        """Steps done, in the mean of the layers."""
        return sum(self._done) / len(self._done)

    def stop(self) -> None:
        """Threads end after the block they are at."""
        self._stopped = True
