"""`python -m ds_gradprune`: the same as the command `ds-gradprune`."""

from __future__ import annotations

import sys

from ds_gradprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
