"""A real OpenAI-compatible server (`transformers serve`) of a bundled model, and a faulty proxy before it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

from throughline import zoo

ZOO = Path(zoo.__file__).parent
# The bundled models add and know no language: this turns a chat into a sum whose answer is the parity of its length, so that
# judgements can be read and have nothing to do with what is judged.
PARITY = 'What is 25 - {{ 25 - (messages | map(attribute="content") | join | length) % 2 }}?'
START_SECONDS = 120


def arithmetic_model(folder: Path, template: str | None) -> Path:
    """zoo/pythia in a folder of its own, with a chat template or without, and with room for long prompts."""
    shutil.copytree(ZOO / "pythia", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192, "dtype": "float32"}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@contextmanager
def serve_models(log: Path) -> Iterator[str]:
    """`transformers serve` of whatever local folder a request names; its address up to /v1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", "--port", str(port), "--host", "127.0.0.1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=out, stderr=out, env=environment)
    try:
        until = time.monotonic() + START_SECONDS
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"transformers serve did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


class Proxy:
    """Passes requests on to `base_url` and counts them; `fault(number, body)` may have it do something else instead.

    A fault takes the handler and answers by itself; what returns None is passed on.
    """

    def __init__(self, base_url: str) -> None:
        self.asked: list[str] = []  # bodies as they came
        self.keys: list[str | None] = []
        self.answered: list[str] = []  # those whose answer was delivered
        self.fault: Callable[[int, dict], Callable[[BaseHTTPRequestHandler], None] | None] = lambda number, body: None
        self.stop = Event()
        proxy, root = self, base_url.removesuffix("/v1")

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                proxy.asked.append(body.decode())
                proxy.keys.append(self.headers["Authorization"])
                fault = proxy.fault(len(proxy.asked), json.loads(body))
                if fault is not None:
                    fault(self)
                    return
                request = urllib.request.Request(root + self.path, body, {"Content-Type": "application/json"})
                try:
                    with urllib.request.urlopen(request, timeout=60) as reply:
                        status, content = reply.status, reply.read()
                except urllib.error.HTTPError as error:
                    status, content = error.code, error.read()
                respond(self, status, content)
                if status == 200:
                    proxy.answered.append(body.decode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.stop.set()
        self._server.shutdown()
        self._server.server_close()


def respond(handler: BaseHTTPRequestHandler, status: int, content: bytes, **headers: str) -> None:
    """A whole reply, called JSON whatever it is."""
    handler.send_response(status)
    for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(content))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def chat_reply(text: str | None) -> bytes:
    """A well-formed chat completion that says `text`."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    ).encode()


def cut_off(handler: BaseHTTPRequestHandler) -> None:
    """Begin an answer and lose the connection."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"id": ')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
