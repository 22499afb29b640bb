"""The errors that cross the engine's border. Each names what was wrong and what to do."""

from __future__ import annotations


class GorgonError(Exception):
    """Base of every error a person is meant to read."""


class ConfigError(GorgonError):
    """A setting that cannot work. `parameter` is its name, the message says what would."""

    def __init__(self, parameter: str, message: str) -> None:
        self.parameter = parameter
        super().__init__(f"--{parameter.replace('_', '-')}: {message}")


class ModelError(GorgonError):
    """A model folder that cannot be served: unknown architecture, missing or damaged weights."""


class RequestError(GorgonError):
    """A request the engine cannot run. `parameter` is the OpenAI name of the field at fault."""

    def __init__(self, parameter: str, message: str) -> None:
        self.parameter = parameter
        super().__init__(message)


class OverloadedError(GorgonError):
    """The queue is full. `retry_after`: estimated seconds until a new attempt may succeed."""

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"The server is at its limit of queued requests; try again in {retry_after} s.")


class EngineStartError(GorgonError):
    """The engine process could not load the model; the message is its own."""


class GraphCaptureError(GorgonError):
    """CUDA graphs could not be captured. torch does not recover from it: another process is needed, one that
    captures none."""

    def __init__(self, message: str) -> None:
        super().__init__(f"CUDA graphs could not be captured; --enforce-eager does without. {message}")


class EngineDeadError(GorgonError):
    """The engine process died while a request was in it; the request is lost, the engine is restarted."""


class EngineStoppedError(EngineDeadError):
    """The server is shutting down and has ended the engine; nothing restarts it."""


class RequestMemoryError(GorgonError):
    """The device has no memory for a request, not even alone; the request is lost, the engine goes on."""


class EngineBrokenError(GorgonError):
    """Whatever the engine is asked to compute fails; only a new process can help."""
