"""`bench` is no installed package: its folder comes last on the path, behind an installed copy of this one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
