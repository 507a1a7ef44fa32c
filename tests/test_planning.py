"""The planner: costs against what is allocated, placements against what no placement can beat, and what a run has already."""

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from throughline import api
from throughline.cli import render
from throughline.errors import InputError
from throughline.models import open_model
from throughline.planning import blocks, costs
from throughline.planning.blocks import Block, Costs, Device, bound_below, find_misfit, work_of
from throughline.planning.calibration import find_devices
from throughline.planning.devices import CARDS, GIB, parse_devices
from throughline.planning.placing import place
from throughline.planning.shapes import measure_shape
from throughline.planning.studies import plan_study
from throughline.records import Plan
from throughline.study import ModelSpec, Study, load_study, parse_study
from throughline.training import memory
from throughline.training.compiled import Workspace, workspace_bytes

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = ROOT / "examples" / "seed98-offline.yaml"
STUDY: dict[str, Any] = {
    "name": "planned",
    "models": ["zoo/pythia", {"path": "zoo/gpt2", "layers": [0, 2]}],
    "data": {"path": "zoo/arithmetic", "context": 64},
    "dictionary": {"d_sae": 64, "k": 8},
    "training": {"tokens": 6000, "batch_tokens": 64},
}


@pytest.fixture(scope="module")
def seed98() -> Study:
    return load_study(OFFLINE)


# ---- placing


@st.composite
def problems(draw: Any) -> tuple[dict[str, dict[str, Costs]], list[Device]]:
    """A few models on devices of two kinds, the second of which is slower and may be smaller; every layer fits somewhere."""
    slower = draw(st.floats(1, 4))
    models = {}
    for number in range(draw(st.integers(1, 4))):
        layers = sorted(draw(st.sets(st.integers(0, 30), min_size=1, max_size=14)))
        train = [draw(st.floats(0.5, 20)) for _ in layers]
        forward = [0.05 * (layer + 1) for layer in layers]
        size = draw(st.integers(1, 10))
        sizes = [size + draw(st.integers(0, 3)) for _ in layers]
        fixed, start = draw(st.integers(0, 10)), draw(st.floats(0, 3))
        epochs = draw(st.integers(1, 5))
        cache = draw(st.sampled_from([None, [0.1 * epochs] * len(layers)]))
        models[f"m{number}"] = {
            kind: Costs(layers, [t * x for t in train], [t * x for t in forward], sizes, fixed, start, epochs, cache)
            for kind, x in (("fast", 1.0), ("slow", slower))
        }
    small = draw(st.sampled_from([28, 40, 1000]))
    devices = [Device("fast", draw(st.sampled_from([28, 60, 1000])))] * draw(st.integers(1, 6))
    return models, [*devices, *[Device("slow", small)] * draw(st.integers(0, 4))]


@settings(max_examples=150, deadline=None)
@given(problems())
def test_placements(problem):
    """Every layer once, in consecutive blocks that fit; devices do one block at a time; never sooner than the bound."""
    models, devices = problem
    assert find_misfit(models, devices) is None
    found = place(models, devices)
    for name, on in models.items():
        mine = sorted(block for block in found.blocks if block.model == name)
        assert [i for block in mine for i in range(block.first, block.stop)] == list(range(len(on["fast"].layers)))
    for block in found.blocks:
        kind, room = devices[block.device]
        chosen = models[block.model][kind]
        assert chosen.fits(block.first, block.stop, room) and chosen.bytes(block.first, block.stop) <= room
        assert block.seconds == pytest.approx(chosen.seconds(block.first, block.stop))
    for device in range(len(devices)):
        mine = sorted((block for block in found.blocks if block.device == device), key=lambda block: block.start)
        assert all(a.start + a.seconds <= b.start * (1 + 1e-9) + 1e-9 for a, b in pairwise(mine))
    assert [b.start for b in found.blocks] == sorted(b.start for b in found.blocks)
    assert found.makespan == pytest.approx(max(block.start + block.seconds for block in found.blocks))
    assert found.makespan >= found.lower_bound * (1 - 1e-9)
    assert found.lower_bound == bound_below(models, devices)


def even(num_layers: int, seconds: float = 1.0, **changes: Any) -> Costs:
    rows = {
        "layers": range(num_layers),
        "train_seconds": [seconds] * num_layers,
        "forward_seconds": [0.0] * num_layers,
        "layer_bytes": [1] * num_layers,
        "fixed_bytes": 0,
        "start_seconds": 0.0,
    }
    return Costs(**(rows | changes))


def test_what_divides_evenly_is_divided_evenly():
    found = place({"a": {"x": even(12)}, "b": {"x": even(4, 3.0)}}, [Device("x", 100)] * 4)
    assert found.makespan == found.lower_bound == 6.0


def test_the_longest_layer_bounds_from_below():
    found = place({"a": {"x": even(3, 7.0)}}, [Device("x", 100)] * 50)
    assert found.makespan == found.lower_bound == 7.0


def test_speed_counts():
    """A device of half the speed gets half the layers."""
    models = {"a": {"x": even(30), "y": even(30, 2.0)}}
    found = place(models, [Device("x", 100), Device("y", 100)])
    assert found.makespan == found.lower_bound == 20.0


def test_a_block_pays_for_the_blocks_below_it_and_keeps_activations_where_that_is_cheaper():
    deep = even(4, forward_seconds=[1.0, 2.0, 3.0, 4.0], start_seconds=5.0, epochs=10, cache_seconds=[2.0] * 4)
    assert deep.seconds(0, 1) == 5 + 1 + 2 + 1  # start, forward once, cache, training
    assert deep.seconds(3, 4) == 5 + 4 + 2 + 1
    never = even(4, forward_seconds=[1.0, 2.0, 3.0, 4.0], epochs=10)
    assert never.seconds(3, 4) == 40 + 1 and not never.is_cached(3, 4)
    dear = even(2, forward_seconds=[1.0, 1.0], epochs=3, cache_seconds=[9.0] * 2)
    assert not dear.is_cached(0, 2) and dear.seconds(0, 2) == 3 + 2
    always = even(2, forward_seconds=[1.0, 1.0], epochs=3, cache_seconds=[9.0] * 2, always_cached=True)
    assert always.is_cached(0, 2) and always.seconds(0, 2) == 1 + 18 + 2


def test_models_that_are_done_cost_nothing():
    models = {"a": {"x": even(0)}, "b": {"x": even(2)}}
    assert {block.model for block in place(models, [Device("x", 9)]).blocks} == {"b"}
    assert place({"a": {"x": even(0)}}, [Device("x", 9)]).blocks == [] and work_of(models, "x") == 2.0


def test_ten_thousand_dictionaries_on_256_devices(seed98):
    """102 times the 98; the seconds that this takes are measured in benchmarks/scale.py."""
    made = plan_study(seed98, parse_devices("1x80GiB,1x24GiB"))
    assert len(made.jobs) > 1
    models = {
        f"{n} {i}": {"x": even(c, s)} for i in range(102) for n, c, s in (("a", 24, 1), ("b", 42, 4), ("c", 32, 6))
    }
    found = place(models, [Device("x", 1000)] * 256)
    assert found.makespan <= 1.1 * found.lower_bound
    assert sum(block.stop - block.first for block in found.blocks) == 102 * 98


def test_placing_needs_no_torch():
    # a fresh interpreter: what it imports is the point
    code = "import sys, throughline.planning.placing; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- the 98 dictionaries


@pytest.mark.parametrize(
    "devices",
    [*(f"{n}x{size}" for n in (1, 3, 8, 16) for size in ("24GiB", "48GiB")), "3x48GiB,1x24GiB", "2x80GiB,4x24GiB"],
)
def test_seed98_is_placed_well(seed98, devices):
    made = plan_study(seed98, parse_devices(devices))
    assert made.lower_bound_seconds <= made.makespan_seconds <= 1.10 * made.lower_bound_seconds
    assert sum(len(job.layers) for job in made.jobs) == 98
    memory_of = {device.name: device.memory_bytes for device in made.devices}
    assert all(job.total_bytes <= memory_of[job.device] for job in made.jobs)
    assert [job.start_second for job in made.jobs] == sorted(job.start_second for job in made.jobs)
    assert all(sum(job.bytes.values()) == job.total_bytes for job in made.jobs)
    assert Plan.model_validate_json(made.model_dump_json()) == made


def test_what_fits_nowhere_is_refused_with_what_would_fit(seed98):
    with pytest.raises(InputError) as refused:
        plan_study(seed98, parse_devices("4x8GiB"))
    said = str(refused.value)
    assert said.startswith("phi-2 (random weights) layer 0 needs ") and "\n" not in said
    size = float(said.split("a device of ")[1].split(" GiB")[0])
    assert size > 8
    assert plan_study(seed98, parse_devices(f"1x{size}GiB")).jobs
    with pytest.raises(InputError):
        plan_study(seed98, parse_devices(f"1x{size - 0.2:.1f}GiB"))
    expansion = float(said.split("dictionary.expansion ")[1].split(" ")[0])
    smaller, larger = (load_study(OFFLINE, [f"dictionary.expansion={e}"]) for e in (expansion, expansion + 0.1))
    assert plan_study(smaller, parse_devices("4x8GiB")).jobs
    with pytest.raises(InputError):
        plan_study(larger, parse_devices("4x8GiB"))


def test_a_batch_that_is_too_large_is_refused_with_one_that_fits():
    tree = STUDY | {"training": {"tokens": 10**7, "batch_tokens": 2**20}, "dictionary": {"expansion": 8, "k": 8}}
    with pytest.raises(InputError, match=r"or training.batch_tokens \d+ would do") as refused:
        plan_study(parse_study(tree), parse_devices("1x2GiB"))
    batch = int(str(refused.value).split("batch_tokens ")[1].split(" ")[0])
    fitting = tree | {"training": {"tokens": 10**7, "batch_tokens": batch}}
    assert plan_study(parse_study(fitting), parse_devices("1x2GiB")).jobs


# ---- costs


def test_a_shape_is_that_of_the_open_model():
    spec = ModelSpec(path="zoo/phi")
    shape, model = measure_shape(spec), open_model(spec)
    block = model.structure.blocks[0]
    linear = sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))  # type: ignore[operator]
    assert (shape.num_layers, shape.d_model, shape.context) == (model.num_layers, model.d_model, model.context)
    assert shape.parameters == sum(p.numel() for p in model.hf.parameters())
    assert shape.matrices == (linear,) * model.num_layers
    assert shape.forward_flops(1, 10, 7) == 10 * (2 * 2 * linear + 2 * 4 * 7 * model.d_model)


def test_a_workspace_is_what_it_takes():
    N, D, F, k = 96, 32, 256, 8
    space = Workspace(N, D, F, 2 * N * k, 1, True)
    arrays = [value for name, value in vars(space).items() if hasattr(value, "nbytes") and name not in ("x", "pre")]
    assert workspace_bytes(N, D, F, k) == pytest.approx(sum(array.nbytes for array in arrays), rel=0.05)


def test_memory_shares_are_one_number():
    assert blocks.MEMORY_SHARE == memory.USABLE_SHARE


def test_costs_follow_the_study():
    """More epochs, more features and a deeper layer cost more; activations of several epochs are kept if the study says so."""

    def job(devices: str = "1x24GiB", **changes: Any) -> Any:
        tree = STUDY | {"models": [{"path": "zoo/pythia", "layers": [5]}]}
        for section, values in changes.items():
            tree = tree | {section: tree[section] | values}
        return plan_study(parse_study(tree), parse_devices(devices)).jobs[0]

    once = job()
    assert once.bytes["parameters"] == 4 * (2 * 96 * 64 + 96 + 64) == once.disk_bytes["dictionaries"]
    assert once.bytes["optimizer"] == 2 * once.bytes["parameters"] and not once.cached
    assert job(training={"epochs": 3}).flops == pytest.approx(3 * once.flops, rel=0.02)
    assert job(dictionary={"d_sae": 128}).bytes["parameters"] == pytest.approx(2 * once.bytes["parameters"], rel=0.01)
    kept = job(training={"epochs": 3, "activation_cache": "on"})
    assert kept.cached and kept.disk_bytes["activations"] == 6000 * 96 * 4
    assert not job(training={"epochs": 3, "activation_cache": "off"}).cached
    assert job("1x24GiB@cpu").flops < once.flops  # gradients stay sparse there


@pytest.mark.parametrize("devices", ["1x24GiB", "1x24GiB@cpu"])
def test_twins_are_counted(devices):
    """Weights, moments, files and the time of training three times; the activations and the forward pass once."""
    own, three = (
        plan_study(parse_study(STUDY | {"training": STUDY["training"] | {"ceiling_seeds": n}}), parse_devices(devices))
        for n in (0, 2)
    )
    assert any("each of 3 dictionaries of a layer (training.ceiling_seeds) takes" in line for line in three.assumptions)
    jobs = [sorted(made.jobs, key=lambda job: job.model) for made in (own, three)]
    for one, other in zip(*jobs, strict=True):
        assert (one.model, one.layers) == (other.model, other.layers)
        assert all(other.bytes[name] == 3 * one.bytes[name] for name in ("parameters", "optimizer"))
        assert all(other.bytes[name] == one.bytes[name] for name in ("base", "model", "forward", "activations"))
        assert one.bytes["buffers"] < other.bytes["buffers"] < 3 * one.bytes["buffers"]
        assert all(other.disk_bytes[name] == 3 * one.disk_bytes[name] for name in ("dictionaries", "checkpoint"))
        assert one.flops < other.flops < 3 * one.flops and one.seconds < other.seconds < 3 * one.seconds


def test_twins_that_do_not_fit_are_refused_with_how_many_would():
    tree = STUDY | {
        "dictionary": {"d_sae": 2**20, "k": 8},
        "training": {"tokens": 6000, "batch_tokens": 64, "ceiling_seeds": 3},
    }
    with pytest.raises(InputError, match=r"or training.ceiling_seeds 1 would do") as refused:
        plan_study(parse_study(tree), parse_devices("1x18GiB@cpu"))
    assert "\n" not in str(refused.value)
    tree["training"]["ceiling_seeds"] = 1
    assert plan_study(parse_study(tree), parse_devices("1x18GiB@cpu")).jobs


def test_a_text_that_ends_is_counted(tmp_path):
    (tmp_path / "short.txt").write_text("\n\n".join(f"What is {i} + {i}? It is {2 * i}." for i in range(200)))
    tree = STUDY | {"data": {"path": str(tmp_path / "short.txt"), "context": 64}}
    made = plan_study(parse_study(tree), parse_devices("1x24GiB"))
    assert 500 < made.models[0].tokens < 6000
    with pytest.raises(InputError, match=r"data.path none.txt does not exist"):
        plan_study(parse_study(STUDY | {"data": {"path": "none.txt"}}), parse_devices("1x24GiB"))


# ---- devices


def test_devices_are_parsed():
    made = parse_devices("3x48GiB, 1x24GiB@l4,80gib@h100,8GB@cpu")
    assert [d.kind for d in made] == ["48GiB@a6000"] * 3 + ["24GiB@l4", "80gib@h100", "8GB@cpu"]
    assert len({d.name for d in made}) == 6 and [d.on_cpu for d in made] == [False] * 5 + [True]
    assert made[0].memory_bytes == 48 * GIB and made[-1].memory_bytes == 8_000_000_000
    assert made[4].flops_per_second == 0.5 * 1e12 * CARDS["h100"].bfloat16 and not made[4].measured  # type: ignore[operator]
    assert parse_devices("1000GiB")[0].kind == "1000GiB@b200"


@pytest.mark.parametrize("text", ["3x48", "x48GiB", "0x48GiB", "3x0GiB", "", "3x48GiB,", "48 GiB 3", "-1x48GiB"])
def test_wrong_devices(text):
    with pytest.raises(InputError, match=r"--devices: expected COUNTxMEMORYGiB\[@CARD\], .* found '"):
        parse_devices(text)


def test_an_unknown_card_is_named_with_the_nearest():
    with pytest.raises(InputError, match="card 'h10' is unknown; did you mean 'h100'"):
        parse_devices("2x80GiB@h10")


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.setattr("throughline.planning.calibration.MEASURED_SECONDS", 0.01)
    [here] = [d for d in find_devices("float32") if d.on_cpu] or [None]
    if here is None:
        pytest.skip("this machine has a GPU, which stands for it")
    assert here.measured and not here.bfloat16 and here.memory_bytes > 0
    assert here.flops_per_second > 1e8 and here.bytes_per_second > 1e7


# ---- what is done already


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
    """A run of STUDY in which layers 1 and 2 of one model are trained, and its study file."""
    folder = tmp_path_factory.mktemp("planned")
    tree = STUDY | {
        "models": [{"path": "zoo/pythia", "layers": [1, 2]}],
        "training": {"tokens": 640, "batch_tokens": 64},
    }
    shutil.copytree(trained(tree), folder / "run")
    (folder / "study.yaml").write_text(yaml.safe_dump(tree | {"models": ["zoo/pythia", "zoo/gpt2"]}))
    return folder


def test_layers_that_are_done_are_skipped_and_others_are_told(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    made = api.plan(run / "study.yaml", "1x24GiB", out=run / "run")
    pythia, gpt2 = made.models
    assert (pythia.pending, pythia.done, pythia.invalidated) == ([0, 3, 4, 5], [1, 2], [])
    assert (gpt2.pending, gpt2.done) == ([0, 1, 2, 3], [])
    assert sorted(layer for job in made.jobs if job.model == "zoo/pythia" for layer in job.layers) == [0, 3, 4, 5]
    changed = api.plan(run / "study.yaml", "1x24GiB", ["dictionary.per_layer={2: {k: 4}}"], run / "run")
    assert (changed.models[0].done, changed.models[0].invalidated) == ([1], [2])
    same = api.plan(run / "study.yaml", "1x24GiB", ["training.checkpoint_minutes=1"], run / "run")
    assert same.models[0].done == [1, 2]
    nothing = api.plan(run / "study.yaml", "1x24GiB", ["models=[{path: zoo/pythia, layers: [1, 2]}]"], run / "run")
    assert nothing.jobs == [] and nothing.makespan_seconds == 0
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


# ---- what is printed


def test_a_plan_is_printed(run, capsys):
    render.plan(api.plan(run / "study.yaml", "2x24GiB", out=run / "run"))
    said = capsys.readouterr().out
    assert "layers 1-2 are done and skipped" in said and "assumed" in said and " GiB" in said
    assert "0, 3-5" in said or "3-5" in said
    render.plan(api.plan(run / "study.yaml", "2x24GiB", ["models=[{path: zoo/pythia, layers: [1]}]"], run / "run"))
    assert "nothing to train" in capsys.readouterr().out


def test_many_jobs_are_a_line_for_each_device(seed98, capsys):
    render.plan(plan_study(seed98, parse_devices("64x24GiB")))
    said = capsys.readouterr().out
    assert len([line for line in said.splitlines() if line.startswith("a10-")]) == 64
    assert "phi-2 (random weights)" in said


def test_blocks_are_ordered_by_model_and_layer():
    assert Block("a", 0, 2, 1, 0.0, 1.0) < Block("a", 2, 3, 0, 0.0, 1.0) < Block("b", 0, 1, 0, 0.0, 1.0)


def test_a_cpu_of_half_the_threads_holds_less():
    one, two = (
        costs.count_costs(
            costs.Setting(
                parse_study(STUDY), ModelSpec(path="zoo/phi"), measure_shape(ModelSpec(path="zoo/phi")), device, 6000
            ),
            [0, 1],
        )
        for device in (d.model_copy(update={"threads": n}) for d in parse_devices("8GiB@cpu") for n in (1, 2))
    )
    assert one.costs.bytes(0, 2) < two.costs.bytes(0, 2)
