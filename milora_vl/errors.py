"""Errors that a user can fix: their text says what, where and what to do."""


class MiloraError(Exception):
    """Base of the package's own errors; each also inherits the builtin that it refines."""


class StoppedError(MiloraError):
    """A signal asked the process to end; what was done so far is saved."""


def explain_error(error: Exception) -> str:
    """Return an error's text for a terminal; unexpected errors mention --debug."""
    if isinstance(error, MiloraError):
        return str(error)
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return f"{kind}{error} (--debug shows where)"
