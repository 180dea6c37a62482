"""`python -m longtake.training.experiment`."""

from __future__ import annotations

import sys

from longtake.training.experiment.cli import main

sys.exit(main())
