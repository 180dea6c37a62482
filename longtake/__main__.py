"""`python -m longtake`: the same as the command `longtake`."""

from __future__ import annotations

import sys

from longtake.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
