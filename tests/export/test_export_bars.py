"""The published bars of the exporter, on the network of the paper."""

from __future__ import annotations

import time

import pytest
from tiny_export import redrawn_network, save

from ddpm_export.pipeline import ExportOptions, bundle_from_checkpoint
from ddpm_train.unet import UNetConfig


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_cifar_10_network_of_ho_et_al_exports_within_its_bars(tmp_path):
    """35.7 M parameters: relative error ≤ 1e-5 per evaluation, export in under a minute."""
    network = redrawn_network(UNetConfig(image_size=32, image_channels=3))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(35.7e6, rel=0.01)
    spec = {"name": "linear", "num_train_timesteps": 1000}
    path = save(network, tmp_path / "cifar.pt", schedule_spec=spec)
    begun = time.process_time()  # of one thread: other work on the machine does not count
    report = bundle_from_checkpoint(path, options=ExportOptions(threads=1)).parity
    seconds = time.process_time() - begun
    print(report)
    print(f"{seconds:.1f} s of CPU time")
    assert report.worst.relative_error <= 1e-5
    assert report.rows_identical
    assert report.sampled.max_abs_difference <= 1e-3
    assert report.sampled.within_one_level >= 0.999
    assert seconds < 60
