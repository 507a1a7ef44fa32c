"""Who answers: an OpenAI-compatible endpoint, or a Hugging Face model in this process; and what was answered before.

An answer is stored as soon as it is there, under a digest of the request and the model, so that nothing is asked twice: not by
a process that goes on after another was killed, not for a feature that is described by the same texts as another.
"""

import errno
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch

from throughline.errors import InputError
from throughline.models import open_model
from throughline.models.language_model import quiet_transformers
from throughline.study import LlmSpec, ModelSpec

LONGEST_REASON = 200  # characters of what an endpoint says of a failure
NO_KEY = "none"  # sent where there is no key: the client insists on one, such endpoints read none


class CallError(Exception):
    """A call that failed after all retries; says why in one line."""


@dataclass(frozen=True)
class Request:
    """One question, with the longest answer in tokens."""

    instruction: str
    question: str
    answer_tokens: int

    def key(self, model: str) -> str:
        """What this request to this model is stored under."""
        parts = [model, self.instruction, self.question, self.answer_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def messages(self) -> Any:
        """As a chat."""
        return [{"role": "system", "content": self.instruction}, {"role": "user", "content": self.question}]

    @property
    def text(self) -> str:
        """As a text to be continued."""
        return f"{self.instruction}\n\n{self.question}\n\n"


@dataclass(frozen=True)
class Answer:
    """What was answered, and tokens as they were counted by who answered (0 if not told)."""

    text: str
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Answerer(Protocol):
    """Who answers requests; `model` names it in what is stored."""

    model: str

    def answer(self, request: Request) -> Answer:
        """CallError if there is no answer after all retries."""
        ...


class Endpoint:
    """An OpenAI-compatible endpoint. 429, 5xx, time-outs and lost connections are tried again, as is a reply that is none."""

    def __init__(self, spec: LlmSpec) -> None:
        """InputError if the client's library is missing."""
        try:
            import openai
        except ImportError:
            raise InputError(
                "the labeler llm needs a library that is missing: pip install 'throughline[llm]'"
            ) from None
        self.model = f"{spec.model} ({spec.api})"
        self._spec, self._errors = spec, openai.OpenAIError
        self._key = os.environ.get(spec.key_variable or "") or NO_KEY
        self._client = openai.OpenAI(
            api_key=self._key, base_url=spec.base_url, timeout=spec.timeout_seconds, max_retries=spec.retries
        )
        self._limit, self._sampling = "max_tokens", {"temperature": 0.0}

    def answer(self, request: Request) -> Answer:
        """The text of the first choice."""
        reason = ""
        for _ in range(self._spec.retries + 1):
            try:
                return _read_reply(self._call(request))
            except self._errors as error:
                if self._adapt(error):
                    continue
                raise CallError(self._say(error)) from error
            except (ValueError, TypeError, LookupError, AttributeError) as error:  # a reply of the wrong form
                reason = f"{type(error).__name__}: {error}"
        raise CallError(self._hide(f"the reply is not one of the OpenAI API ({reason})"))

    def _call(self, request: Request) -> Any:
        options: dict[str, Any] = {"model": self._spec.model, self._limit: request.answer_tokens, **self._sampling}
        if self._spec.api == "completions":
            return self._client.completions.create(prompt=request.text, **options)
        return self._client.chat.completions.create(messages=request.messages, **options)

    def _adapt(self, error: Exception) -> bool:
        """Models that reason take another name for the limit, and no temperature: True if that was so and is now heeded."""
        if getattr(error, "status_code", None) != 400:
            return False
        before, said = (self._limit, dict(self._sampling)), str(error)
        if "max_completion_tokens" in said:
            self._limit = "max_completion_tokens"
        elif "temperature" in said:
            self._sampling = {}
        return before != (self._limit, self._sampling)

    def _say(self, error: Exception) -> str:
        status = getattr(error, "status_code", None)
        cause = error.__cause__ if status is None and error.__cause__ is not None else None
        said = f"{error}" + (f" ({type(cause).__name__}: {cause})" if cause else "")
        if status in (400, 500) and self._spec.api == "chat":
            said += "; a model without a chat template answers with features.llm.api: completions"
        return self._hide(said)

    def _hide(self, said: str) -> str:
        """One line, not too long, without the key if the endpoint repeats it."""
        said = said.replace(self._key, "***") if self._key != NO_KEY else said
        return " ".join(said.split())[:LONGEST_REASON]


def _read_reply(reply: Any) -> Answer:
    """ValueError and the like for what is no reply; a field may be missing or of any type, since nobody checked it."""
    if not getattr(reply, "choices", None):
        raise ValueError("it has no choices")
    first, usage = reply.choices[0], getattr(reply, "usage", None)
    text = first.text if hasattr(first, "text") else first.message.content
    if not isinstance(text, str | None):
        raise TypeError(f"its text is {type(text).__name__}")
    counts = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(text or "", *(count if isinstance(count, int) else 0 for count in counts))


class LocalModel:
    """A Hugging Face model in this process: a hub id, a local folder or zoo/NAME; no remote code. One call at a time."""

    def __init__(self, path: str, device: str) -> None:
        self._opened = open_model(ModelSpec(path=path), device)
        self._hf: Any = self._opened.hf
        self._lock = Lock()
        self.model = f"{path} (local {_digest_folder(Path(path))})"

    def answer(self, request: Request) -> Answer:
        """The likeliest continuation, by its chat template if the model has one."""
        tokenizer, context = self._opened.tokenizer, self._opened.context
        if tokenizer.chat_template:
            ids = tokenizer.apply_chat_template(request.messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(request.text)["input_ids"]
        assert isinstance(ids, list)
        if len(ids) + request.answer_tokens > context:
            raise CallError(
                f"prompt and answer have {len(ids)} + {request.answer_tokens} tokens, the model sees {context}; "
                "lower features.llm.examples, context or per_call"
            )
        with self._lock, quiet_transformers(), torch.no_grad():
            ids_BT = torch.tensor([ids], device=self._opened.device)
            end = self._opened.tokenizer.eos_token_id
            made_BT = self._hf.generate(  # with cached keys and values, unlike `LanguageModel.generate`
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=request.answer_tokens,
                do_sample=False,
                pad_token_id=end,
            )
            new = made_BT[0, len(ids) :].tolist()
        return Answer(str(tokenizer.decode(new, skip_special_tokens=True)), len(ids), len(new))


def _digest_folder(path: Path) -> str:
    """Other weights at the same path are another model; what is no folder (a hub id, zoo/NAME) does not change."""
    files = sorted(path.expanduser().glob("*")) if path.expanduser().is_dir() else []
    stated = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:8]


class Answers:
    """Answers in a file of one JSON object a line, to which lines are only ever added."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.is_file() else b""
        self._known = dict(filter(None, map(_read_line, content.decode(errors="replace").splitlines())))
        self._path, self._file = path, path.open("ab", buffering=0)  # a killed process leaves nothing unwritten
        self._lock, self._asking = Lock(), defaultdict[str, Lock](Lock)
        if content and not content.endswith(b"\n"):  # a line that a kill cut short is ended, and left out
            self._file.write(b"\n")

    def find(self, key: str) -> Answer | None:
        """What was answered to this request, if it was asked."""
        return self._known.get(key)

    def find_or_ask(self, key: str, ask: Callable[[], Answer]) -> Answer:
        """The stored answer, or a new one that is stored before it is used; the same request is not asked by two at once."""
        with self._lock:
            mine = self._asking[key]
        with mine:
            if key not in self._known:
                answer = ask()
                with self._lock:
                    self._append(json.dumps({"key": key} | asdict(answer)) + "\n")
                self._known[key] = answer
            return self._known[key]

    def _append(self, line: str) -> None:
        try:
            written = self._file.write(line.encode())
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if written != len(line.encode()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read_line(line: str) -> tuple[str, Answer] | None:
    try:
        row = json.loads(line)
        return row["key"], Answer(row["text"], row["prompt_tokens"], row["answer_tokens"])
    except (ValueError, TypeError, KeyError):
        return None
