"""A graph records facts about itself as a whole in ``gm.meta["ti_fx"]``."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule

STATE = "ti_fx"


def state(gm: GraphModule) -> dict[str, Any]:
    """Return what ti_fx recorded about the whole graph (``gm.meta["ti_fx"]``)."""
    value: dict[str, Any] = gm.meta.setdefault(STATE, {})
    return value
