"""The name of ``slurm.attempt`` in batch scripts of older versions."""

import sys

from slurm.attempt import main

if __name__ == "__main__":
    sys.exit(main())
