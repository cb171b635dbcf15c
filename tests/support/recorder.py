"""Run a graph and record what every node gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node


class Recorder(Interpreter):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def run_recorded(gm: GraphModule, example: dict[str, Tensor]) -> dict[str, Any]:
    torch.manual_seed(0)
    recorder = Recorder(gm)
    recorder.run(*example.values())
    return recorder.values
