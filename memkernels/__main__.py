"""`python -m memkernels`."""

import os
import sys

from memkernels.cli import main

try:
    status = main()
    sys.stdout.flush()
except BrokenPipeError:
    # Who reads, as `head` does, has seen enough. Python flushes stdout once more when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 1
raise SystemExit(status)
