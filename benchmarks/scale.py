"""The planner, and the scheduler that follows its plans, on more devices than we have: simulated, not run; prints a table.

    python benchmarks/scale.py [--write]

The study is `examples/seed98-offline.yaml`, 98 dictionaries, as often as the row says (each copy is models of its own). Costs are
the planner's; devices have the assumed rates of planning/devices.py. The scheduler takes jobs in the plan's order: a device that
is free takes the first waiting job that fits into its memory, or the first that was planned for a device of its kind. What the
planner does not know:

    stragglers  a share of the devices, drawn at random, works at half speed
    failures    each device fails after a time drawn from an exponential distribution, and is back after a minute; its job waits
                at the head of the queue and goes on from its last checkpoint; these are 5 minutes apart
"""

import argparse
import heapq
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pages import SCALE, write_between

from throughline.planning.blocks import Block, Costs, Device
from throughline.planning.costs import Setting, count_costs
from throughline.planning.devices import parse_devices
from throughline.planning.placing import Placement, place
from throughline.planning.studies import count_models
from throughline.records import PlannedDevice
from throughline.study import load_study

ROOT = Path(__file__).parents[1]
SEEDS = range(5)
REPAIR_SECONDS = 60.0
Models = dict[str, dict[str, Costs]]


class World(NamedTuple):
    """How the scheduler chooses, and what happens that the plan does not know of."""

    name: str
    by_kind: bool = True  # a device takes only jobs that were planned for one of its kind
    stragglers: float = 0.0  # share of devices at half speed
    mean_seconds_to_failure: float | None = None  # of one device


class Outcome(NamedTuple):
    """Of one simulation: when the last job ended, and seconds of devices spent, of those spent twice."""

    makespan: float
    busy: float
    lost: float


WORLDS = (
    World("any device", by_kind=False),
    World("own kind"),
    World("a tenth straggles", stragglers=0.1),
    World("a failure a device and hour", mean_seconds_to_failure=3600),
    World("both", stragglers=0.1, mean_seconds_to_failure=3600),
)


def cost_models(copies: int, devices: list[PlannedDevice]) -> tuple[Models, float]:
    """Costs of the study's models, `copies` times, and the minutes between its checkpoints."""
    study = load_study(ROOT / "examples" / "seed98-offline.yaml")
    kinds = {device.kind: device for device in devices}
    counted = {
        model.shape.name: {
            kind: count_costs(
                Setting(study, study.model(model.shape.name), model.shape, device, model.tokens), model.layers.pending
            ).costs
            for kind, device in kinds.items()
        }
        for model in count_models(study, {})
    }
    return {f"{name} {i}": on for i in range(copies) for name, on in counted.items()}, study.training.checkpoint_minutes


def simulate(
    models: Models, devices: list[Device], placement: Placement, world: World, seed: int, checkpoint_seconds: float
) -> Outcome:
    """The scheduler in a world."""
    draw = random.Random(seed)
    slow = set(draw.sample(range(len(devices)), round(world.stragglers * len(devices))))
    fails_at = [_next_failure(draw, world, 0.0) for _ in devices]
    waiting, trained = list(placement.blocks), dict.fromkeys(placement.blocks, 0.0)  # seconds that a checkpoint has
    free = [(0.0, d) for d in range(len(devices))]  # when, and which
    idle: list[int] = []
    makespan = busy = lost = 0.0
    while waiting:
        now, device = heapq.heappop(free)
        index = next((i for i, block in enumerate(waiting) if _takes(models, devices, device, block, world)), None)
        if index is None:
            idle.append(device)
            continue
        block = waiting.pop(index)
        costs, speed = models[block.model][devices[device].kind], 0.5 if device in slow else 1.0
        start, whole = costs.start_seconds / speed, costs.seconds(block.first, block.stop) / speed
        end = now + whole - trained[block]
        if fails_at[device] < end:
            failed = max(fails_at[device], now)
            gained = max(0.0, failed - now - start) // checkpoint_seconds * checkpoint_seconds
            trained[block] += gained
            busy, lost = busy + failed - now, lost + failed - now - gained
            waiting.insert(0, block)
            end = failed + REPAIR_SECONDS
            fails_at[device] = _next_failure(draw, world, end)
            for other in idle:  # the job that is back may be for them
                heapq.heappush(free, (failed, other))
            idle.clear()
        else:
            busy, makespan = busy + end - now, max(makespan, end)
        heapq.heappush(free, (end, device))
    return Outcome(makespan, busy, lost)


def _takes(models: Models, devices: list[Device], device: int, block: Block, world: World) -> bool:
    kind, memory = devices[device]
    right = not world.by_kind or devices[block.device].kind == kind
    return right and models[block.model][kind].fits(block.first, block.stop, memory)


def _next_failure(draw: random.Random, world: World, now: float) -> float:
    mean = world.mean_seconds_to_failure
    return float("inf") if mean is None else now + draw.expovariate(1 / mean)


def rows() -> Iterator[str]:
    """Lines of the table, each as soon as it is known."""
    yield (
        "| dictionaries | devices | planner, s | plan / lower bound | jobs | "
        + " | ".join(w.name for w in WORLDS)
        + " |"
    )
    yield "|---" * (5 + len(WORLDS)) + "|"
    cases = [(1, f"{n}x48GiB") for n in (1, 3, 8, 16, 64)]
    cases += [(1, "3x48GiB,1x24GiB"), (1, "2x80GiB,4x24GiB"), (11, "64x48GiB"), (11, "32x80GiB@h100,64x24GiB@l4")]
    cases += [
        (102, "256x48GiB"),
        (102, "64x80GiB@h100,192x24GiB"),
        (102, "1024x48GiB"),
        (102, "256x80GiB@h100,768x24GiB"),
    ]
    for copies, text in cases:
        named = parse_devices(text)
        models, minutes = cost_models(copies, named)
        devices = [Device(d.kind, d.memory_bytes) for d in named]
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            placement = place(models, devices)
            seconds.append(time.perf_counter() - started)
        cells = [_describe(models, devices, placement, world, 60 * minutes) for world in WORLDS]
        ratio = placement.makespan / placement.lower_bound
        yield (
            f"| {98 * copies:,} | {text} | {statistics.median(seconds):.2f} | {ratio:.3f} | {len(placement.blocks):,} | "
            + " | ".join(cells)
            + " |"
        )


def _describe(models: Models, devices: list[Device], placement: Placement, world: World, checkpoint: float) -> str:
    """Median over seeds of makespan over the lower bound, and of the share of work done twice."""
    random_ = world.stragglers or world.mean_seconds_to_failure
    found = [simulate(models, devices, placement, world, seed, checkpoint) for seed in (SEEDS if random_ else [0])]
    ratio = statistics.median(o.makespan / placement.lower_bound for o in found)
    lost = statistics.median(o.lost / o.busy for o in found)
    return f"{ratio:.3f}" + (f", {lost:.1%} twice" if world.mean_seconds_to_failure else "")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put the table into docs/scale.md")
    options = parser.parse_args()
    lines = []
    for line in rows():
        print(line, flush=True)
        lines.append(line)
    if options.write:
        write_between(SCALE, "scale", [*EXPLAINED, "", *lines], "The planner and the scheduler, simulated")


EXPLAINED = """`python benchmarks/scale.py --write`: simulated devices, costs as the planner counts them; nothing here was run on
such machines. The columns from `any device` on are the makespan over the lower bound when the scheduler follows the plan's order.
`any device`: one that is free takes the first waiting job that fits into its memory. `own kind`, and all that follow: the first
that was planned for a device of its kind. Then a tenth of the devices (of less than 6, none) at half speed; failures
(exponential, an hour on average for each device, back after a minute, jobs go on from their last checkpoint, 5 minutes apart);
both. Medians of seeds 0 to 4; planner: median of 3, in seconds, on one core. The lower bound knows of no stragglers and no
failures. `twice` is the share of the devices' time that went into work that was lost and done again.
""".splitlines()


if __name__ == "__main__":
    main()
