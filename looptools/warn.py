"""Warnings that point at the user's own line, and are shown each time they are given."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

LIBRARY = __name__.partition(".")[0]


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as from the line that called into looptools.

    Python shows a warning once for each line of code, so a second run of the process would be silent about the same
    mistake; here each counts as new, unless a filter says otherwise.

    Example:
        >>> import pytest
        >>> with pytest.warns(UserWarning, match="spilt"):
        ...     warn("spilt milk")
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == LIBRARY:
        frame = frame.f_back
    if frame is None:  # called from C, as at the end of the process
        warnings.warn_explicit(message, category, "looptools", 1, registry={})
    else:
        module = frame.f_globals.get("__name__", "")
        warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, module, registry={})
