"""Where the tests find what lies in the checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
ZOO_RESULTS = ROOT / "docs" / "zoo.json"  # what the last whole run of `ti-fx zoo` found
