"""Ten clients who trace and a hundred who read, for a minute: `python benchmarks/serving_load.py RUN [--seconds 60]`.

RUN is one in which prompts can be traced, such as the demo's. Each tracing client asks for a prompt of its own, follows its events
to the end and asks for the next; each reading client asks for something every second, as somebody does who looks at what came.
Prints how many of each were answered, the time of reading, errors, and the server's memory as it went.
"""

import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np

TRACING, READING = 10, 100
PAUSE_SECONDS = 1.0


class Load:
    """What all clients have seen so far."""

    def __init__(self, port: int, seconds: float) -> None:
        self.port, self.until = port, time.monotonic() + seconds
        self.lock = threading.Lock()
        self.reading: list[float] = []
        self.traces: list[float] = []
        self.errors: list[str] = []

    def ask(self, connection: http.client.HTTPConnection, method: str, path: str, body: object = None) -> bytes:
        """The body of an answer that is no error."""
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"content-type": "application/json"} if sent else {})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status >= 400:
            raise OSError(f"{method} {path}: {answer.status} {content[:200].decode(errors='replace')}")
        return content

    def read(self, number: int, paths: list[str]) -> None:
        """One reading client."""
        drawn = random.Random(number)
        time.sleep(drawn.random() * PAUSE_SECONDS)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while time.monotonic() < self.until:
            began = time.monotonic()
            try:
                self.ask(connection, "GET", drawn.choice(paths))
                with self.lock:
                    self.reading.append(time.monotonic() - began)
            except (OSError, http.client.HTTPException) as error:
                self.fail(error)
                connection.close()
            time.sleep(max(0.0, PAUSE_SECONDS - (time.monotonic() - began)))
        connection.close()

    def trace(self, number: int, models: list[str]) -> None:
        """One tracing client."""
        drawn = random.Random(1000 + number)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        while time.monotonic() < self.until:
            began = time.monotonic()
            prompt = f"What is {drawn.randint(10, 99)} + {drawn.randint(10, 99)}?"
            try:
                job = json.loads(
                    self.ask(connection, "POST", "/api/traces", {"prompt": prompt, "model": drawn.choice(models)})
                )
                events = self.ask(connection, "GET", f"/api/jobs/{job['id']}/events").decode()
                if "event: done" not in events:
                    raise OSError(f"a trace ended otherwise: {events[-200:]}")
                json.loads(self.ask(connection, "GET", f"/api/jobs/{job['id']}/result"))
                with self.lock:
                    self.traces.append(time.monotonic() - began)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.fail(error)
                connection.close()
        connection.close()

    def fail(self, error: Exception) -> None:
        """Remember an error."""
        with self.lock:
            self.errors.append(str(error))


def paths_of(port: int) -> list[str]:
    """What the page asks for: the overview, searches, features, matrices, cells, traces, states."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def get(path: str) -> object:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())

    found = get("/api/features?limit=20")
    paths = ["/api/overview", "/api/status", "/api/training", "/api/traces", "/api/analysis", "/api/transfers"]
    paths += [f"/api/features?q={word}" for word in ("carry", "sum", "token", "1", "x")]
    for row in found["features"]:  # pyright: ignore
        paths.append(f"/api/feature?model={quote(row['model'])}&layer={row['layer']}&feature={row['feature']}")
    for info in get("/api/transfers")[:6]:  # pyright: ignore
        pair = f"source={quote(info['source'])}&target={quote(info['target'])}"
        paths.append(f"/api/transfer?metric={info['metric']}&{pair}")
        if info["metric"] == "matching":
            paths.append(
                f"/api/pairs?{pair}&source_layer={info['source_layers'][0]}&target_layer={info['target_layers'][0]}"
            )
    return paths


def memory_of(pid: int) -> float:
    """MiB that a process and its children, whichever thread began them, hold."""
    children = [int(n) for task in Path(f"/proc/{pid}/task").iterdir() for n in (task / "children").read_text().split()]
    held = [re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{one}/status").read_text()) for one in (pid, *children)]
    return sum(int(found[1]) for found in held if found) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    command = [sys.executable, "-m", "throughline", "serve", str(options.run), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        found = re.search(r":(\d+)/", process.stderr.readline())
        assert found
        port = int(found[1])
        paths = paths_of(port)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/api/overview")
        models = [model["name"] for model in json.loads(connection.getresponse().read())["models"]]
        load = Load(port, options.seconds)
        threads = [threading.Thread(target=load.trace, args=(i, models)) for i in range(TRACING)]
        threads += [threading.Thread(target=load.read, args=(i, paths)) for i in range(READING)]
        for thread in threads:
            thread.start()
        memory = []
        while time.monotonic() < load.until:
            time.sleep(options.seconds / 12)
            memory.append(memory_of(process.pid))
        for thread in threads:
            thread.join()
        milliseconds = 1000 * np.array(load.reading)
        p50, p95, p99 = np.percentile(milliseconds, (50, 95, 99))
        print(f"{TRACING} tracing, {READING} reading, {options.seconds:.0f} s")
        print(f"reading: {len(milliseconds):,} answers")
        print(f"median {p50:.1f} ms, p95 {p95:.1f}, p99 {p99:.1f}, longest {milliseconds.max():.0f}")
        print(f"traces: {len(load.traces)}, median {np.median(load.traces):.1f} s from asking to having it")
        print(f"errors: {len(load.errors)}" + "".join(f"\n  {error}" for error in load.errors[:5]))
        print("memory, MiB: " + ", ".join(f"{held:.0f}" for held in memory))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
