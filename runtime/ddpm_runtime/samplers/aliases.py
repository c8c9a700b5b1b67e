"""Names by which users of diffusers, k-diffusion and their web interfaces know our samplers.

Spelling does not matter: case, spaces, dashes and underscores are ignored, "++" is "pp". An alias
may imply options; what the user says explicitly wins. An alias is given only where the method is
the same; a scheduler we do not have is unknown, not approximated.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ALIASES", "resolve_alias", "spelling"]

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    # diffusers
    "DDPMScheduler": ("ddpm", {}),
    "DDIMScheduler": ("ddim", {}),
    "EulerDiscreteScheduler": ("euler", {}),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", {}),
    "HeunDiscreteScheduler": ("heun", {}),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", {}),
    "DPMSolverSinglestepScheduler": ("dpmpp_2s", {}),
    "EDMEulerScheduler": ("euler", {}),
    "EDMDPMSolverMultistepScheduler": ("dpmpp_2m", {}),
    "UniPCMultistepScheduler": ("unipc", {}),
    "PNDMScheduler": ("plms", {}),
    "IPNDMScheduler": ("ipndm", {}),
    # k-diffusion
    "sample_euler": ("euler", {}),
    "sample_euler_ancestral": ("euler_ancestral", {}),
    "sample_heun": ("heun", {}),
    "sample_dpmpp_2m": ("dpmpp_2m", {}),
    "sample_dpmpp_2m_sde": ("dpmpp_2m_sde", {}),
    # web interfaces, papers, and habits
    "ancestral": ("ddpm", {}),
    "euler_a": ("euler_ancestral", {}),
    "k_euler": ("euler", {}),
    "k_euler_a": ("euler_ancestral", {}),
    "k_heun": ("heun", {}),
    "edm": ("heun", {}),
    "dpm_solver++": ("dpmpp_2m", {}),
    "dpm_solver++_2m": ("dpmpp_2m", {}),
    "dpm_solver++_2m_sde": ("dpmpp_2m_sde", {}),
    "dpm_solver++_sde_2m": ("dpmpp_2m_sde", {}),
    "dpm_solver++_3m": ("dpmpp_3m", {}),
    "dpm_solver++_2s": ("dpmpp_2s", {}),
    "dpm_solver++_3s": ("dpmpp_3s", {}),
    "sde_dpm_solver++_2m": ("dpmpp_2m_sde", {}),
    "dpm++_2m": ("dpmpp_2m", {}),
    "dpm++_3m": ("dpmpp_3m", {}),
    "dpm++_2m_sde": ("dpmpp_2m_sde", {}),
    "dpm++_2s": ("dpmpp_2s", {}),
    "dpm_solver": ("dpm_solver_2s", {}),
    "dpm_solver_2": ("dpm_solver_2s", {}),
    "dpm_solver_3": ("dpm_solver_3s", {}),
    "uni_pc": ("unipc", {}),
    "uni_pc_bh1": ("unipc", {"solver_type": "bh1"}),
    "uni_pc_bh2": ("unipc", {"solver_type": "bh2"}),
    "unipc_2": ("unipc", {"order": 2}),
    "unipc_3": ("unipc", {"order": 3}),
    "pndm": ("plms", {}),
    "ipndm_1": ("ipndm", {"order": 1}),
    "ipndm_2": ("ipndm", {"order": 2}),
    "ipndm_3": ("ipndm", {"order": 3}),
    "ipndm_4": ("ipndm", {"order": 4}),
    "annealed_langevin": ("langevin", {}),
    "ald": ("langevin", {}),
    "pc": ("predictor_corrector", {}),
    "predictor-corrector": ("predictor_corrector", {}),
}


def resolve_alias(name: str) -> tuple[str, dict[str, Any]] | None:
    """Our sampler and the options an alias implies, or None if it is no alias."""
    found = _BY_SPELLING.get(spelling(name))
    return (found[0], dict(found[1])) if found else None


def spelling(name: str) -> str:
    """What is left of a name when its spelling is ignored."""
    lower = name.lower().replace("++", "pp")
    return "".join(letter for letter in lower if letter.isalnum())


_BY_SPELLING = {spelling(alias): meaning for alias, meaning in ALIASES.items()}
