"""`python -m memkernels.bench`."""

import argparse

from memkernels.bench.cli import add_arguments, run

parser = argparse.ArgumentParser(prog="python -m memkernels.bench", description="Measure providers against each other.")
add_arguments(parser)
raise SystemExit(run(parser.parse_args()))
