"""ddpm_runtime: sample diffusion networks anywhere, without PyTorch.

Importing this package imports NumPy and little else; an inference library is imported when an
engine is loaded, Pillow when a picture is written.
"""

from ._version import __version__
from .engine import Engine, Sample, StepEvent
from .errors import (
    BackendError,
    BackendUnavailableError,
    BundleError,
    ConfigurationError,
    DDPMError,
    IntegrityError,
    LifecycleError,
    ManifestError,
    NetworkMismatchError,
    NonFiniteError,
    NotABundleError,
    OutOfDeviceMemoryError,
    PlanError,
)
from .settings import Settings

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "BundleError",
    "ConfigurationError",
    "DDPMError",
    "Engine",
    "IntegrityError",
    "LifecycleError",
    "ManifestError",
    "NetworkMismatchError",
    "NonFiniteError",
    "NotABundleError",
    "OutOfDeviceMemoryError",
    "PlanError",
    "Sample",
    "Settings",
    "StepEvent",
    "__version__",
]
