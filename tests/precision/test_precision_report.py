"""export/ddpm_export/precision_report.py and its command: what sixteen bits cost."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from precision_worlds import small_unet

from ddpm_export.precision_bundle import lowered_bundle
from ddpm_export.precision_report import TOLERANCES, measure_precision
from ddpm_export.precision_table import precision_table
from ddpm_runtime.bundle import read_bundle, write_bundle
from ddpm_runtime.errors import BackendError, ConfigurationError, ParityError


@pytest.fixture(scope="module")
def reports():
    return {p: measure_precision(small_unet(), p, threads=1) for p in ("fp16", "bf16")}


def scaled_bundle(name, factor):
    """The U-Net with one weight multiplied."""
    model = onnx.load_model_from_string(small_unet().network_bytes)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, name))
    return dataclasses.replace(small_unet(), network_bytes=model.SerializeToString())


def test_the_error_of_an_evaluation_is_that_of_the_type(reports):
    # rounding error of one value is at most 2^−11 or 2^−8; a U-Net of some forty roundings in a
    # row that are independent adds up to a few times that
    for precision, unit in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
        errors = [e.relative_error for e in reports[precision].evaluations]
        assert len(errors) == 10
        assert all(0.2 * unit < error < 6 * unit for error in errors)
    ratio = reports["bf16"].worst.relative_error / reports["fp16"].worst.relative_error
    assert 4 < ratio < 16  # three bits


def test_final_images_differ_as_little(reports):
    assert reports["fp16"].steps == 20
    assert reports["fp16"].within_one_level > 0.99
    assert reports["fp16"].root_mean_square_difference < 0.01
    assert reports["bf16"].root_mean_square_difference < 0.1
    for report in reports.values():
        assert 0 < report.root_mean_square_difference <= report.max_abs_difference


def test_a_healthy_network_passes(reports):
    for report in reports.values():
        report.require()
        assert report.overflow is None
        assert "the type holds" in report.peak
        assert report.worst.relative_error < TOLERANCES[report.precision] / 2


def test_the_report_is_plain_json_and_a_table(reports):
    content = json.loads(json.dumps(reports["bf16"].to_dict()))
    assert content["passed"] is True
    assert content["evaluations"][0]["timestep"] == 999
    assert content["worst_weights"][0]["name"]
    text = str(reports["bf16"])
    assert "emulation" in text
    assert text.endswith("precision: passed")


def test_onnxruntimes_own_float16_can_be_measured_and_bfloat16_cannot(reports):
    own = measure_precision(small_unet(), "fp16", native=True, rows=2, threads=1)
    assert "its own fp16" in own.measured_by
    assert own.worst.relative_error < 1.5 * reports["fp16"].worst.relative_error
    with pytest.raises(BackendError):
        measure_precision(small_unet(), "bf16", native=True, rows=2, threads=1)


def test_overflow_is_refused_by_the_name_of_its_layer():
    bundle = scaled_bundle("down.1.conv.weight", 2e6)
    with pytest.raises(ParityError, match=r"down\.1\.conv"):  # the weights themselves
        measure_precision(bundle, "fp16", threads=1)
    report = measure_precision(scaled_bundle("down.1.conv.weight", 1e5), "fp16", rows=2, threads=1)
    with pytest.raises(ParityError, match=r"it overflows first at Conv down\.1\.conv") as caught:
        report.require()
    assert "--precision bf16 or fp32" in str(caught.value)
    assert "FAILED" in str(report)
    assert not np.isfinite(report.max_abs_difference)
    assert report.within_one_level == 0.0


def test_a_network_that_loses_too_much_is_refused_with_the_timestep(reports):
    strict = dataclasses.replace(reports["fp16"], tolerance=1e-5)
    with pytest.raises(ParityError, match=r"at timestep .*, 1e-05 is allowed"):
        strict.require()


def test_float32_has_no_such_report():
    with pytest.raises(ConfigurationError, match="possible: bf16, fp16"):
        measure_precision(small_unet(), "fp32")


def test_the_command_prints_the_table_and_writes_json(tmp_path):
    engine, output = tmp_path / "small.engine", tmp_path / "figures.json"
    write_bundle(engine, small_unet().manifest, small_unet().network_bytes)
    arguments = [str(engine), "--precision", "fp16", "--rows", "2", "--threads", "1", "--json"]
    done = CliRunner().invoke(precision_table, [*arguments, str(output)])
    assert done.exit_code == 0, done.output
    assert "precision: passed" in done.output
    (report,) = json.loads(output.read_text())["reports"]
    assert report["images"] == 2
    assert np.isfinite(report["max_abs_difference"])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_lowered_bundle_says_so_and_can_be_written_and_read(tmp_path, precision):
    bundle, report = lowered_bundle(small_unet(), precision, threads=1)
    write_bundle(tmp_path / "low.engine", bundle.manifest, bundle.network_bytes)
    read = read_bundle(tmp_path / "low.engine")
    assert read.manifest.network.precision == precision
    assert read.manifest.network.opset == (18 if precision == "fp16" else 22)
    assert read.manifest.parity["precision"]["passed"] is True
    assert read.manifest.parity["precision"]["steps"] == report.steps
    assert len(read.network_bytes) < 0.7 * len(small_unet().network_bytes)


def test_a_bundle_that_overflows_is_not_lowered():
    with pytest.raises(ParityError, match=r"Conv down\.1\.conv"):
        lowered_bundle(scaled_bundle("down.1.conv.weight", 1e5), "fp16", threads=1)
