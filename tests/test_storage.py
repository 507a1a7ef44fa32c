"""A run at a URL: the same dictionaries as in a folder, from machines that share nothing else, whatever dies on the way.

Small laws are checked in this process, on a file:// URL. Whole trainings run as a user runs them, in processes of their own, on file://
and on s3:// of a server in another process. A "machine" is a cache folder of its own.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from xml.etree import ElementTree

import pytest
import yaml

from commands import Command, start
from throughline import claims, mirror
from throughline.cli import main
from throughline.errors import HeldError, InputError, TrainingError
from throughline.records import JobState, RunInfo
from throughline.run_dir import RunDir
from throughline.storage import hurried, open_storage
from throughline.study import parse_study

SOURCE = Path(__file__).resolve().parents[1] / "src"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
S3_LIBRARIES = CACHE / "throughline" / "s3"
STUDY: dict[str, Any] = {
    "name": "tiny",
    "models": [{"path": "zoo/pythia", "layers": [0, 1]}],
    "data": {"path": "zoo/arithmetic", "context": 64},
    "dictionary": {"architecture": "topk", "d_sae": 64, "k": 8},
    "training": {"tokens": 140_000, "batch_tokens": 64, "checkpoint_minutes": 0},
    "gate": {"max_l0_share": 1.0, "max_fvu": 1.0, "min_ce_recovered": 0.0, "max_dead": 1.0},
    "evaluation": {"tokens": 2000, "spliced_tokens": 600, "sample_tokens": 1000},
}
LONGER = STUDY | {
    "models": [{"path": "zoo/pythia", "layers": [1]}],
    "training": STUDY["training"] | {"tokens": 400_000},
}
STATE_FILE = "state.safetensors"
STATE = f"models/zoo-pythia/checkpoints/layers_00-01/{STATE_FILE}"
CLAIM = "models/zoo-pythia/checkpoints/layers_00-01/claim.json"
BLOCK = ("zoo/pythia", [0, 1])
LONGEST_SECONDS = 300.0


def wait_until(condition: Callable[[], Any], process: Command | None = None) -> None:
    """Until it holds; the process that is to bring it about must not end before."""
    until = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


# ---- places


class FileUrl:
    """A folder as a URL."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.url = folder, f"file://{folder}"
        self.environment: dict[str, str] = {}

    def names(self) -> set[str]:
        """What lies there."""
        files = [path for path in self._folder.rglob("*") if path.is_file()]
        return {path.relative_to(self._folder).as_posix() for path in files if path.suffix != ".tmp"}

    def read(self, name: str) -> bytes:
        """One file."""
        return (self._folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Replace one file."""
        (self._folder / name).write_bytes(content)


class Bucket:
    """A bucket on a server, asked without the library that is tested."""

    def __init__(self, address: str, name: str) -> None:
        self.address, self._name, self.url = address, name, f"s3://{name}/runs/tiny"
        self._ask("", "PUT")

    @property
    def environment(self) -> dict[str, str]:
        """What tells a process where the server is."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # or botocore, s3fs and ours try again, each within the other, for minutes
        }

    def names(self) -> set[str]:
        """What lies there."""
        listing = ElementTree.fromstring(self._ask("?list-type=2&prefix=runs/tiny/"))
        return {(e.text or "").removeprefix("runs/tiny/") for e in listing.iter() if e.tag.endswith("Key")}

    def read(self, name: str) -> bytes:
        """One object."""
        return self._ask(f"/runs/tiny/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Replace one object."""
        self._ask(f"/runs/tiny/{name}", "PUT", content)

    def _ask(self, path: str, method: str = "GET", content: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/octet-stream"}
        headers |= {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"}
        request = urllib.request.Request(f"{self.address}/{self._name}{path}", content, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def find_libraries() -> str | None:
    """A folder for PYTHONPATH with s3fs and moto; empty if they are installed, None if they are nowhere."""
    if importlib.util.find_spec("s3fs") and importlib.util.find_spec("moto"):
        return ""
    return str(S3_LIBRARIES) if (S3_LIBRARIES / "s3fs").is_dir() else None


@pytest.fixture(scope="session")
def libraries() -> str:
    """Where they are."""
    found = find_libraries()
    if found is None:
        pytest.skip(f"s3fs and moto are not in {S3_LIBRARIES}; `make s3` installs them. The same is tested on file://")
    return found


@pytest.fixture(scope="session")
def server(libraries, tmp_path_factory) -> Iterator[str]:
    """The address of a server that speaks S3, in a process of its own."""
    port, log = free_port(), (tmp_path_factory.mktemp("server") / "log").open("w")
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": libraries}, stdout=log, stderr=log
    )

    def answers() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    wait_until(answers)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()
    log.close()


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow("storage"))])
def place(request, tmp_path):
    """Where the run lies, and an environment for processes that reach it."""
    if request.param == "file":
        return FileUrl(tmp_path / "shared" / "tiny")
    return Bucket(request.getfixturevalue("server"), f"bucket-{time.time_ns()}")


# a cluster takes minutes; that other processes go on at a file:// URL is tested without one
farthest = pytest.mark.parametrize("place", ["file" if find_libraries() is None else "s3"], indirect=True)


# ---- machines


class Machine:
    """Starts the command as on a machine that shares only the URL with others."""

    def __init__(self, cache: Path, place: FileUrl | Bucket, libraries: str) -> None:
        path = os.pathsep.join(part for part in (libraries, str(SOURCE)) if part)
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._environment = os.environ | place.environment | one_thread | {"PYTHONPATH": path}
        self._environment["XDG_CACHE_HOME"] = str(cache)
        kernels = (
            cache / "throughline" / "kernels"
        )  # a machine has compiled its kernels before; to do it anew takes 15 s
        kernels.parent.mkdir(parents=True, exist_ok=True)
        if not kernels.exists():
            kernels.symlink_to(CACHE / "throughline" / "kernels")
        self.cache = cache
        self._started: list[Command] = []

    def start(self, *arguments: object, patience: float = 60.0) -> Command:
        """A command that runs."""
        constants = {"throughline.mirror.PATIENCE_SECONDS": patience}
        process = start(*arguments, env=self._environment, constants=constants)
        self._started.append(process)
        return process

    def stop(self) -> None:
        """End what still runs, when a test has failed."""
        for process in self._started:
            process.kill()
            if process.stdout and not process.stdout.closed:
                process.communicate()

    def run(self, *arguments: object) -> tuple[int, str, str]:
        """A command that ended: exit code, standard output and standard error."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=LONGEST_SECONDS)
        return process.returncode, out, err


@pytest.fixture
def start_machine(tmp_path) -> Iterator[Callable[..., Machine]]:
    """A machine of a name, for a place, with these libraries."""
    with ExitStack() as stack:

        def start(name: str, place: FileUrl | Bucket, libraries: str) -> Machine:
            machine = Machine(tmp_path / "machines" / name, place, libraries)
            stack.callback(machine.stop)
            return machine

        yield start


@pytest.fixture
def machine(request, start_machine, place) -> Callable[[str], Machine]:
    """A machine by name."""
    libraries = request.getfixturevalue("libraries") if isinstance(place, Bucket) else ""
    return lambda name: start_machine(name, place, libraries)


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """The study file."""
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


@pytest.fixture(scope="session")
def expected(trained) -> dict[str, bytes]:
    """The dictionaries that a run in a folder has."""
    return dictionaries_in(trained(STUDY))


@pytest.fixture(scope="session")
def on_ray(tmp_path_factory) -> Path:
    """A study file of one job that lasts long enough to be killed in its midst, for Ray on this machine."""
    path = tmp_path_factory.mktemp("on_ray") / "study.yaml"
    path.write_text(yaml.safe_dump(LONGER | {"executor": {"kind": "ray"}}))
    return path


@pytest.fixture(scope="session")
def expected_of_longer(trained) -> dict[str, bytes]:
    """The dictionaries that it has when it is trained in a folder, without Ray."""
    return dictionaries_in(trained(LONGER))


def dictionaries_in(run: Path) -> dict[str, bytes]:
    """The dictionaries in a folder."""
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("layer_*/*")}


def trained(place: FileUrl | Bucket) -> dict[str, bytes]:
    """The dictionaries at a URL."""
    return {name: place.read(name) for name in place.names() if "/layer_" in name}


def one_line(result: tuple[int, str, str], code: int) -> str:
    """What a command said that ended with this exit code."""
    assert result[0] == code, result
    assert result[1] == ""
    assert result[2].startswith("throughline: ") and result[2].count("\n") == 1, result[2]
    return result[2]


# ---- whole trainings


def test_a_run_at_a_url_is_that_of_a_folder_and_other_machines_see_it(place, machine, study, expected):
    code, out, err = machine("one").run("train", study, "--out", place.url, "--device", "cpu", "--quiet")
    assert (code, out, err) == (0, "", "")
    assert trained(place) == expected
    assert not [name for name in place.names() if "checkpoints" in name or name.startswith(("progress", "driver"))]
    assert "models/zoo-pythia/training_00-01.jsonl" in place.names()
    code, out, _ = machine("two").run("status", place.url, "--json")
    assert code == 0 and json.loads(out)["folder"] == place.url and json.loads(out)["layers"]["done"] == 2
    code, out, err = machine("two").run("evaluate", place.url, "--device", "cpu", "--json")
    assert code == 0 and len(json.loads(out)) == 2, err
    assert {"manifest/evaluate,zoo,pythia.json", "models/zoo-pythia/layer_00/quality.json"} <= place.names()
    held = one_line(machine("one").run("train", study, "--out", place.url, "--device", "cpu"), 2)
    assert f"{place.url} holds a run already" in held


def test_a_killed_training_goes_on_elsewhere_to_the_same_bits(place, machine, study, expected):
    process = machine("one").start("train", study, "--out", place.url, "--device", "cpu", "--quiet")
    wait_until(lambda: STATE in place.names(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not [name for name in place.names() if name.startswith("manifest")]
    # the driver's claim is of a process of this machine, which is seen to be gone; nothing of its copy is on the second
    second = machine("two")
    code, _, err = second.run("train", study, "--out", place.url, "--device", "cpu", "--resume", "--quiet")
    assert code == 0, err
    assert trained(place) == expected
    rows = [json.loads(line) for line in place.read("models/zoo-pythia/training_00-01.jsonl").splitlines()]
    begun = [row["step"] for row in rows]
    assert begun == sorted(begun)  # went on from the checkpoint's journal: no step comes again, the first least of all
    assert STATE not in place.names() and CLAIM not in place.names()


def test_a_run_has_one_driver_and_a_block_one_worker(place, machine, study):
    long = (
        "--set",
        "training.tokens=5_000_000",
        "--device",
        "cpu",
        "--quiet",
    )  # longer than a second driver takes to start
    first = machine("one").start("train", study, "--out", place.url, *long, patience=1)
    wait_until(lambda: CLAIM in place.names(), first)
    again = ("train", study, "--out", place.url, *long, "--resume")
    assert f"run {place.url} is held by process {first.pid} on" in one_line(machine("two").run(*again), 1)
    assert first.poll() is None
    place.write(CLAIM, json.dumps({"token": "theirs", "host": "elsewhere", "pid": 7}).encode())
    out, err = first.communicate(timeout=LONGEST_SECONDS)
    assert "layers_00-01 was given to process 7 on elsewhere; this process stops" in one_line(
        (first.returncode, out, err), 1
    )
    assert not trained(place) and json.loads(place.read(CLAIM))["token"] == "theirs"


@pytest.mark.slow("cluster")
@farthest
def test_a_training_on_ray_goes_on_at_the_url_when_a_worker_dies(place, machine, on_ray, expected_of_longer):
    process = machine("one").start("train", on_ray, "--out", place.url, "--device", "cpu")

    def in_mid_job() -> set[int]:
        """Processes of jobs that have a checkpoint; no job is done yet."""
        with suppress(HTTPError, FileNotFoundError):  # a note that is gone since it was listed
            names = place.names()
            notes = [json.loads(place.read(name)) for name in names if name.startswith("progress/")]
            return {note["pid"] for note in notes if note["step"] and any(name.endswith(STATE_FILE) for name in names)}
        return set()

    victims: set[int] = set()
    wait_until(lambda: victims.update(in_mid_job()) or victims, process)
    os.kill(victims.pop(), signal.SIGKILL)
    out, err = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 0 and out.startswith("trained; "), err
    assert "its worker was lost at step" in err and "going on from step" in err
    assert trained(place) == expected_of_longer
    assert not [name for name in place.names() if "checkpoints" in name or name.startswith(("progress", "driver"))]


class Wire(threading.Thread):
    """A way to a server that can be cut and mended."""

    def __init__(self, server: str) -> None:
        super().__init__(daemon=True)
        self._there = ("127.0.0.1", int(server.rpartition(":")[2]))
        self._port, self.is_whole = free_port(), True
        self.address = f"http://127.0.0.1:{self._port}"
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self.start()

    def run(self) -> None:
        """Pass on what comes, while the wire is whole."""
        while True:
            here, _ = self._listener.accept()
            if not self.is_whole:
                here.close()
                continue
            there = socket.create_connection(self._there)
            for a, b in ((here, there), (there, here)):
                threading.Thread(target=self._pass_on, args=(a, b), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError), closing(source), closing(target):
            while (piece := source.recv(2**16)) and self.is_whole:
                target.sendall(piece)
            for end in (source, target):  # closing alone would not wake the thread of the other direction
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow("storage")
def test_a_lost_network_stops_the_training_and_loses_nothing(server, libraries, study, expected, start_machine):
    wire = Wire(server)
    place = Bucket(wire.address, f"bucket-{time.time_ns()}")
    one = start_machine("one", place, libraries)
    process = one.start("train", study, "--out", place.url, "--device", "cpu", "--quiet", patience=1)
    wait_until(lambda: STATE in place.names(), process)
    wire.is_whole = False
    out, err = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 1 and out == ""
    assert err.splitlines()[-1].startswith(
        f"throughline: {place.url} was lost ("
    )  # before it, what aiohttp says of its tasks
    assert list(one.cache.rglob("state.safetensors"))
    wire.is_whole = True
    code, _, err = one.run("train", study, "--out", place.url, "--device", "cpu", "--resume", "--quiet")
    assert code == 0, err
    assert trained(place) == expected


# ---- wrong URLs


@pytest.mark.slow("storage")
def test_wrong_buckets_are_refused(server, libraries, study, start_machine):
    bucket = Bucket(server, f"bucket-{time.time_ns()}")
    with_s3, without = start_machine("one", bucket, libraries), start_machine("two", bucket, "")
    said = one_line(with_s3.run("train", study, "--out", "s3://nowhere/x", "--device", "cpu", "--quiet"), 2)
    assert "s3://nowhere/x cannot be used: The specified bucket does not exist" in said
    assert "run folder s3://nowhere/x does not exist" in one_line(with_s3.run("status", "s3://nowhere/x"), 2)
    if libraries:
        said = one_line(without.run("status", bucket.url), 2)
        assert "s3:// needs a library that is missing: pip install 'throughline[s3]'" in said
    bucket.address = f"http://127.0.0.1:{free_port()}"
    said = one_line(start_machine("three", bucket, libraries).run("status", bucket.url), 2)
    assert f"{bucket.url} cannot be reached: " in said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "nothing://bucket/run",
            "nothing://bucket/run cannot be opened (Protocol not known: nothing); expected a path, or a URL",
        ),
        ("dropbox://run", "dropbox:// needs a library that is missing: "),
        ("file:///dev/null", "file:///dev/null is a file"),
        ("file:///dev/nothing", "file:///dev/nothing does not exist"),
    ],
)
def test_wrong_urls_are_refused(url, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["status", url])
    out, err = capsys.readouterr()
    assert said in one_line((int(ended.value.code or 0), out, err), 2)


def test_a_url_in_a_path_is_refused():
    with pytest.raises(InputError, match="a URL is given as a string; pathlib has made s3:/bucket/run of it"):
        open_storage(Path("s3://bucket/run"))


# ---- laws of the copy, in this process


@pytest.fixture
def shared(tmp_path) -> Path:
    """What two machines share."""
    return tmp_path / "shared"


@pytest.fixture
def opened(tmp_path, shared, monkeypatch) -> Callable[[str], RunDir]:
    """The run at the URL as a machine of that name sees it, with no listing to rest on."""
    monkeypatch.setattr(mirror, "LISTED_SECONDS", 0.0)
    monkeypatch.setattr(mirror, "SETTLING_SECONDS", 0.0)

    def opened_on(name: str) -> RunDir:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return RunDir(f"file://{shared}")

    return opened_on


def test_a_plain_folder_is_worked_on_in_place(tmp_path):
    run = RunDir(tmp_path)
    assert type(run.storage).__name__ == "Storage" and run.root == tmp_path and run.place == str(tmp_path)
    run.write_text("note.txt", "here")
    assert [path.name for path in tmp_path.rglob("*")] == ["note.txt"]


def test_each_machine_reads_what_the_other_wrote(opened, shared):
    one, two = opened("one"), opened("two")
    assert one.root != two.root and one.place == two.place == f"file://{shared}"
    for text in ("first", "second"):
        one.write_text("note.txt", text)
        assert two.read_text("note.txt") == text == (shared / "note.txt").read_text()
    one.storage.remove("note.txt")
    assert not two.exists("note.txt")
    two.storage.fetch("note.txt")
    assert not (two.root / "note.txt").exists()


def test_steps_are_noted_after_their_files(opened, shared):
    one, two = opened("one"), opened("two")
    with one.step("train/a/0", "key") as files:
        files.append("models/a/layer_00/weights")
        (one.layer_folder("a", 0)).mkdir(parents=True)
        (one.root / files[0]).write_bytes(b"weights")
        assert list(shared.rglob("*")) == []
    assert two.is_done("train/a/0", "key") and two.trained_layers("a") == [0] and list(two.manifest()) == ["train/a/0"]
    assert (two.root / files[0]).read_bytes() == b"weights"
    (two.root / files[0]).write_bytes(b"damaged")  # a copy that is damaged is fetched anew
    assert two.is_done("train/a/0", "key")
    (shared / files[0]).write_bytes(b"damage!")  # and the URL's, said and done again
    said = []
    assert not two.is_done("train/a/0", "key", said.append)
    assert said == [f"file://{shared}/{files[0]} does not match its checksum; train/a/0 is done again"]


def test_a_step_that_may_not_be_noted_is_not(opened, shared):
    run = opened("one")

    def refuse() -> None:
        raise TrainingError("given to another")

    with pytest.raises(TrainingError), run.steps({"train/a/0": "key"}, refuse) as files:
        files["train/a/0"].append("weights")
        run.root.mkdir(parents=True)
        (run.root / "weights").write_bytes(b"weights")
    assert list(shared.rglob("*")) == []


def save_state(run: RunDir, text: str) -> Path:
    path = run.checkpoint_folder(*BLOCK) / "state.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_checkpoints_travel_and_activations_do_not(opened, shared):
    one, two = opened("one"), opened("two")
    claim = one.take(*BLOCK)
    state = save_state(one, "step 5")
    (state.parent / "activations").mkdir()
    (state.parent / "activations" / "shard").write_bytes(b"large")
    one.journal(*BLOCK).write_text("{}\n")
    one.push_checkpoint(*BLOCK)
    assert two.begun("zoo/pythia") == [(0, 1)] and not list(shared.rglob("activations"))
    taken = two.take(*BLOCK)
    assert (two.checkpoint_folder(*BLOCK) / "state.safetensors").read_text() == "step 5"
    assert two.journal(*BLOCK).read_text() == "{}\n"
    with pytest.raises(TrainingError, match="layers_00-01 was given to process"):
        claim.check()
    taken.check()
    two.remove_checkpoint(*BLOCK)
    assert not list(shared.rglob("layers_*/*")) and one.begun("zoo/pythia") == two.begun("zoo/pythia") == []
    one.take(*BLOCK)
    assert not state.exists()  # finished elsewhere


def test_what_was_not_sent_is_kept_unless_another_went_on(opened):
    one, two = opened("one"), opened("two")
    save_state(one, "step 5")
    one.push_checkpoint(*BLOCK)
    state = save_state(one, "step 9, not sent")
    one.take(*BLOCK)
    assert state.read_text() == "step 9, not sent"
    two.take(*BLOCK)
    save_state(two, "step 7, sent")
    two.push_checkpoint(*BLOCK)
    one.take(*BLOCK)
    assert state.read_text() == "step 7, sent"


def test_a_checkpoint_that_was_never_sent_counts_as_begun(opened, shared):
    run = opened("one")
    save_state(run, "step 5")
    assert run.begun("zoo/pythia") == [(0, 1)] and opened("two").begun("zoo/pythia") == []


def test_half_written_files_are_not_seen(opened, shared):
    run = opened("one")
    (shared / "progress").mkdir(parents=True)
    (shared / "progress" / ".a,00-01.json.1234.tmp").write_text("{")
    assert run.jobs() == [] and run.storage.children() == []


def test_progress_reaches_the_url_when_it_is_to_be_known(opened):
    one, two = opened("one"), opened("two")
    state = JobState(model="a", layers=[0], host="h", pid=1, device="cpu", at=1.0)
    one.note_job(state)
    one.note_job(state.model_copy(update={"at": 2.0}), at_once=False)
    assert [job.at for job in two.jobs()] == [1.0]
    two.forget_job("a", [0])
    assert one.jobs() == []


def test_one_of_two_holds_the_run(opened, shared, monkeypatch):
    one, two = opened("one"), opened("two")
    held = f"run file://{shared} is held by process {os.getpid()} on"
    with one.held(), pytest.raises(HeldError, match=held), two.held():
        pass
    with two.held():  # let go
        pass
    (shared / "driver.json").write_text(json.dumps({"host": "elsewhere", "pid": 1, "beat": time.time() - 61}))
    with two.held():  # gone
        assert json.loads((shared / "driver.json").read_text())["pid"] == os.getpid()
    (shared / "driver.json").write_text(json.dumps({"host": "elsewhere", "pid": 1, "beat": time.time() - 59}))
    with pytest.raises(HeldError, match="is held by process 1 on elsewhere"), one.held():
        pass


def test_who_comes_at_the_same_moment_finds_the_other(opened, monkeypatch):
    one, two = opened("one"), opened("two")
    first = two.storage.slot("driver.json")
    slot = one.storage.slot("driver.json")
    read, first_look = slot.read, [""]  # before the other has written
    monkeypatch.setattr(slot, "read", lambda: first_look.pop() if first_look else read())
    first.create(json.dumps({"token": "first", "host": "elsewhere", "pid": 1, "beat": time.time()}))
    with pytest.raises(HeldError, match="is held by process 1 on elsewhere"), claims.hold(slot, "it"):
        pass


def test_a_beat_does_not_write_over_another_s_claim(opened, monkeypatch):
    run = opened("one")
    slot = run.storage.slot("driver.json")
    claims._renew(slot, {"token": "mine"})
    assert slot.read() == ""
    slot.write(json.dumps({"token": "theirs"}))
    claims._renew(slot, {"token": "mine"})
    assert json.loads(slot.read())["token"] == "theirs"


def test_a_short_loss_of_the_network_is_waited_out(opened, monkeypatch):
    run = opened("one")
    run.write_text("note.txt", "before")
    fs, failures = run.storage._fs, iter([OSError("reset by peer"), ConnectionError("no route")])

    def flaky(*arguments: Any, put=fs.put_file, **options: Any) -> None:
        for failure in failures:
            raise failure
        put(*arguments, **options)

    monkeypatch.setattr(fs, "put_file", flaky)
    monkeypatch.setattr(mirror, "LONGEST_WAIT_SECONDS", 0.1)
    run.write_text("note.txt", "after")
    assert opened("two").read_text("note.txt") == "after"
    failures = iter([OSError("reset by peer")])
    with (
        hurried(),
        pytest.raises(TrainingError, match="was lost \\(reset by peer\\); what was not sent is in .*--resume"),
    ):
        run.write_text("note.txt", "again")
    assert run.read_text("note.txt") == "after"  # the copy has nothing that the URL has not


def test_rights_that_are_missing_are_the_users_to_mend(opened, monkeypatch):
    run = opened("one")
    monkeypatch.setattr(run.storage._fs, "put_file", lambda *_: (_ for _ in ()).throw(PermissionError("Access Denied")))
    with pytest.raises(InputError, match="cannot be used: Access Denied"):
        RunDir.create(run.place, parse_study(STUDY))


def test_a_run_is_created_and_opened_at_a_url(opened, shared):
    with pytest.raises(InputError, match=f"run folder file://{shared} does not exist"):
        RunDir.open(f"file://{shared}")
    run = RunDir.create(opened("one").place, parse_study(STUDY))
    assert isinstance(RunDir.open(opened("two").place).info(), RunInfo) and run.study().name == "tiny"
    (shared / "run.json").unlink()
    with pytest.raises(InputError, match="is not a run folder"):
        RunDir.open(opened("two").place)
