"""What preflight has to say: a finding, and whether it stops the run."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Something that an error stops the run for, or that a user should know; and what to change."""

    level: Literal["error", "warning"]
    what: str
    mend: str
