"""How the HTTP side is set up. Frozen; fields that carry `help` are flags of `gorgon serve`."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import flag
from engine.errors import ConfigError

DEFAULT_MAX_BODY_BYTES = 4 * 2**20


def check_api_key(key: str) -> None:
    """Raises ConfigError for a key that no client could send, or that looks like a mistake."""
    if not key:
        raise ConfigError("api_key", "is empty; leave it out to ask for none")
    if not (key.isascii() and key.isprintable()):
        # A key that was read from a file often has a line break at its end.
        raise ConfigError(
            "api_key",
            "holds characters other than printable ASCII, perhaps a line break at its end; remove them",
        )
    if key != key.strip():
        raise ConfigError("api_key", "begins or ends with a space; remove it")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one HTTP server. `served_model_name` is what clients must send as `model`."""

    served_model_name: str
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = flag(8000, "port to listen on; 0 takes a free one")
    api_key: str | None = flag(
        None,
        "key that every request must bring, but for /health; several with commas between them, each with a "
        "prefix cache of its own (default: none asked)",
    )
    open_metrics: bool = flag(False, "answer /metrics without the key")
    keep_alive_timeout: int = flag(75, "seconds that an idle connection is kept open")
    shutdown_grace_period: float = flag(
        30.0, "seconds that running requests get to finish after SIGTERM, SIGINT or SIGHUP"
    )
    max_body_bytes: int = flag(DEFAULT_MAX_BODY_BYTES, "largest request body in bytes")
    parse_special: bool = flag(
        False, "make control tokens of what spells one in a message, so that a message can forge turns"
    )

    def __post_init__(self) -> None:
        if not self.served_model_name:
            raise ConfigError("served_model_name", "must not be empty")
        if not 0 <= self.port <= 65535:
            raise ConfigError("port", f"must be 0 to 65535, not {self.port}")
        for key in self.api_keys:
            check_api_key(key)
        if not 1 <= self.keep_alive_timeout <= 3600:
            raise ConfigError(
                "keep_alive_timeout", f"must be 1 to 3600 seconds, not {self.keep_alive_timeout}"
            )
        if not 0 <= self.shutdown_grace_period <= 3600:
            raise ConfigError(
                "shutdown_grace_period", f"must be 0 to 3600 seconds, not {self.shutdown_grace_period}"
            )
        if self.max_body_bytes < 1024:
            raise ConfigError("max_body_bytes", f"must be at least 1024, not {self.max_body_bytes}")

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The accepted keys; empty where no key is asked for. A bearer token has no comma (RFC 6750)."""
        return () if self.api_key is None else tuple(self.api_key.split(","))
