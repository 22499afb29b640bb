"""Errors of head sets and of the registry. The engine has its own, which heads must not import."""


class HeadsError(Exception):
    """A head set that cannot be used: another base model, a damaged or unknown checkpoint."""


class RegistryError(Exception):
    """A model or head set name that cannot be resolved or fetched; the message says what can."""
