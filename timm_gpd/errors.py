"""Errors of the package. Each is one line that says what is wrong and what to do."""

__all__ = ['UnsupportedModelError']


class UnsupportedModelError(ValueError):
    """A model cannot be widened exactly: names the module, its class and the reason."""
