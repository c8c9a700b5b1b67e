"""Folders saved by diffusers: the engine samples what diffusers samples."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from ddpm_export.pipeline import ExportOptions, bundle_from_checkpoint
from ddpm_export.sources import network_from_path
from ddpm_runtime import Engine
from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.errors import CheckpointError
from ddpm_runtime.noise import noise
from ddpm_runtime.schedule import make_schedule

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def small_unet(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**settings, **changes}).eval()


@pytest.fixture(scope="module")
def unet():
    return small_unet()


@pytest.fixture
def folder(unet, tmp_path):
    path = tmp_path / "flowers"
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(path)
    return path


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_engine_follows_diffusers_own_sampler(unet, folder):
    bundle_from_checkpoint(folder, options=ExportOptions(threads=1))
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(10)
    x = torch.tensor(np.stack([noise(3, index, 0, 192).reshape(3, 8, 8) for index in range(2)]))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    with Engine.load(folder.with_suffix(".engine"), threads=1) as engine:
        assert engine.manifest.name == "flowers"
        images = engine.sample(2, seed=3, steps=10, sampler="ddim", output="float32")
    assert np.abs(images - x.numpy()).max() < 1e-3


def test_a_model_folder_with_a_scheduler_beside_it_is_read(unet, tmp_path):
    unet.save_pretrained(tmp_path / "m")
    DDPMScheduler(clip_sample=False, prediction_type="v_prediction").save_pretrained(tmp_path / "m")
    trained = network_from_path(tmp_path / "m")
    assert trained.prediction_type == "v_prediction"
    assert not trained.clip_denoised
    assert (trained.image.height, trained.image.channels, trained.num_classes) == (8, 3, 0)
    sample, timestep = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 400.0])
    with torch.no_grad():
        assert torch.equal(trained.network(sample, timestep), unet(sample, timestep).sample)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta_start": 1e-3, "beta_end": 0.01, "num_train_timesteps": 300},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    ],
)
def test_every_schedule_is_diffusers_own(unet, tmp_path, settings):
    theirs = DDPMScheduler(**settings)
    unet.save_pretrained(tmp_path / "m")
    theirs.save_pretrained(tmp_path / "m")
    ours = make_schedule(**network_from_path(tmp_path / "m").schedule_spec)
    # theirs are float32 tables; the product of a thousand of them is good to about 1e-5
    assert np.abs(ours.betas / theirs.betas.numpy() - 1).max() < 2e-4
    assert np.abs(ours.alphas_cumprod - theirs.alphas_cumprod.numpy()).max() < 1e-5


def test_provenance_names_the_weights_and_no_path(folder, tmp_path):
    bundle_from_checkpoint(folder, options=ExportOptions(threads=1))
    provenance = read_bundle(folder.with_suffix(".engine")).manifest.provenance
    assert provenance["source"] == f"diffusers {diffusers.__version__}"
    assert len(provenance["checkpoint_sha256"]) == 64
    assert str(tmp_path) not in json.dumps(provenance)


REFUSED = {
    "another architecture": (
        lambda path: rewrite(path / "unet" / "config.json", _class_name="UNet2DConditionModel"),
        "only UNet2DModel",
    ),
    "no weights": (
        lambda path: (path / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        "safe_serialization=True",
    ),
    "cut weights": (
        lambda path: (path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut"),
        "diffusers cannot read",
    ),
    "weights of another network": (
        lambda path: rewrite(path / "unet" / "config.json", layers_per_block=2),
        "diffusers cannot read",
    ),
    "no scheduler": (
        lambda path: (path / "scheduler" / "scheduler_config.json").unlink(),
        "scheduler_config",
    ),
    "a configuration that is not JSON": (
        lambda path: (path / "unet" / "config.json").write_text("{"),
        "not JSON",
    ),
    "a configuration that is a list": (
        lambda path: (path / "unet" / "config.json").write_text("[]"),
        "not a JSON object",
    ),
    "no size": (
        lambda path: rewrite(path / "unet" / "config.json", sample_size=None),
        "malformed",
    ),
    "another kind of scheduler": (
        lambda path: rewrite(path / "scheduler" / "scheduler_config.json", beta_schedule=None),
        "no noise schedule",
    ),
    "zero terminal SNR": (
        lambda path: rewrite(
            path / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True
        ),
        "zero terminal SNR",
    ),
    "a clip at 2": (
        lambda path: rewrite(path / "scheduler" / "scheduler_config.json", clip_sample_range=2.0),
        "clip_sample_range",
    ),
    "an unknown prediction": (
        lambda path: rewrite(path / "scheduler" / "scheduler_config.json", prediction_type="flow"),
        "predicts 'flow'; possible: epsilon",
    ),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_a_folder_that_cannot_be_exported_is_refused(folder, tmp_path, damage):
    change, said = REFUSED[damage]
    change(folder)
    with pytest.raises(CheckpointError, match=said):
        bundle_from_checkpoint(folder, tmp_path / "x.engine")
    assert {entry.name for entry in tmp_path.iterdir()} == {"flowers"}


def test_pickled_weights_beside_the_configuration_are_never_read(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="other forms are not read"):
        network_from_path(folder)


def test_a_class_conditional_network_is_refused(tmp_path):
    small_unet(num_class_embeds=4).save_pretrained(tmp_path / "m")
    DDPMScheduler().save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match="no class"):
        network_from_path(tmp_path / "m")
