"""What the working thread does: the only module of `serving` that needs torch, so it is imported there and not before."""

import gc
import sys
from collections.abc import Callable

from throughline import pipeline
from throughline.api import choose_device
from throughline.run_dir import RunDir
from throughline.serving.jobs import Job
from throughline.serving.requests import CompareRequest, TraceRequest
from throughline.session import Session
from throughline.tracing import Tell


class Tracer:
    """Traces prompts with what one session has open, and opens another when the run has changed."""

    def __init__(self, run: RunDir, device: str | None, fingerprint: Callable[[], str]) -> None:
        self._run, self._device, self._fingerprint = run, device, fingerprint
        self._session: Session | None = None
        self._opened = ""

    def do(self, job: Job, tell: Tell) -> bytes:
        """A trace or a comparison as JSON; ThroughlineError if the request cannot be met. What `tell` raises ends it.

        Dictionaries that failed the gate are traced with if the run's owner insisted on that before (`--force`).
        """
        session, request, force = self._current(), job.request, self._run.info().forced
        if isinstance(request, TraceRequest):
            name = session.study.model(request.model).name
            self._open(session, [name], tell)
            options = pipeline.trace_options(
                session.study, request.off, request.against, request.linearization, request.settings, request.verify
            )
            return pipeline.trace(session, request.prompt, name, force, options, tell).model_dump_json().encode()
        assert isinstance(request, CompareRequest)
        names = request.models or [spec.name for spec in session.study.models]
        self._open(session, names, tell)
        return pipeline.compare(session, request.prompt, names, force, tell=tell).model_dump_json().encode()

    def let_go(self) -> None:
        """Give the memory of models and dictionaries back."""
        self._session = None
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _current(self) -> Session:
        now = self._fingerprint()
        if self._session is None or now != self._opened:
            self.let_go()
            self._session, self._opened = Session(self._run, choose_device(self._device)), now
        return self._session

    def _open(self, session: Session, names: list[str], tell: Tell) -> None:
        session.require_gate(self._run.info().forced)  # before anything large is read
        for step, name in enumerate(names, 1):
            tell(f"opening {name}", step, len(names))
            session.model(name)
            session.dictionaries(name)
