"""What is known of the model, read from `Worker.describe`, for routes with words of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

FAMILY = "diffusion-gemma"


@dataclass(frozen=True)
class Facts:
    """The configured model. Sizes are 0 while it has not been loaded once.

    Attributes:
        name: of the model. state: as the worker's. device, dtype: where and how it is held.
        parameters: how many. memory_bytes: held now; 0 while unloaded.
        context_tokens: what a prompt and its answer may take together.
        max_live: jobs that may run side by side.
        can_think: it may be asked to reason.
    """

    name: str
    state: str
    device: str
    dtype: str
    parameters: int
    memory_bytes: int
    context_tokens: int
    max_live: int
    can_think: bool

    @property
    def size(self) -> str:
        """Number of parameters as people write it, for example 3.3M."""
        for unit, name in ((10**9, "B"), (10**6, "M")):
            if self.parameters >= unit:
                return f"{self.parameters / unit:.1f}{name}"
        return str(self.parameters)

    @property
    def digest(self) -> str:
        """A name in hexadecimal digits, for clients that want one; not of the weights."""
        return sha256(f"{self.name} {self.parameters} {self.dtype}".encode()).hexdigest()


def facts(described: Mapping[str, object]) -> Facts:
    """What `Worker.describe` tells."""

    def number(key: str) -> int:
        found = described.get(key)
        return found if isinstance(found, int) else 0

    return Facts(
        name=str(described["model"]),
        state=str(described.get("state", "ready")),
        device=str(described.get("device", "")),
        dtype=str(described.get("dtype", "")),
        parameters=number("parameters"),
        memory_bytes=number("memory_bytes"),
        context_tokens=(number("context_tokens") or number("prompt_tokens"))
        + number("canvas_tokens"),
        max_live=max(1, number("max_live")),
        can_think=described.get("thinking") is True,
    )


def iso_time(unix_s: float) -> str:
    """Seconds since 1970 as ISO 8601, in UTC."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat().replace("+00:00", "Z")
