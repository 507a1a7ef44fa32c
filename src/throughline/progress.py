"""Where training is: what a job notes of itself, and what follows for the whole run.

A job's state is a file of its own, so any process can read how far all of them are. One that was not renewed for a minute belongs
to a process that is gone.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from throughline.claims import SILENT_SECONDS, beating
from throughline.records import JobState
from throughline.run_dir import RunDir
from throughline.study import ModelSpec

STATES = ("done", "imported", "running", "stopped", "waiting", "failed")


class JobNotes:
    """What this process notes of one job."""

    def __init__(self, run: RunDir, model: str, layers: Sequence[int], device: str, attempt: int = 1) -> None:
        self._run = run
        here = {"host": socket.gethostname(), "pid": os.getpid(), "device": device, "attempt": attempt}
        self._state = JobState(model=model, layers=list(layers), at=time.time(), **here)

    @contextmanager
    def kept_fresh(self) -> Iterator[None]:
        """Renew the note now and then, while the block runs."""
        self.note()
        with beating(self.note):
            yield

    def note(self, **measured: Any) -> None:
        """Where the job is now. What it measured reaches a run at a URL with the next beat: training does not wait for it."""
        self._state = self._state.model_copy(update=measured | {"at": time.time()})
        self._run.note_job(self._state, at_once=not measured or "failed" in measured)


def read_status(run: RunDir) -> dict[str, Any]:
    """What is done, running, waiting, stopped or failed, as plain values.

    `layers` counts layers by state; `devices` has the jobs that run; `models` has the state of each model, of its layers, their
    gates, its later steps, and why jobs failed. `eta_seconds` is what is left at the speed of the jobs that run now, None if none
    does.
    """
    study, info, now = run.study(), run.info(), time.time()
    jobs = [(state, _state_of(state, now)) for state in run.jobs()]
    models = {spec.name: _read_model(run, spec, jobs, info.depths.get(spec.name)) for spec in study.models}
    states = [layer["state"] for model in models.values() for layer in model["layers"].values()]
    running = [state for state, name in jobs if name == "running"]
    return {
        "name": study.name,
        "folder": run.place,
        "forced": info.forced,
        "random_weights": info.random_weights,
        "layers": {name: states.count(name) for name in STATES},
        "eta_seconds": _seconds_left(running, states.count("waiting") + states.count("stopped")),
        "devices": [state.model_dump() for state in sorted(running, key=lambda state: (state.host, state.device))],
        "models": models,
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A journal of training as `journals.JsonLines` wrote it, by step; the later of two lines of one step and layer.

    Lines cut short are left out.
    """
    rows: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["step"], tuple(row["layers"])] = row
    return [rows[key] for key in sorted(rows)]


def _read_model(run: RunDir, spec: ModelSpec, jobs: list[tuple[JobState, str]], depth: int | None) -> dict[str, Any]:
    name = spec.name
    trained, imported = run.trained_layers(name), run.imported(name)
    states = {layer: state for job, state in jobs if job.model == name for layer in job.layers}
    states |= {layer: "imported" if layer in imported else "done" for layer in trained}
    known = sorted(set(spec.layers)) if spec.layers != "all" else list(range(depth or 0)) or trained
    done = bool(known) and set(known) <= set(trained)
    steps = {"train": done} | {stage: run.finished(f"{stage}/{name}") for stage in ("evaluate", "features", "label")}
    quality = {q.layer: q for q in run.quality(name)} if steps["evaluate"] else {}
    return {
        "state": "done" if done else _worst({states.get(layer, "waiting") for layer in known} - {"done", "imported"}),
        "steps": steps,
        "jobs": [job.model_dump() | {"state": state} for job, state in jobs if job.model == name],
        "layers": {
            layer: {
                "state": states.get(layer, "waiting"),
                "gate": quality[layer].gate if layer in quality else None,
            }
            for layer in known
        },
    }


def _worst(states: set[str]) -> str:
    """What a model is called some of whose layers are in these states."""
    return next((state for state in ("running", "failed", "stopped") if state in states), "waiting")


def _state_of(job: JobState, now: float) -> str:
    if job.failed:
        return "failed"
    return "running" if now - job.at < SILENT_SECONDS else "stopped"


def _seconds_left(running: list[JobState], layers_waiting: int) -> float | None:
    """What is left of the jobs that run, and of the layers that wait, taken to cost what one of those costs on average."""
    begun = [job for job in running if job.eta_seconds is not None and job.step]
    if not begun:
        return None
    etas = [job.eta_seconds or 0.0 for job in begun]
    seconds_per_layer = [
        eta / max(1, job.num_steps - job.step) * job.num_steps / len(job.layers)
        for eta, job in zip(etas, begun, strict=True)
        if job.step < job.num_steps
    ]
    waiting = layers_waiting * sum(seconds_per_layer) / max(1, len(seconds_per_layer))
    return max(max(etas), (sum(etas) + waiting) / len(begun))
