"""What every record that becomes JSON is."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen JSON record, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
