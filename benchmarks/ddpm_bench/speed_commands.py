"""Every sub-command that measures speed, for cli.py to register."""

from __future__ import annotations

from .compare_command import compare_command
from .gpu_command import gpu_command
from .latency_command import latency_command
from .memory_command import memory_command
from .peers_command import peers_command
from .profile_command import profile_command
from .results_command import results_command
from .roofline_command import roofline_command
from .startup_command import startup_command
from .step_cache_command import step_cache_command
from .throughput_command import throughput_command
from .whole_command import whole_command

__all__ = ["SPEED_COMMANDS"]

SPEED_COMMANDS = (
    latency_command,
    throughput_command,
    startup_command,
    memory_command,
    roofline_command,
    peers_command,
    profile_command,
    whole_command,
    step_cache_command,
    gpu_command,
    compare_command,
    results_command,
)
