"""The server's process: checked and bound before anything is read, so that what is wrong is said at once."""

import errno
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import uvicorn

from throughline.errors import InputError
from throughline.run_dir import RunDir
from throughline.serving.access import access_of
from throughline.serving.app import Serving
from throughline.serving.jobs import Limits

LEAST_TOKEN_CHARACTERS = 16
MOST_CONNECTIONS = 512
STOP_SECONDS = 3
MAKE_TOKEN = "python -c 'import secrets; print(secrets.token_urlsafe())' makes one"


def serve(
    run: RunDir,
    host: str,
    port: int,
    token: str | None,
    device: str | None,
    say: Callable[[str], None],
    limits: Limits | None = None,
) -> None:
    """Serve a run until Ctrl-C. InputError if it cannot be served like that."""
    check_token(token)
    family, addresses = resolve(host)
    is_open = not all(ipaddress.ip_address(address).is_loopback for address in addresses)
    if is_open and token is None:
        raise InputError(
            f"--host {host} lets other machines in, who could read the run and trace on this machine; it needs --token "
            f"({MAKE_TOKEN}), or leave --host out"
        )
    with bind(family, addresses[0], port) as listening:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        serving = Serving(run, device, access_of(host, addresses, token), limits or Limits())
        say(f"{run.place} is served at {address}/ until Ctrl-C")
        if token is not None:
            say(f"a browser opens {address}/?token=… once with the token; programs send Authorization: Bearer …")
        if is_open:
            say(
                "whoever can reach this machine and has the token reads all of the run and traces prompts here; nothing is "
                "encrypted, so a network that is not trusted needs a tunnel (ssh -L) or a proxy with TLS before it"
            )
        _run(serving, listening)


def _run(serving: Serving, listening: socket.socket) -> None:
    Thread(target=_warm, args=(serving,), daemon=True).start()
    try:
        make_server(serving).run(sockets=[listening])
    except KeyboardInterrupt:  # the ordinary end
        pass
    finally:
        serving.stop()


def make_server(serving: Serving) -> uvicorn.Server:
    """What listens and speaks HTTP."""
    return _Server(
        uvicorn.Config(
            serving.app,
            http="h11",
            ws="none",
            access_log=False,  # addresses may have a token in them
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=STOP_SECONDS,
        ),
        serving,
    )


class _Server(uvicorn.Server):
    """Ends streams when it is told to stop, which would go on for ever."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._serving.streams.stop()
        super().handle_exit(sig, frame)


def _warm(serving: Serving) -> None:
    """Read what the first view asks for, before it does."""
    try:
        serving.reader.overview()
        serving.reader.index.prepare()
    except Exception:  # it will be said to who asks
        logging.getLogger(__name__).debug("the overview cannot be read yet", exc_info=True)


def check_token(token: str | None) -> None:
    """InputError for a token that is easily guessed or that no header can carry."""
    if token is None:
        return
    if len(token) < LEAST_TOKEN_CHARACTERS:
        raise InputError(f"--token needs {LEAST_TOKEN_CHARACTERS} characters or more, found {len(token)}; {MAKE_TOKEN}")
    if not all("!" <= character <= "~" for character in token):
        raise InputError(f"--token expects letters, digits and signs of ASCII without spaces; {MAKE_TOKEN}")


def resolve(host: str) -> tuple[socket.AddressFamily, list[str]]:
    """What kind of address `host` is, and its addresses of that kind."""
    try:
        found = socket.getaddrinfo(host or "-", None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise InputError(f"--host {host!r} is no name or address of this machine; leave it out for 127.0.0.1") from None
    family = min((info[0] for info in found), key=lambda kind: kind != socket.AF_INET)
    return family, [str(info[4][0]).partition("%")[0] for info in found if info[0] == family]


@contextmanager
def bind(family: socket.AddressFamily, address: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there; InputError if the port is taken or may not be."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port expects a number from 0 to 65535, found {port}")
    # Named TCP, asyncio sends each answer at once; of a socket that is not it lets the system wait 40 ms for more.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports of connections that just ended
        try:
            listening.bind((address, port))
            listening.listen(128)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = f"port {port} at {address} is in use; give another with --port"
            elif error.errno == errno.EACCES:
                reason = f"port {port} needs more rights than this user has; give one above 1023 with --port"
            else:
                reason = (
                    f"--host {address} is no address of this machine ({error.strerror}); leave it out for 127.0.0.1"
                )
            raise InputError(reason) from None
        yield listening
    finally:
        listening.close()
