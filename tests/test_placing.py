"""Which blocks a cluster's devices are given: without a cluster."""

import pytest

from throughline.errors import InputError
from throughline.executors.placing import Node, Wanted, place_jobs, size_of_teams, teams, wanted_of
from throughline.jobs import Job
from throughline.planning.devices import parse_devices
from throughline.run_dir import RunDir
from throughline.session import Session
from throughline.study import ExecutorSpec, parse_study

GIB = 2**30
BOX = Node("a", 32, 4, 200 * GIB, "H100")
OLD = Node("b", 16, 2, 100 * GIB, "T4")
HEAD = Node("c", 0, 0, 10 * GIB)
PLAIN = Node("d", 8, 0, 64 * GIB)


def executor(**given) -> ExecutorSpec:
    return ExecutorSpec(kind="ray", **given)


@pytest.mark.parametrize(
    ("given", "nodes", "wanted"),
    [
        ({}, [HEAD, PLAIN], Wanted(1, 0)),
        ({"cpus": 4}, [HEAD, PLAIN], Wanted(4, 0)),
        ({}, [BOX, PLAIN], Wanted(1, 1)),
        ({"gpus": 0.5}, [BOX], Wanted(1, 0.5)),
        ({"gpus": 0}, [BOX], Wanted(1, 0)),
    ],
)
def test_what_jobs_ask_for(given, nodes, wanted):
    assert wanted_of(executor(**given), nodes) == wanted


@pytest.mark.parametrize(("given", "nodes"), [({"cpus": 9}, [HEAD, PLAIN]), ({"gpus": 1}, [PLAIN]), ({}, [HEAD])])
def test_what_no_node_has_is_refused(given, nodes):
    with pytest.raises(InputError, match=r"no node has them; the largest of \d has"):
        wanted_of(executor(**given), nodes)


@pytest.mark.parametrize(
    ("wanted", "node", "slots"),
    [
        (Wanted(1, 0), PLAIN, 8),
        (Wanted(3, 0), PLAIN, 2),
        (Wanted(1, 1), BOX, 4),
        (Wanted(1, 0.5), BOX, 8),
        (Wanted(16, 1), BOX, 2),
        (Wanted(1, 1), PLAIN, 0),
    ],
)
def test_how_many_fit_on_a_node(wanted, node, slots):
    assert wanted.slots(node) == slots


@pytest.mark.parametrize(
    ("given", "wanted", "num_layers", "size"),
    [
        ({}, Wanted(1, 1), 98, 1),
        ({}, Wanted(1, 1), 6, 1),
        ({}, Wanted(1, 1), 3, 2),  # six GPUs
        ({}, Wanted(1, 1), 1, 6),
        ({}, Wanted(1, 0), 1, 1),  # cores are left alone
        ({"devices": 2}, Wanted(1, 0), 98, 2),
        ({}, Wanted(1, 0.5), 1, 1),  # two processes on one GPU gain nothing
    ],
)
def test_gpus_that_outnumber_the_layers_share_a_block(given, wanted, num_layers, size):
    assert size_of_teams(executor(**given), wanted, [BOX, OLD], num_layers) == size


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(InputError, match=r"executor\.devices is 7, but there are 6"):
        size_of_teams(executor(devices=7), Wanted(1, 1), [BOX, OLD], 98)


def test_nodes_become_devices_of_their_kind():
    fast, slow = parse_devices("80GiB@h100,16GiB@t4")
    found = teams([BOX, OLD, BOX._replace(id="e"), HEAD], Wanted(1, 1), 1, {BOX.kind: fast, OLD.kind: slow})
    assert [device.kind for device in found] == [BOX.kind] * 8 + [OLD.kind] * 2
    assert len({device.name for device in found}) == 10
    assert [device.memory_bytes for device in found] == [80 * GIB] * 8 + [16 * GIB] * 2
    assert found[0].flops_per_second == fast.flops_per_second
    pairs = teams([BOX, OLD], Wanted(1, 1), 2, {BOX.kind: fast, OLD.kind: slow})
    assert [device.kind for device in pairs] == [BOX.kind] * 2 + [OLD.kind]


def test_cores_divide_the_memory_of_their_node_and_nodes_nearly_alike_are_alike():
    (rates,) = parse_devices("64GiB@cpu")
    found = teams([PLAIN], Wanted(2, 0), 1, {PLAIN.kind: rates})
    assert [device.memory_bytes for device in found] == [16 * GIB] * 4
    smaller, larger = PLAIN._replace(memory_bytes=60 * GIB), PLAIN._replace(memory_bytes=256 * GIB)
    assert PLAIN.kind == smaller.kind == "8 cpus, about 64 GiB" != larger.kind
    found = teams([PLAIN, smaller], Wanted(2, 0), 1, {PLAIN.kind: rates})
    assert [device.memory_bytes for device in found] == [15 * GIB] * 8


@pytest.fixture
def session(tmp_path) -> Session:
    study = parse_study(
        {
            "name": "placed",
            "models": ["zoo/gpt2", "zoo/pythia"],
            "data": {"path": "zoo/arithmetic", "context": 64},
            "dictionary": {"expansion": 2, "k": 8},
            "training": {"tokens": 20_000, "batch_tokens": 256},
        }
    )
    return Session(RunDir.create(tmp_path / "run", study))


def test_every_pending_layer_is_placed_once_and_begun_blocks_stay(session):
    begun = session.run.checkpoint_folder("zoo/pythia", [1, 2])
    begun.mkdir(parents=True)
    pending = [Job("zoo/gpt2", [0, 3]), Job("zoo/pythia", [0, 1, 2, 5])]
    devices = [d.model_copy(update={"kind": PLAIN.kind}) for d in parse_devices("3x8GiB@cpu")]
    placed = place_jobs(session, pending, devices, {PLAIN.kind: None})
    assert placed[0].job == Job("zoo/pythia", [1, 2])
    assert placed[0].memory_bytes is None
    found = sorted((p.job.model, layer) for p in placed for layer in p.job.layers)
    assert found == sorted((job.model, layer) for job in pending for layer in job.layers)
    assert all(p.memory_bytes and p.card is None for p in placed[1:])


def test_all_that_is_left_was_begun(session):
    session.run.checkpoint_folder("zoo/pythia", [1, 2]).mkdir(parents=True)
    devices = parse_devices("8GiB@cpu")
    placed = place_jobs(session, [Job("zoo/pythia", [1, 2])], devices, {devices[0].kind: None})
    assert [p.job for p in placed] == [Job("zoo/pythia", [1, 2])]


def test_cards_are_asked_for_where_there_are_several(session):
    devices = [
        device.model_copy(update={"kind": kind})
        for device, kind in zip(parse_devices("2x80GiB@h100,2x16GiB@t4"), [BOX.kind] * 2 + [OLD.kind] * 2, strict=True)
    ]
    pending = [Job("zoo/gpt2", [0, 1, 2, 3]), Job("zoo/pythia", [0, 1, 2, 3, 4, 5])]
    placed = place_jobs(session, pending, devices, {BOX.kind: "H100", OLD.kind: "T4"})
    assert {p.card for p in placed} <= {"H100", "T4"}
    assert all(p.memory_bytes is None for p in placed)


def test_what_fits_on_no_device_is_refused(session):
    devices = parse_devices("0.1GiB@cpu")
    with pytest.raises(InputError, match="would do"):
        place_jobs(session, [Job("zoo/gpt2", [0])], devices, {devices[0].kind: None})
