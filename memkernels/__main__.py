"""`python -m memkernels`."""

from memkernels.cli import main

raise SystemExit(main())
