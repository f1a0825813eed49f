"""`bench` is no installed package: it and its files come last on the path, behind an installed copy of this one."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "bench")]
