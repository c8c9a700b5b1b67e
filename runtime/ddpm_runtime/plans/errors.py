"""What can go wrong with a TensorRT plan, beside the exceptions everybody shares.

BackendError
└── PlanError
    ├── PlanBuildError      TensorRT refuses the network, or cannot build for this GPU
    ├── PlanMismatchError   a plan for another library, version, GPU, CUDA or network
    ├── DamagedPlanError    a plan file that is truncated or altered, or no plan file at all
    └── UntrustedPlanError  a plan that this user did not build; loading one runs its code
"""

from __future__ import annotations

from ..errors import BackendError

__all__ = [
    "DamagedPlanError",
    "PlanBuildError",
    "PlanError",
    "PlanMismatchError",
    "UntrustedPlanError",
]


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
