"""Python runs this as it starts, where this folder is on PYTHONPATH: see simulated_machine.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
import simulated_machine

simulated_machine.install_here()
