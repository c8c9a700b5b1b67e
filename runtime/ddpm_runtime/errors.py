"""Everything this project raises on purpose.

    DDPMError
    ├── ConfigurationError (ValueError)   a request that cannot be met: bad value, bad combination
    ├── BundleError                       an engine bundle that is not what it says
    │   ├── NotABundleError               no manifest here
    │   ├── ManifestError                 the manifest is malformed or from a newer format
    │   └── IntegrityError                a file is missing, truncated or altered
    ├── BackendError                      the inference library failed
    │   ├── BackendUnavailableError       ... is not installed; the message has the pip line
    │   └── NetworkMismatchError          ... has not the inputs and outputs the manifest says
    ├── NonFiniteError                    an image came out with NaN or infinity
    ├── LifecycleError                    calls in the wrong order, or after close()
    ├── CheckpointError                   a training checkpoint that cannot be used safely
    ├── DataError                         training data that cannot be read
    └── ParityError                       an exported network that disagrees with its source

Every message says what was asked, what was found and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "BundleError",
    "CheckpointError",
    "ConfigurationError",
    "DDPMError",
    "DataError",
    "IntegrityError",
    "LifecycleError",
    "ManifestError",
    "NetworkMismatchError",
    "NonFiniteError",
    "NotABundleError",
    "ParityError",
]


class DDPMError(Exception):
    """Base of every error raised on purpose by this project."""


class ConfigurationError(DDPMError, ValueError):
    """A request that cannot be met: a bad value or an impossible combination."""


class BundleError(DDPMError):
    """An engine bundle that is not what it says."""


class NotABundleError(BundleError):
    """The path holds no engine bundle."""


class ManifestError(BundleError):
    """The manifest is malformed, contradictory, or written by a newer format."""


class IntegrityError(BundleError):
    """A file of the bundle is missing, truncated, or not the one that was hashed."""


class BackendError(DDPMError):
    """The inference library failed."""


class BackendUnavailableError(BackendError):
    """The inference library is not installed; the message has the pip line."""


class NetworkMismatchError(BackendError):
    """The network does not have the inputs and outputs its manifest describes."""


class NonFiniteError(DDPMError):
    """An image came out with NaN or infinity."""


class LifecycleError(DDPMError):
    """Calls in the wrong order, or after close()."""


class CheckpointError(DDPMError):
    """A training checkpoint that cannot be used, or not safely."""


class DataError(DDPMError):
    """Training data that cannot be read."""


class ParityError(DDPMError):
    """An exported network that disagrees with the network it came from."""


def choose(what: str, asked: str, possible: Iterable[str]) -> str:
    """Return ``asked`` if it is one of ``possible``, else refuse with the list and the nearest.

    Args:
        what: the name of the thing chosen, for the message ("sampler").
        asked: the user's word.
        possible: the accepted words, from the code that accepts them.

    Raises:
        ConfigurationError: ``asked`` is not among ``possible``.
    """
    names = sorted(possible)
    if asked in names:
        return asked
    near = get_close_matches(asked, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigurationError(f"unknown {what} {asked!r}; possible: {', '.join(names)}.{hint}")


def missing_extra(library: str, purpose: str, extra: str) -> BackendUnavailableError:
    """The error for a library whose extra is not installed, with the exact pip line.

    Args:
        library: the module that could not be imported ("onnxruntime").
        purpose: what it was wanted for ("run an engine on the CPU").
        extra: the extra of this distribution that brings it ("cpu").
    """
    return BackendUnavailableError(
        f"{library} is needed to {purpose} and is not installed. "
        f"Install it with: pip install 'ddpm-engine[{extra}]'"
    )
