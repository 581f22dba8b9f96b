"""The one error of the emulated clusters."""


class EmulationError(Exception):
    """The network cannot be emulated, or not as asked; the message says what is missing and how to get it."""
