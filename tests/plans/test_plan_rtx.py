"""Real plans, ahead of time and without a GPU, by TensorRT-RTX from a network this project exports.

The whole matrix with the 35.7 M network is a command: python -m ddpm_export.plan_table
"""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner
from fake_tensorrt import API

from ddpm_export.plan_table import plan_table
from ddpm_export.precision import lower_precision
from ddpm_export.precision_table import untrained_bundle
from ddpm_runtime.bundle import write_bundle
from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.plans import (
    PlanBuildError,
    PlanCache,
    PlanSpec,
    library_of,
    load_library,
    plan_from_cache,
    plan_from_onnx,
)
from ddpm_train.unet import UNetConfig

tensorrt_rtx = pytest.importorskip(
    "tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'ddpm-engine[rtx]'"
)

SMALL = UNetConfig(
    image_size=16,
    image_channels=1,
    channels=16,
    channel_multipliers=(1, 2),
    residual_blocks=1,
    attention_resolutions=(8,),
    num_classes=3,
    norm_groups=8,
)
PRECISIONS = ("fp32", "fp16", "bf16")


@pytest.fixture(scope="module")
def library():
    return load_library("tensorrt_rtx")


@pytest.fixture(scope="module")
def bundle():
    return untrained_bundle(SMALL)


@pytest.fixture(scope="module")
def network(bundle):
    return bundle.network_bytes


@pytest.fixture(scope="module")
def networks(network):
    return {precision: lower_precision(network, precision) for precision in PRECISIONS}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sm", [80, 86, 89, 120])
def test_a_plan_is_built_for_each_architecture_in_each_precision(library, networks, sm, precision):
    spec = PlanSpec(buckets=(4,), precision=precision, sms=(sm,))
    built = plan_from_onnx(library, networks[precision], spec)
    assert len(built.payload) > 0.5 * len(networks[precision])
    assert built.layers > 50


def test_one_plan_holds_several_architectures_and_batch_sizes(library, networks):
    spec = PlanSpec(buckets=(1, 2, 4), precision="fp16", sms=(80, 86, 89, 120))
    assert plan_from_onnx(library, networks["fp16"], spec).payload


def test_hopper_is_refused_with_our_message(library, networks):
    with pytest.raises(ConfigurationError, match=r"cannot build for compute capability 9\.0"):
        plan_from_onnx(library, networks["fp16"], PlanSpec(buckets=(1,), sms=(90,)))


def test_a_file_that_is_no_network_is_refused_with_our_message(library):
    with pytest.raises(PlanBuildError, match="cannot read the network"):
        plan_from_onnx(library, b"not a network", PlanSpec(buckets=(1,), sms=(89,)))


def test_a_plan_goes_through_the_cache(library, networks, tmp_path):
    cache, said = PlanCache(tmp_path / "plans"), []
    spec = PlanSpec(buckets=(2,), precision="fp16", sms=(89,))

    def ask(spec):
        return plan_from_cache(
            networks["fp16"], spec, library, None, cache, label="small", notice=said.append
        )

    first = ask(spec)
    assert ask(spec).payload == first.payload
    assert "the compute capability: 8.9 → 8.6" in ask(dataclasses.replace(spec, sms=(86,))).reason
    assert len([message for message in said if message.startswith("built in")]) == 2


def test_the_table_command_builds_and_reports_what_is_refused(bundle, tmp_path):
    write_bundle(tmp_path / "small.engine", bundle.manifest, bundle.network_bytes)
    output = tmp_path / "table.json"
    arguments = [str(tmp_path / "small.engine"), "--precision", "fp16", "--sm", "89", "--sm", "90"]
    done = CliRunner().invoke(plan_table, [*arguments, "--bucket", "2", "--json", str(output)])
    assert done.exit_code == 0, done.output
    built, refused = json.loads(output.read_text())["plans"]
    assert built["plan_bytes"] > 10_000
    assert "cannot build for compute capability 9.0" in refused["refused"]


def test_the_recorded_api_is_the_installed_one(library):
    recorded = API["rtx"]
    if library.version != recorded["version"]:
        pytest.skip(f"tensorrt_rtx {library.version} here, {recorded['version']} recorded")
    for name, members in recorded["classes"].items():
        assert set(members) == {m for m in dir(getattr(tensorrt_rtx, name)) if m[0] != "_"}
    assert library_of(tensorrt_rtx) is library
