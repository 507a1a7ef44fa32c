"""Ranks: two and three real processes train as one does, from the text on, and stop together when one cannot go on."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from builders import CONTEXT, planted_layers, random_documents, tiny_model, word_pieces
from commands import forking
from throughline.dictionaries import Dictionary, auxk
from throughline.dictionaries.batch_topk import keep_largest
from throughline.errors import InputError, TrainingError
from throughline.harvesting import TextSource
from throughline.study import DictionarySpec, TrainingSpec
from throughline.tokens import TokenRows, pack
from throughline.training import Progress, chunks, compiled, engine, train
from throughline.training.checkpoints import Checkpoints
from throughline.training.chunks import Chunk, Cursor, read_chunks
from throughline.training.processes import Processes
from throughline.training.ranks import ALONE, Ranks
from throughline.training.sources import ArraySource

pytestmark = pytest.mark.xdist_group("ranks")  # what it sets up takes long

N, D, STEPS = 64, 16, 48
NAMES = ("topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated")
KEY, SECONDS = "a-key", 120
# Relative difference of a weight; 4e-7 is usual. A pre-activation within rounding of a limit may fall on either side of it, and
# everything after differs: in one layer at most.
SAME, NEARLY_SAME = 1e-5, 1e-2
Found = dict[int, Dictionary]


# ---- processes


def spread(num_ranks: int, folder: Path, work: Callable[..., Any], *given: Any) -> list[Any]:
    """What `work(ranks, *given)` returns, or raises, in each of so many processes."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        forking().Process(target=_take_part, args=(r, num_ranks, folder, work, given)) for r in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
    assert not late, "ranks wait for one another"
    assert [process.exitcode for process in processes] == [0] * num_ranks
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(num_ranks)]


def _take_part(rank: int, size: int, folder: Path, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    try:
        result = work(Processes(), *given)
    except Exception as error:
        result = error
    torch.save(result, folder / str(rank))
    dist.destroy_process_group()


@contextmanager
def small() -> Iterator[None]:
    """Three chunks, features that die soon, AuxK on a part of a batch that three do not divide; plain training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "MOST_TOKENS", 16 * N)
        patch.setattr(engine, "DEAD_AFTER_SHARE", 0.02)
        patch.setattr(engine, "DEAD_AFTER_BATCHES", 1)
        patch.setattr(auxk, "AUX_TOKENS", 40)
        patch.setattr(compiled, "ARCHITECTURES", ())
        yield


# ---- whole trainings

SPECS = {
    layer: DictionarySpec(architecture=name, d_sae=96, k=4, l1=0.3, target_l0=4.0 if name == "relu" else None)
    for layer, name in enumerate(name for name in NAMES for _ in range(2))
}


GATED = next(spec for spec in SPECS.values() if spec.architecture == "gated")


class Keeping(Checkpoints):
    """Saves after each chunk, and keeps a copy of every state."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "now", KEY, 0)
        self.folder = folder

    def save(self, step: int, cursor: Cursor, tensors: dict[str, Tensor]) -> None:
        super().save(step, cursor, tensors)
        shutil.copytree(self.folder / "now", self.folder / f"step_{step}")


def run(
    ranks: Ranks, checkpoints: Checkpoints | None = None, nan_at: int | None = None
) -> tuple[Found, list[Progress]]:
    x_LND = planted_layers(STEPS * N, len(SPECS), num_features=40, d_model=D)
    if nan_at is not None:
        x_LND[5, nan_at, 3] = torch.nan
    spec = TrainingSpec(tokens=STEPS * N, batch_tokens=N, precision="float32", lr=0.01)
    reports: list[Progress] = []
    with small():
        found = train(
            ArraySource(x_LND),
            SPECS,
            spec,
            model="planted",
            num_layers=len(SPECS),
            report=reports.append,
            checkpoints=checkpoints,
            ranks=ranks,
        ).own
    return found, reports


def run_keeping(ranks: Ranks, folder: Path) -> tuple[Found, list[Progress]]:
    """Rank 0 alone has a folder that can be written to."""
    return run(ranks, Keeping(folder / f"rank_{ranks.rank}"))


def run_again(ranks: Ranks, own: Path, of_one: Path) -> list[Found]:
    """From the beginning; from a checkpoint of as many ranks; from one of one process. Rank 0 alone has these."""
    folders = [None, *(folder if ranks.rank == 0 else folder / "nothing" for folder in (own, of_one))]
    return [run(ranks, folder and Checkpoints(folder, KEY, 1e9))[0] for folder in folders]


def weights(one: Dictionary) -> dict[str, Tensor]:
    return {name: getattr(one, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | one.extra


def nearly_same(found: Found, expected: Found) -> bool:
    """By the largest |a - b| / |b| of a weight of each layer."""
    apart = []
    for layer, one in found.items():
        pairs = [(x, weights(expected[layer])[name]) for name, x in weights(one).items()]
        apart.append(max(float((x - y).norm() / y.norm().clamp_min(1e-12)) for x, y in pairs))
    *most, last = sorted(apart)
    return max(most) < SAME and last < NEARLY_SAME


def identical(a: Found, b: Found) -> bool:
    return all(
        torch.equal(x, weights(b[layer])[name]) and one.metadata == b[layer].metadata
        for layer, one in a.items()
        for name, x in weights(one).items()
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Found, list[Progress], Path]:
    """One process's dictionaries, reports and checkpoints."""
    folder = tmp_path_factory.mktemp("alone")
    return *run_keeping(ALONE, folder), folder / "rank_0"


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow("ranks"))])
def together(request, tmp_path_factory) -> tuple[list[tuple[Found, list[Progress]]], Path]:
    """Of two processes and of three, who have shares of 22, 21 and 21 tokens; and the folder with their checkpoints."""
    folder = tmp_path_factory.mktemp("together")
    return spread(request.param, folder, run_keeping, folder), folder


@pytest.mark.parametrize("name", NAMES)
def test_ranks_train_the_dictionaries_of_one_process(alone, together, name):
    """AuxK, resampling, the controller of L0, selections across the batch and running thresholds are at work."""
    expected, reports, _ = alone
    layers = [layer for layer, spec in SPECS.items() if spec.architecture == name]
    if name in ("topk", "batch_topk", "matryoshka"):
        assert all(reports[-1].dead[layer] > 0 for layer in layers)
    (found, reported), *others = together[0]
    assert nearly_same({layer: found[layer] for layer in layers}, {layer: expected[layer] for layer in layers})
    for other, _ in others:
        assert identical({layer: other[layer] for layer in layers}, {layer: found[layer] for layer in layers})
    for measure in ("loss", "l0", "fvu", "dead"):
        values = ([getattr(r[-1], measure)[layer] for layer in layers] for r in (reported, reports))
        assert next(values) == pytest.approx(next(values), rel=1e-4), measure


def test_rank_0_alone_reports_and_saves(together):
    results, folder = together
    assert [len(reports) > 0 for _, reports in results] == [True] + [False] * (len(results) - 1)
    assert sorted(path.name for path in folder.glob("rank_*/step_*")) == ["step_16", "step_32"]
    assert [path.name for path in folder.glob("rank_*")] == ["rank_0"]


def test_training_goes_on_with_other_numbers_of_ranks(alone, together, tmp_path):
    """As many ranks to the same bits, from the beginning and from a checkpoint; one from two's or three's and the other way."""
    expected, _, of_one = alone
    results, folder = together
    first, own = results[0][0], folder / "rank_0" / "step_32"
    for again, resumed, from_one in spread(len(results), tmp_path, run_again, own, of_one / "step_16"):
        assert identical(again, first) and identical(resumed, first)
        assert nearly_same(from_one, expected)
    assert nearly_same(run(ALONE, Checkpoints(own, KEY, 1e9))[0], expected)


# ---- what can go wrong


def run_twins(ranks: Ranks) -> tuple[Found, Found, Found]:
    """Two layers alone, and with a twin each: both sets of dictionaries."""
    spec = TrainingSpec(tokens=STEPS * N, batch_tokens=N, precision="float32", lr=0.01)
    source, specs = ArraySource(planted_layers(STEPS * N, 2, num_features=40, d_model=D)), {0: SPECS[0], 1: GATED}
    found = []
    with small():
        for ceiling_seeds in (0, 1):
            training = spec.model_copy(update={"ceiling_seeds": ceiling_seeds})
            found.append(train(source, specs, training, model="planted", num_layers=2, ranks=ranks))
    return found[0].own, found[1].own, found[1].twins[0]


def test_ranks_train_twins(tmp_path):
    """Layers' own dictionaries as without, to the bit; the twins of one process."""
    (alone, own, twins), other = spread(2, tmp_path, run_twins)
    assert identical(own, alone)
    assert all(identical(a, b) for a, b in zip((alone, own, twins), other, strict=True))
    expected = run_twins(ALONE)[2]
    assert nearly_same(twins, expected) and not any(torch.equal(one.W_dec, own[n].W_dec) for n, one in twins.items())


def spoiled(ranks: Ranks) -> None:
    run(ranks, nan_at=40 * N)


def test_a_loss_that_is_no_number_stops_every_rank(tmp_path):
    """It is in one rank's share of one batch."""
    with pytest.raises(TrainingError, match="planted layer 5: its activations are not all finite") as one:
        spoiled(ALONE)
    for error in spread(2, tmp_path, spoiled):
        assert isinstance(error, TrainingError) and str(error) == str(one.value)


class Broken:
    """A source whose fourth batch cannot be made."""

    def every(self, step: int, start: int = 0) -> Iterator[Tensor]:
        for number in range(start, 10, step):
            if number == 3:
                raise InputError("the text is damaged")
            yield torch.full((1, 5, 2), float(number))

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        return self.every(1, start)


def read_broken(ranks: Ranks) -> None:
    for number, batch in enumerate(ranks.divide(Broken()).batches()):
        assert number < 2 and (batch == number).all()


def test_a_source_that_fails_on_one_rank_stops_all(tmp_path):
    zero, one = spread(2, tmp_path, read_broken)
    assert isinstance(one, InputError) and str(one) == "the text is damaged"
    assert isinstance(zero, TrainingError)
    assert str(zero) == "rank 1 of 2 could not make its activations: the text is damaged"


@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_more_ranks_than_tokens_are_refused(batch_tokens):
    many = Ranks()
    many.size = 300
    spec = TrainingSpec(tokens=8192, batch_tokens=batch_tokens)
    with pytest.raises(InputError, match=rf"planted: 300 devices for batches of {batch_tokens} tokens"):
        train(ArraySource(planted_layers(100)), SPECS, spec, model="planted", num_layers=2, ranks=many)


# ---- shares of a batch


def tied() -> Tensor:
    """Few different values, so that the limit of a selection lies among equal ones."""
    return torch.randint(-3, 6, (2, 10, 6), generator=torch.Generator().manual_seed(0)).float()


def select(ranks: Ranks, k: int) -> tuple[Tensor, Tensor]:
    share, mine = ranks.share_of(10), tied()[:, ranks.rank :: ranks.size]
    first = mine[:, : share.num_of_first(7)]
    return ranks.gather_batch(keep_largest(mine, k, share), 10), share.mean_of_first(first, 7, (1, 2))


@pytest.mark.parametrize("k", [2, 6])  # with six a rank has fewer values than are kept
def test_ranks_select_what_is_largest_in_the_whole_batch(tmp_path, k):
    expected, found = keep_largest(tied(), k), spread(3, tmp_path, select, k)
    for kept, mean in found:
        assert torch.equal(kept, found[0][0])
        assert torch.equal(kept.flatten(1).sort().values, expected.flatten(1).sort().values)
        assert torch.equal(kept[kept > 0], tied()[kept > 0])
        torch.testing.assert_close(mean, tied()[:, :7].mean((1, 2), keepdim=True))


# ---- activations


def rows() -> list[TokenRows]:
    """Batches of different sizes."""
    pieces, found = word_pieces(random_documents(50, 1)), []
    for first, size in zip(range(0, 50, 5), [5, 1, 3, 5, 2, 5, 4, 5, 1, 5], strict=True):
        found += list(pack(pieces[first : first + size], CONTEXT, 8))
    return found


def harvest(ranks: Ranks, cursor: Cursor) -> tuple[list[Chunk], int]:
    """Chunks of a text's activations from `cursor` on, and how often the model ran."""
    model, runs = tiny_model(), 0
    run_model = model.run

    def counted(*given: Any, **options: Any) -> Any:
        nonlocal runs
        runs += 1
        return run_model(*given, **options)

    with small(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "MOST_TOKENS", 100)
        patch.setattr(model, "run", counted)
        source = ranks.divide(TextSource(model, [0, 2], rows, num_tokens=250, epochs=2))
        found = [c._replace(x_LCD=c.x_LCD.clone()) for c in read_chunks(source, 16, 500, 3, 0, cursor)]
    return found, runs


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("resumed", [False, True])
def test_each_rank_runs_the_model_on_its_share_alone(tmp_path, num_ranks, resumed):
    """The chunks are those of one process, bit for bit, from a cursor within a batch too."""
    cursor = harvest(ALONE, Cursor())[0][1].following if resumed else Cursor()
    assert not resumed or (cursor.batch and cursor.used)
    expected, runs = harvest(ALONE, cursor)
    results = spread(num_ranks, tmp_path, harvest, cursor)
    assert sum(mine for _, mine in results) == runs
    assert max(mine for _, mine in results) == -(-runs // num_ranks)
    for found, _ in results:
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.x_LCD, b.x_LCD) and torch.equal(a.order_C, b.order_C) and a.following == b.following
