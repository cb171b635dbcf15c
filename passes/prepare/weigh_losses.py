"""Let the weights of some losses be tensors, so that they move from step to step without another graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ti_fx.errors import PostconditionError, PreconditionError
from ti_fx.ir import moved
from ti_fx.ir.outputs import prepared_result
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PREPARED


@dataclass(frozen=True)
class WeighLosses(Pass):
    """The weights of the chosen terms are read from buffers; until something moves these, values stay as they are.

    before:  %loss = weighted([%loss_logits, %loss_scores], [1.0, 2.0])
    after:   %loss_scores_weight = loss_weights.scores
             %loss = weighted([%loss_logits, %loss_scores], [1.0, %loss_scores_weight])

    A phase with ``weights`` runs it on its own graph and moves them by its curves. Terms that are not chosen have their
    number again.

    Attributes:
        terms: of Distill (``logits``, ``scores``), those whose weights are learned excepted.
    """

    takes = (PREPARED,)

    terms: tuple[str, ...] = ()

    def requires(self, gm: GraphModule) -> None:
        """Losses, with these terms among them."""
        result = prepared_result(gm)
        if result is None:
            raise PreconditionError("weigh-losses needs losses", missing="distill")
        known = moved.weights(result)
        for term in self.terms:
            if term not in known:
                raise PreconditionError(
                    f"{self} finds no loss of the term {term!r}, which this model has none of or whose weight is 0; "
                    f"there are {', '.join(known) or 'none'}"
                )
            if term in moved.log_variances(gm):
                raise PreconditionError(
                    f"{self}: the weight of {term} is learned; take it out of distill{{learned}}"
                )

    def apply(self, gm: GraphModule) -> None:
        """Read buffers for the chosen terms, and numbers for the others."""
        for term in moved.scheduled(gm).keys() - set(self.terms):
            moved.unschedule(gm, term)
        for term in self.terms:
            moved.schedule(gm, term)

    def ensures(self, gm: GraphModule) -> None:
        """The chosen weights are read, and no others."""
        if set(moved.scheduled(gm)) != set(self.terms):
            raise PostconditionError(
                f"{self} left the weights of {', '.join(moved.scheduled(gm))} to be moved"
            )
