"""Runs the command line."""

import sys

from benchmarks.simulate.cli import main

sys.exit(main())
