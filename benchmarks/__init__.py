"""Benchmarks of the loss and of the matching against their rivals; `python -m benchmarks --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "docs" / "examples"))  # some suites run parts of the demo
