"""``map_ranking`` measures how far a student's attention maps put tokens in another order than its teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from ti_fx.analysis.recorded import Recorder, run, with_teacher
from ti_fx.errors import InputError
from ti_fx.find.attention import find_attention
from ti_fx.ir import roles


@dataclass(frozen=True)
class MapRanking:
    """The ranking loss of one head, a mean over the examples of the batch.

    Attributes:
        stack, layer, kind: of the attention block. head: its index.
        loss: ``Σ_r Σ_{i,j} max(0, -(s_ri - s_rj) · sign(t_ri - t_rj))`` over queries r and pairs of keys i, j, with s
            the student's map and t the teacher's; 0: every query puts the keys in the teacher's order.
    """

    stack: int
    layer: int
    kind: str
    head: int
    loss: float


def map_ranking(
    gm: GraphModule, batch: Mapping[str, Tensor], *, tokens: Tensor | None = None
) -> list[MapRanking]:
    """Compare the order of the entries in every row of every attention map, in eval mode, without interventions.

    Source: Kim et al., arXiv 2302.11812, section 3.2, after Liu et al., "Post-Training Quantization for Vision
    Transformer", NeurIPS 2021, equation 8.

    Args:
        gm: a prepared graph with decomposed attention.
        batch: its inputs by name.
        tokens: None, or ``(batch, tokens)`` with nonzero at the queries and keys that count; maps between other numbers
            of tokens are compared whole.

    Returns:
        A row a head, in the order of execution.

    Raises:
        InputError: there is no teacher, or no block has a map of the shape ``(batch, heads, queries, keys)``.
    """
    gm = with_teacher(gm)
    teacher = roles.twin_of(gm.graph)
    sites = [site for site in find_attention(gm) if site.map is not None and site.map.meta["val"].dim() == 4]
    if not sites:
        raise InputError(
            "the graph has no attention map of (batch, heads, queries, keys); run decompose-attention"
        )
    maps = [site.map for site in sites if site.map is not None]
    recorder = Recorder(gm, [*maps, *(teacher[node] for node in maps)])
    run(recorder, batch)
    rows = []
    for site, node in zip(sites, maps, strict=True):
        losses = _ranking(recorder.found[node], recorder.found[teacher[node]], tokens)
        rows += [
            MapRanking(site.stack, site.layer, site.kind, head, float(loss))
            for head, loss in enumerate(losses)
        ]
    return rows


def _ranking(student: Tensor, teacher: Tensor, tokens: Tensor | None) -> Tensor:
    """Return the loss of each head, float64 ``(heads,)``; a query at a time, as pairs of keys take much memory."""
    student, teacher = student.double(), teacher.double()
    kept = torch.ones(student.shape[0], student.shape[-1], dtype=torch.float64, device=student.device)
    if tokens is not None and (student.shape[0], *student.shape[2:]) == (*tokens.shape, tokens.shape[1]):
        kept = (tokens != 0).to(kept)
    queries = kept if student.shape[2] == student.shape[3] else torch.ones_like(student[:, 0, :, 0])
    pairs = (kept.unsqueeze(-1) * kept.unsqueeze(-2)).unsqueeze(1)
    total = torch.zeros(student.shape[:2], dtype=torch.float64, device=student.device)
    for query in range(student.shape[2]):
        mine, theirs = student[:, :, query], teacher[:, :, query]
        order = (theirs.unsqueeze(-1) - theirs.unsqueeze(-2)).sign()
        against = -(mine.unsqueeze(-1) - mine.unsqueeze(-2)) * order
        total += (against.clamp(min=0) * pairs).sum((-1, -2)) * queries[:, query, None]
    return total.mean(0)
