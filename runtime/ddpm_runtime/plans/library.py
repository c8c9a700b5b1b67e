"""TensorRT's Python module, either one: found, named, given its one logger.

``tensorrt`` 10.x and 11.x and ``tensorrt_rtx`` share one API; what only some have is asked for by
name. A library keeps the first logger it is given for ever, so each module gets exactly one.
"""

from __future__ import annotations

import importlib
import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

from ..errors import BackendUnavailableError, choose, missing_extra

__all__ = ["LIBRARIES", "TensorRT", "library_of", "load_library"]

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
"""Module to the extra of this distribution that brings it."""

_log = logging.getLogger("ddpm_runtime.tensorrt")
_loaded: dict[int, TensorRT] = {}


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorRT:
    """One loaded library.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        logger: the ``ILogger`` for everything made with this module.
        complaints: its latest warnings and errors, oldest first.
    """

    module: Any
    logger: Any
    complaints: deque[str]

    @property
    def name(self) -> str:
        """The module's name."""
        return str(self.module.__name__)

    @property
    def version(self) -> str:
        """Its version in full."""
        return str(self.module.__version__)

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which builds by compute capability and needs no GPU to."""
        return hasattr(self.module, "ComputeCapability")

    @property
    def title(self) -> str:
        """For people: "TensorRT-RTX 1.7.1.116"."""
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {self.version}"

    @property
    def capabilities(self) -> tuple[int, ...]:
        """Compute capabilities TensorRT-RTX can build for, times ten; empty for TensorRT."""
        if not self.is_rtx:
            return ()
        names = (name for name in dir(self.module.ComputeCapability) if name.startswith("SM"))
        return tuple(sorted(int(name[2:]) for name in names if name[2:].isdigit()))

    def last_words(self) -> str:
        """The latest complaints in one line, for a message; then they are forgotten."""
        words = " | ".join(self.complaints) or "it said nothing"
        self.complaints.clear()
        return words


def load_library(name: str) -> TensorRT:
    """Import a library.

    Args:
        name: one of :data:`LIBRARIES`.

    Raises:
        BackendUnavailableError: it is not installed, or its own libraries are missing.
        ConfigurationError: an unknown name.
    """
    extra = LIBRARIES[choose("TensorRT library", name, LIBRARIES)]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing_extra(name, "build or run TensorRT plans", extra) from error
    except (ImportError, OSError) as error:  # the bindings are there, their libraries are not
        raise BackendUnavailableError(
            f"{name} is installed but cannot be loaded: {error}. "
            f"Install it again with: pip install --force-reinstall 'ddpm-engine[{extra}]'"
        ) from error
    return library_of(module)


def library_of(module: Any) -> TensorRT:
    """Wrap an imported module; the same module always gives the same library and logger."""
    key = id(module)
    if key not in _loaded:
        complaints: deque[str] = deque(maxlen=8)
        _loaded[key] = TensorRT(
            module=module, logger=_logger(module, complaints), complaints=complaints
        )
    return _loaded[key]


def _logger(module: Any, complaints: deque[str]) -> Any:
    """An ``ILogger`` that passes everything on to :mod:`logging` and remembers complaints."""
    severities = module.ILogger
    levels = {
        severities.INTERNAL_ERROR: logging.ERROR,
        severities.ERROR: logging.ERROR,
        severities.WARNING: logging.INFO,  # most are about nothing a user can change
        severities.INFO: logging.DEBUG,
        severities.VERBOSE: logging.DEBUG,
    }

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level >= logging.ERROR:
                complaints.append(message.strip())
            _log.log(level, "%s", message)

    return Logger()
