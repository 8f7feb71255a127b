"""`python -m benchmarks.fuzz`."""

import sys

from benchmarks.fuzz.cli import main

if __name__ == "__main__":
    sys.exit(main())
