"""Errors of head sets and of the registry. Apart from the engine's: heads import nothing above them."""


class HeadsError(Exception):
    """A head set that cannot be used: another base model, a damaged or unknown checkpoint."""


class RegistryError(Exception):
    """A model or head set name that cannot be resolved or fetched; the message says what can."""
