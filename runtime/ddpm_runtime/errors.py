"""Everything this project raises on purpose.

    DDPMError
    ├── ConfigurationError (ValueError)   a request that cannot be met: bad value, bad combination
    ├── BundleError                       an engine bundle that is not what it says
    │   ├── NotABundleError               no manifest here
    │   ├── ManifestError                 the manifest is malformed or from a newer format
    │   └── IntegrityError                a file is missing, truncated or altered
    ├── BackendError                      the inference library failed
    │   ├── BackendUnavailableError       ... is not installed; the message has the pip line
    │   ├── NetworkMismatchError          ... has not the inputs and outputs the manifest says
    │   ├── OutOfDeviceMemoryError        the GPU has not the memory that was asked for
    │   ├── GraphError                    a CUDA graph could not be captured or instantiated
    │   └── PlanError                     a TensorRT plan that cannot be built or used
    │       ├── PlanBuildError            ... TensorRT refuses the network or the GPU
    │       ├── PlanMismatchError         ... for another library, version, GPU, CUDA or network
    │       ├── DamagedPlanError          ... truncated or altered, or no plan file at all
    │       └── UntrustedPlanError        ... this user did not build; loading one runs its code
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
    "DamagedPlanError",
    "DataError",
    "GraphError",
    "IntegrityError",
    "LifecycleError",
    "ManifestError",
    "NetworkMismatchError",
    "NonFiniteError",
    "NotABundleError",
    "OutOfDeviceMemoryError",
    "ParityError",
    "PlanBuildError",
    "PlanError",
    "PlanMismatchError",
    "UntrustedPlanError",
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


class OutOfDeviceMemoryError(BackendError):
    """The GPU has not the memory that was asked for."""


class GraphError(BackendError):
    """A CUDA graph could not be captured or instantiated; plain launches still work."""


class PlanError(BackendError):
    """A TensorRT plan that cannot be built or used."""


class PlanBuildError(PlanError):
    """TensorRT refuses the network, or cannot build for this GPU."""


class PlanMismatchError(PlanError):
    """A plan for another library, version, GPU, CUDA or network."""


class DamagedPlanError(PlanError):
    """A plan file that is truncated or altered, or no plan file at all."""


class UntrustedPlanError(PlanError):
    """A plan that this user did not build; loading one runs its code."""


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
