"""`python -m qwenopt.cli`: the same as the `qwenopt` command."""

from __future__ import annotations

import sys

from qwenopt.cli import main

sys.exit(main())
