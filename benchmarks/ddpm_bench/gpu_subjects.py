"""The networks a GPU is measured with, each in every precision and, where it can be, in PyTorch."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ddpm_runtime.bundle import Bundle, read_bundle
from ddpm_runtime.errors import ConfigurationError, missing_extra

__all__ = ["SHIPPED_ENGINE", "Subject", "cifar_subject", "subject_from_engine"]

SHIPPED_ENGINE = Path(__file__).parents[2] / "train" / "pretrained" / "fashion-mnist.engine"


@dataclass(kw_only=True, eq=False)
class Subject:
    """One network.

    Args:
        name: part of a case's id.
        bundle: as it was exported.
        network: gives the same network in PyTorch, with the same weights; None if there is none.
        no_network: why there is none.
    """

    name: str
    bundle: Bundle
    network: Callable[[], Any] | None = None
    no_network: str = ""
    _lowered: dict[str, Bundle] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """What the bundle was exported in."""
        return self.bundle.manifest.network.precision

    def in_precision(self, precision: str) -> Bundle:
        """The bundle in another precision, lowered in memory: for speed, behind no parity gate.

        Raises:
            BackendUnavailableError: the export extra is not installed.
            ConfigurationError: the bundle is not float32, or cannot be lowered.
            ParityError: a weight is too large for the precision.
        """
        if precision == self.precision:
            return self.bundle
        if precision not in self._lowered:
            self._lowered[precision] = _lowered(self.bundle, precision)
        return self._lowered[precision]


def subject_from_engine(path: Path) -> Subject:
    """An engine bundle; its PyTorch network is the ``NAME/model.pt`` beside ``NAME.engine``.

    Raises:
        BundleError: not an engine bundle.
    """
    bundle = read_bundle(path)
    subject = Subject(name=bundle.manifest.name, bundle=bundle)
    checkpoint = path.with_suffix("") / "model.pt"
    expected = bundle.manifest.provenance.get("checkpoint_sha256")
    if not checkpoint.is_file():
        subject.no_network = f"no {checkpoint.parent.name}/{checkpoint.name} beside {path.name}"
    elif hashlib.sha256(checkpoint.read_bytes()).hexdigest() != expected:
        subject.no_network = f"{checkpoint.name} is not the checkpoint {path.name} was made from"
    else:
        subject.network = lambda: _network(checkpoint)
    return subject


def cifar_subject() -> Subject:
    """Ho et al.'s CIFAR-10 network: 35.7 M parameters, weights from a seed, exported now.

    Raises:
        BackendUnavailableError: the export extra is not installed.
    """
    try:
        from .peer_networks import NETWORKS, make_bundle, make_network

        config = NETWORKS["cifar-10"]
        network = make_network(config)
        path = make_bundle(network, config, "cifar-10")
    except ImportError as error:
        raise missing_extra(str(error.name), "make the CIFAR-10 network", "export") from error
    try:
        return Subject(name="cifar-10", bundle=read_bundle(path), network=lambda: network)
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)


def _network(checkpoint: Path) -> Any:
    from ddpm_train.checkpoint import load_checkpoint, network_from_checkpoint

    return network_from_checkpoint(load_checkpoint(checkpoint)).requires_grad_(False)


def _lowered(bundle: Bundle, precision: str) -> Bundle:
    own = bundle.manifest.network.precision
    if own != "fp32":
        raise ConfigurationError(
            f"the engine is in {own}, and only a float32 one can be measured in {precision} too."
        )
    try:
        from ddpm_export.precision import lower_precision
    except ImportError as error:
        wanted = f"lower the network to {precision}"
        raise missing_extra(str(error.name), wanted, "export") from error
    network = msgspec.structs.replace(bundle.manifest.network, precision=precision)
    return dataclasses.replace(
        bundle,
        manifest=msgspec.structs.replace(bundle.manifest, network=network),
        network_bytes=lower_precision(bundle.network_bytes, precision),
    )
