"""How the HTTP side is set up. Frozen; fields that carry `help` are flags of `gorgon serve`."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import flag
from engine.errors import ConfigError

DEFAULT_MAX_BODY_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one HTTP server. `served_model_name` is what clients must send as `model`."""

    served_model_name: str
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = flag(8000, "port to listen on; 0 takes a free one")
    api_key: str | None = flag(
        None, "key that every request must bring, but for /health (default: none asked)"
    )
    open_metrics: bool = flag(False, "answer /metrics without the key")
    shutdown_grace_period: float = flag(
        30.0, "seconds that running requests get to finish after SIGTERM, SIGINT or SIGHUP"
    )
    max_body_bytes: int = flag(DEFAULT_MAX_BODY_BYTES, "largest request body in bytes")

    def __post_init__(self) -> None:
        if not self.served_model_name:
            raise ConfigError("served_model_name", "must not be empty")
        if not 0 <= self.port <= 65535:
            raise ConfigError("port", f"must be 0 to 65535, not {self.port}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ConfigError(
                "api_key", "must be printable ASCII and not empty; leave it out to ask for none"
            )
        if not 0 <= self.shutdown_grace_period <= 3600:
            raise ConfigError(
                "shutdown_grace_period", f"must be 0 to 3600 seconds, not {self.shutdown_grace_period}"
            )
        if self.max_body_bytes < 1024:
            raise ConfigError("max_body_bytes", f"must be at least 1024, not {self.max_body_bytes}")
