"""An engine in sixteen bits, from a checkpoint or an engine: measured and passed, or not there."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from tiny_export import save

import ddpm_export.pipeline
from ddpm_export.again import bundle_from_engine
from ddpm_export.destination import PRECISIONS
from ddpm_export.onnx_graph import onnx_from_network
from ddpm_export.pipeline import ExportOptions, bundle_from_checkpoint
from ddpm_export.precision_graph import LOW_PRECISIONS, typed_graph
from ddpm_export.precision_report import TOLERANCES
from ddpm_runtime import Engine
from ddpm_runtime.bundle import read_bundle, write_bundle
from ddpm_runtime.errors import (
    ConfigurationError,
    IntegrityError,
    NotABundleError,
    ParityError,
)


@pytest.fixture
def engine(bundle, tmp_path):
    """A float32 engine on disk."""
    write_bundle(tmp_path / "tiny.engine", bundle.manifest, bundle.network_bytes)
    return tmp_path / "tiny.engine"


@pytest.fixture
def enlarged(network, tmp_path, monkeypatch):
    """Checkpoints of the network with one weight multiplied: large, which float32 does not mind."""

    def save_enlarged(factor):
        changed = copy.deepcopy(network)
        with torch.no_grad():
            changed.down[1].conv.weight.mul_(factor)
        exported = onnx_from_network(changed, (1, 8, 8), num_classes=3)
        monkeypatch.setattr(ddpm_export.pipeline, "onnx_from_network", lambda *_, **__: exported)
        return save(changed, tmp_path / "large.pt")

    return save_enlarged


def export(path, output, precision, **options):
    asked = ExportOptions(precision=precision, threads=1)
    return bundle_from_checkpoint(path, output, options=asked, **options)


def lower(path, output=None, *, precision="fp16", **options):
    return bundle_from_engine(path, output, precision=precision, threads=1, **options)


def test_the_precisions_are_float32_and_those_it_can_be_lowered_to():
    assert ("fp32", *LOW_PRECISIONS) == PRECISIONS
    assert LOW_PRECISIONS.keys() == TOLERANCES.keys()


# --- from a checkpoint ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_checkpoint_is_exported_in_sixteen_bits_with_both_reports(
    checkpoint_path, network_bytes, tmp_path, precision, monkeypatch
):
    monkeypatch.setattr(ddpm_export.pipeline, "onnx_from_network", lambda *_, **__: network_bytes)
    report = export(checkpoint_path, tmp_path / "low.engine", precision)
    manifest = read_bundle(tmp_path / "low.engine").manifest
    assert manifest.network.precision == precision
    assert manifest.parity == json.loads(
        json.dumps({**report.parity.to_dict(), "precision": report.precision.to_dict()})
    )
    assert manifest.parity["passed"] is True
    assert manifest.parity["precision"]["passed"] is True
    assert str(report).endswith("precision: passed")
    assert "parity: passed" in str(report)
    # the very network that passed the first gate, lowered by the one who has only the engine
    export(checkpoint_path, tmp_path / "full.engine", "fp32", name="low")
    lower(tmp_path / "full.engine", tmp_path / "again.engine", precision=precision)
    for file in ("network.onnx", "manifest.json"):
        one, other = (tmp_path / name / file for name in ("low.engine", "again.engine"))
        assert one.read_bytes() == other.read_bytes()


def test_the_network_is_named_by_the_checkpoint_whatever_the_precision(command, checkpoint_path):
    code, out, _ = command(checkpoint_path, "--precision", "fp16", "--threads", 1)
    assert code == 0
    output = checkpoint_path.with_name("model.fp16.engine")
    assert read_bundle(output).manifest.name == "garments"  # its directory: "model" says nothing
    lines = out.splitlines()
    tables = [line for line in lines if line.split()[:2] == ["timestep", "relative"]]
    assert len(tables) == 2
    assert lines.index("parity: passed") < lines.index("precision: passed")
    assert lines[-1].startswith(f"{output}: ")


def test_images_in_float16_are_those_in_float32_but_for_rounding(command, checkpoint_path):
    images = []
    for precision in ("fp32", "fp16"):
        assert command(checkpoint_path, "--precision", precision, "--threads", 1)[0] == 0
    for name in ("model.engine", "model.fp16.engine"):
        with Engine.load(checkpoint_path.with_name(name), threads=1) as engine:
            images.append(engine.sample(4, steps=10, label="all", output="float32"))
    # an evaluation of this network errs by 1e-3, as its table says, and ten steps add up
    assert 0 < np.abs(images[0] - images[1]).max() < 1e-2


def test_an_activation_that_overflows_is_refused_by_its_layer(enlarged, tmp_path):
    path = enlarged(1e5)  # activations pass 65504
    with pytest.raises(ParityError, match=r"overflows first at Conv down\.1\.conv"):
        export(path, tmp_path / "x.engine", "fp16")
    assert {entry.name for entry in tmp_path.iterdir()} == {"large.pt"}
    export(path, tmp_path / "x.engine", "bf16")  # which holds it


def test_a_weight_that_overflows_exits_1_naming_its_layer(enlarged, tmp_path, command):
    path = enlarged(2e6)
    code, out, err = command(path, "--precision", "fp16", "--threads", 1)
    assert (code, out) == (1, "")
    assert "(Conv down.1.conv) overflow fp16" in err
    assert err.splitlines()[-1].endswith("Export with --precision bf16 or fp32.")
    assert {entry.name for entry in tmp_path.iterdir()} == {"large.pt"}


def test_too_much_loss_exits_1_with_the_timestep(command, checkpoint_path, tmp_path, monkeypatch):
    monkeypatch.setitem(TOLERANCES, "bf16", 1e-4)
    code, _, err = command(
        checkpoint_path, "-o", tmp_path / "x.engine", "--precision", "bf16", "--threads", 1
    )
    assert code == 1
    assert "the bf16 network does not agree with the float32 network: relative error" in err
    assert "at timestep" in err
    assert "--precision fp32" in err
    assert {entry.name for entry in tmp_path.iterdir()} == {"garments"}


def test_an_unknown_precision_is_refused_before_any_work(checkpoint_path, tmp_path, command):
    said = []
    with pytest.raises(ConfigurationError, match="Did you mean 'bf16'"):
        export(checkpoint_path, tmp_path / "x.engine", "bf161", progress=said.append)
    assert said == []
    code, _, err = command(checkpoint_path, "--precision", "fp8")
    assert code == 2
    assert "fp16" in err


# --- from an engine ------------------------------------------------------------------------------


def test_an_engine_is_lowered_and_says_what_it_came_from(engine, bundle):
    report = lower(engine, precision="bf16")
    low = read_bundle(engine.with_name("tiny.bf16.engine")).manifest
    assert (low.name, low.network.precision, low.network.opset) == ("tiny", "bf16", 22)
    assert low.parity["precision"]["images"] == report.images
    source = read_bundle(engine).manifest
    assert low.provenance["lowered_from_sha256"] == source.files["network.onnx"].sha256
    assert low.defaults == source.defaults


def test_the_command_lowers_an_engine(command, engine, tmp_path):
    code, out, err = command(
        engine, "--precision", "fp16", "-o", tmp_path / "x.engine", "--name", "other",
        "--threads", 1,
    )  # fmt: skip
    assert code == 0, err
    assert read_bundle(tmp_path / "x.engine").manifest.name == "other"
    assert out.splitlines()[-2] == "precision: passed"
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'x.engine'}: ")
    assert "reading" in err
    assert command(engine, "--precision", "fp16", "-o", tmp_path / "x.engine")[0] == 2


def test_lowering_an_engine_needs_no_pytorch(engine, tmp_path):
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnxscript", "safetensors", "ddpm_train"):
            raise ImportError(f"No module named {name}", name=name)
sys.meta_path.insert(0, Block())
from ddpm_export.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, engine, "--precision", "bf16", "--threads", "1"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_bundle(tmp_path / "tiny.bf16.engine").manifest.network.precision == "bf16"


def test_what_lowering_an_engine_needs_is_named_with_the_pip_line(engine):
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "onnx":
            raise ImportError(f"No module named {name}", name=name)
sys.meta_path.insert(0, Block())
from ddpm_export.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, engine, "--precision", "bf16"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: onnx is needed to write an engine in another form")
    assert "pip install 'ddpm-engine[precision]'" in done.stderr


def test_an_engine_in_sixteen_bits_is_not_lowered_again(engine, tmp_path):
    lower(engine, tmp_path / "half.engine")
    with pytest.raises(
        ConfigurationError, match=r"in fp16 already.*the float32 engine it came from"
    ):
        lower(tmp_path / "half.engine", tmp_path / "x.engine", precision="bf16")
    assert not (tmp_path / "x.engine").exists()


def test_an_engine_that_lies_about_its_precision_is_not_lowered_either(engine, bundle, tmp_path):
    lower(engine, tmp_path / "half.engine")
    half = read_bundle(tmp_path / "half.engine")
    write_bundle(tmp_path / "liar.engine", bundle.manifest, half.network_bytes)
    with pytest.raises(ConfigurationError, match="sixteen bits already"):
        lower(tmp_path / "liar.engine", tmp_path / "x.engine")
    assert not (tmp_path / "x.engine").exists()


def test_an_engine_is_never_replaced_by_its_own_lowered_form(engine, tmp_path):
    before = (engine / "manifest.json").read_bytes()
    (tmp_path / "link.engine").symlink_to(engine)
    for output in (engine, tmp_path / "link.engine"):
        with pytest.raises(ConfigurationError, match="must not replace"):
            lower(engine, output, force=True)
    assert (engine / "manifest.json").read_bytes() == before


def test_force_replaces_an_engine_that_was_lowered_before(engine, tmp_path):
    lower(engine)
    with pytest.raises(ConfigurationError, match="--force"):
        lower(engine)
    lower(engine, force=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"tiny.engine", "tiny.fp16.engine"}


def test_no_engine_and_a_damaged_engine_are_refused(engine, tmp_path):
    with pytest.raises(NotABundleError):
        lower(tmp_path / "none.engine")
    (engine / "network.onnx").write_bytes(b"cut")
    with pytest.raises(IntegrityError, match="truncated"):
        lower(engine)


def test_float32_is_nothing_to_lower_to(engine):
    with pytest.raises(ConfigurationError, match="ask for fp16, for bf16"):
        lower(engine, precision="fp32")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "is an engine already: give it to ddpm-run, or add --precision"),
        (["--force"], "is an engine already"),
        (["--precision", "fp32"], "ask for fp16, for bf16"),
        (["--precision", "fp16", "--sampler", "ddpm"], "--sampler is for the export of a check"),
        (["--precision", "fp16", "--guidance-scale", "1.0"], "--guidance-scale is for the export"),
        (["--precision", "fp16", "--tolerance", "1e-3"], "--tolerance is for the export"),
    ],
)
def test_a_command_that_means_nothing_for_an_engine_exits_2(command, engine, arguments, said):
    code, out, err = command(engine, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("error: ")


@pytest.mark.parametrize("place", ["initializer", "constant"])
def test_a_network_with_weights_in_another_file_is_refused(network_bytes, place):
    """It could name any file of this machine, which would end up in what is written."""
    model = onnx.load_model_from_string(network_bytes)
    if place == "initializer":
        tensor = next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT)
    else:
        value = onnx.helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
        model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=value))
        tensor = model.graph.node[-1].attribute[0].t
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "secret.bin"
    with pytest.raises(ConfigurationError, match="in another file"):
        typed_graph(model.SerializeToString())
