"""The command `ray`, whose nodes may take longer than 30 s to come up: `python -P tests/ray_command.py start ...`."""

import sys
from pathlib import Path

from ray.scripts.scripts import main

from jobs.ray_session import patient_start

# -P: this file's directory has packages of the same names as the project's.
RAY_COMMAND = (sys.executable, "-P", str(Path(__file__)))

if __name__ == "__main__":
    with patient_start():
        main()
