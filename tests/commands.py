"""`throughline` as real processes that start at once: forked from a server that has imported what takes seconds.

    done = run("status", folder)                       # returncode, stdout, stderr
    process = start("train", study, "--out", folder)   # poll, wait, kill, communicate, … as subprocess.Popen has them

`python -m throughline` imports torch and transformers for several seconds of CPU before it begins. The server is that of
multiprocessing ("forkserver"): one for each test process, started with the first command, ended by `close`. It only imports. It
never computes, and it has one thread.

Like a process of `python -m throughline`, it has a pid, a session (if asked for), an environment, a folder, arguments, `sys.path`,
standard streams (pipes or files) and a `__main__` of its own. It ends like one: exit codes, tracebacks, Ctrl-C, SIGKILL at any
moment, handlers that run at the end. It has random numbers of its own, and as many threads of torch as OMP_NUM_THREADS says.

Unlike one:
- It is the server's child and has the server's command line.
- Variables that are read during imports (`READ_AT_IMPORT`) have the values that the test process began with; `start` refuses other
- All processes of one server have the same hash seed and the same addresses of libraries. The test process has others.
- The BLAS of numpy has one thread.
- `sys.modules` holds more than the command imports. What a command imports is tested in a fresh interpreter.
"""

import atexit
import ctypes
import importlib
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import DEVNULL, PIPE, CompletedProcess, TimeoutExpired
from typing import IO, Any, NoReturn, TextIO
from unittest.mock import patch

# Without what imports polars and pyarrow, which start threads: a fork has none of them.
PRELOADED = [
    *("pytest", "numba", "scipy.sparse", "torch", "transformers.modeling_utils"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gemma", "gpt2", "gpt_neox", "phi")),
    *("throughline.models", "throughline.training.kernels", "throughline.training.processes"),
]
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "NUMBA_", "PYTHONHASHSEED")
_BEFORE_TESTS = dict(os.environ)  # a test may have changed its environment when the server is started
_BROKEN_OUTPUT = 120  # as the interpreter ends when it cannot write what is left
_running: list["Command"] = []


class Command:
    """A process that was started here, with the interface of `subprocess.Popen`."""

    def __init__(self, arguments: tuple[str, ...], process: Any, stdout: TextIO | None, stderr: TextIO | None) -> None:
        self.args, self.pid, self.stdout, self.stderr = arguments, process.pid, stdout, stderr
        self._process = process
        self._readers: list[threading.Thread] = []
        self._said: dict[TextIO | None, str] = {None: ""}

    @property
    def returncode(self) -> int | None:
        """The exit code, that of a signal negative; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, when the process has ended; TimeoutExpired after so many seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written to standard output and standard error until it ended; TimeoutExpired after so many seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        if not self._readers:
            open_streams = [stream for stream in (self.stdout, self.stderr) if stream and not stream.closed]
            self._readers = [threading.Thread(target=self._read, args=(s,), daemon=True) for s in open_streams]
            for reader in self._readers:
                reader.start()
        for reader in self._readers:
            reader.join(_left(until))
            if reader.is_alive():
                raise TimeoutExpired(self.args, timeout or 0)
        self.wait(_left(until))
        self._close_streams()
        return self._said.get(self.stdout, ""), self._said.get(self.stderr, "")

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self._close_streams()
        self.wait()

    def _read(self, stream: TextIO) -> None:
        self._said[stream] = stream.read()

    def _close_streams(self) -> None:
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()


def start(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: int | IO[Any] | None = PIPE,
    stderr: int | IO[Any] | None = PIPE,
    start_new_session: bool = False,
    constants: Mapping[str, Any] | None = None,
    function: Callable[..., object] | None = None,
    namespaces_of: int | None = None,
) -> Command:
    """A process of `throughline` with these arguments. Standard input is empty.

    `env` and `cwd` are by default those of this process, as in `subprocess.Popen`. A stream is PIPE, DEVNULL, an open file, or this
    process's (None). `constants` are values for constants of modules, by full name ("throughline.training.chunks.MOST_TOKENS").
    `function`, of a module, is called with the arguments instead of the command. The process enters the user and mount namespaces
    of the process `namespaces_of`.
    """
    environment = dict(os.environ if env is None else env)
    _require_values_of_imports(environment)
    given = tuple(map(str, arguments))
    beginning = _Beginning(
        environment, str(cwd or Path.cwd()), given, start_new_session, dict(constants or {}), function, namespaces_of
    )
    (out, here_out), (err, here_err) = _open_stream(stdout, 1), _open_stream(stderr, 2)
    with out, err:
        process = forking().Process(target=_begin, args=(beginning, out, err))
        process.start()
    command = Command(given, process, here_out, here_err)
    _running[:] = [other for other in _running if other.poll() is None] + [command]
    return command


def run(*arguments: object, timeout: float | None = None, **options: Any) -> CompletedProcess[str]:
    """A process that has ended, as `subprocess.run(…, capture_output=True, text=True)`; options as `start` has them."""
    command = start(*arguments, **options)
    try:
        out, err = command.communicate(timeout)
    except TimeoutExpired:
        command.kill()
        command.communicate()
        raise
    assert command.returncode is not None
    return CompletedProcess(command.args, command.returncode, out, err)


def close() -> None:
    """Kill what still runs, and stop the server; another is started when it is needed."""
    for command in _running:
        command.kill()
        command.wait()
        command._close_streams()
    _running.clear()
    forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]


def forking() -> Any:
    """multiprocessing's context for processes that are forked from the server, which runs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    path = os.pathsep.join(str(Path(folder).absolute()) for folder in sys.path)
    with patch.dict(os.environ, _BEFORE_TESTS | one_thread | {"PYTHONPATH": path}, clear=True):
        forkserver.ensure_running()
    return context


def server_pid() -> int:
    """The process of the server, which is started if there is none."""
    forking()
    return forkserver._forkserver._forkserver_pid  # pyright: ignore[reportAttributeAccessIssue]


atexit.register(close)


# ---- this side


def _require_values_of_imports(environment: Mapping[str, str]) -> None:
    names = {name for name in environment.keys() | _BEFORE_TESTS.keys() if name.startswith(READ_AT_IMPORT)}
    for name in sorted(names):
        if environment.get(name) != _BEFORE_TESTS.get(name):
            raise ValueError(f"{name} is read at import: a process with another value must be a fresh one (subprocess)")


def _open_stream(kind: int | IO[Any] | None, own: int) -> tuple[Connection, TextIO | None]:
    """What the process writes to, and what is read here of it; `own` is this process's."""
    if kind == PIPE:
        reading, writing = os.pipe()
        return Connection(writing, readable=False), open(reading, encoding="utf-8")
    if kind == DEVNULL:
        return Connection(os.open(os.devnull, os.O_WRONLY), readable=False), None
    file = own if kind is None else kind
    return Connection(os.dup(file if isinstance(file, int) else file.fileno()), readable=False), None


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())


# ---- in the process


@dataclass(frozen=True)
class _Beginning:
    """What a process begins with."""

    environment: dict[str, str]
    folder: str
    arguments: tuple[str, ...]
    new_session: bool
    constants: dict[str, Any] = field(default_factory=dict)
    function: Callable[..., object] | None = None
    namespaces_of: int | None = None


def _begin(beginning: _Beginning, out: Connection, err: Connection) -> NoReturn:
    """Become that process, and end as the interpreter would."""
    _enter(beginning, out, err)
    _forget_the_server()
    for name, value in beginning.constants.items():
        module, _, constant = name.rpartition(".")
        found = importlib.import_module(module)
        assert hasattr(found, constant), name
        setattr(found, constant, value)
    code = 0
    try:
        if beginning.function:
            beginning.function(*beginning.arguments)
        else:
            runpy.run_module("throughline", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = _code_of(stop)
    except BaseException as error:
        traceback.print_exc()
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    _end(code)


def _enter(beginning: _Beginning, out: Connection, err: Connection) -> None:
    if beginning.namespaces_of is not None:
        _enter_namespaces(beginning.namespaces_of)
    if beginning.new_session:
        os.setsid()
    os.chdir(beginning.folder)
    os.environ.clear()
    os.environ.update(beginning.environment)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv = ["throughline", *beginning.arguments]  # runpy replaces the first
    more = [part for part in beginning.environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:0] = [beginning.folder, *(str(Path(part).absolute()) for part in more)]


def _forget_the_server() -> None:
    """What a fork has of its parent and a process of its own would not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))


def _enter_namespaces(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    opened = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("user", "mnt")]
    for fd in opened:
        if libc.setns(fd, 0):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespaces of process {pid}")
        os.close(fd)


def _code_of(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return (stop.code or 0) & 0xFF
    sys.stderr.write(f"{stop.code}\n")
    return 1


def _end(code: int) -> NoReturn:
    """Let threads end, run what is to run at the end, write what is left."""
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or _BROKEN_OUTPUT
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)
