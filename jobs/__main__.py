"""`python -m jobs COMMAND ...`, the same as `blt COMMAND ...`."""

import sys

from jobs.command_line import main

if __name__ == "__main__":
    sys.exit(main())
