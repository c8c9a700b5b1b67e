"""TensorRT plans: built on the machine that runs them, kept where only their user can write.

spec.py      what to build, and the key that decides whether a plan fits
library.py   ``tensorrt`` or ``tensorrt_rtx``, with its one logger
build.py     ONNX bytes to a plan
progress.py  one line on a terminal while that takes
sealed.py    a plan on disk: hash, seal, header
cache.py     plans by key; locks; why one was built again
loading.py   a plan for this machine, every check before any deserialisation
"""

from ..errors import (
    DamagedPlanError,
    PlanBuildError,
    PlanError,
    PlanMismatchError,
    UntrustedPlanError,
)
from .build import BuiltPlan, plan_from_onnx
from .cache import CachedPlan, PlanCache, default_cache_directory
from .engine import PlanEngine, library_failure
from .library import LIBRARIES, TensorRT, library_of, load_library
from .loading import LoadedPlan, plan_from_cache, plan_from_file
from .progress import ProgressLine
from .spec import Gpu, PlanKey, PlanSpec, buckets_for

__all__ = [
    "LIBRARIES",
    "BuiltPlan",
    "CachedPlan",
    "DamagedPlanError",
    "Gpu",
    "LoadedPlan",
    "PlanBuildError",
    "PlanCache",
    "PlanEngine",
    "PlanError",
    "PlanKey",
    "PlanMismatchError",
    "PlanSpec",
    "ProgressLine",
    "TensorRT",
    "UntrustedPlanError",
    "buckets_for",
    "default_cache_directory",
    "library_failure",
    "library_of",
    "load_library",
    "plan_from_cache",
    "plan_from_file",
    "plan_from_onnx",
]
