"""What the API is asked to do, with its limits."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints
from pydantic import Field as Limited

MOST_PROMPT_CHARACTERS, MOST_ANSWER_CHARACTERS = 4000, 400
MOST_MODELS, MOST_SETTINGS, MOST_SETTING_CHARACTERS = 8, 32, 100

Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MOST_PROMPT_CHARACTERS)]
Answer = Annotated[str, StringConstraints(min_length=1, max_length=MOST_ANSWER_CHARACTERS)]
Setting = Annotated[str, StringConstraints(max_length=MOST_SETTING_CHARACTERS)]
ModelName = Annotated[str, StringConstraints(max_length=200)]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TraceRequest(_Request):
    """A prompt to follow through one model, as `throughline trace` does; without `model`, the run's only one."""

    prompt: Prompt
    model: ModelName | None = None
    off: Literal["mean", "counterfactual", "zero"] | None = None
    against: Prompt | None = None
    linearization: Literal["grouped", "plain", "frozen", "integrated"] = "grouped"
    settings: Annotated[list[Setting], Limited(max_length=MOST_SETTINGS)] = []
    verify: bool = True
    chat: bool = False
    answer: Answer | None = None
    rival: Answer | None = None


class CompareRequest(_Request):
    """A prompt to compare models on, as `throughline compare` does; without `models`, all of the run."""

    prompt: Prompt
    models: Annotated[list[ModelName], Limited(min_length=2, max_length=MOST_MODELS)] | None = None
