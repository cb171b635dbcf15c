"""What torch.export returns becomes a plain trainable graph: the first passes of every capture.

``ti_fx.frontend`` makes the graph that they start from; ``DropDead`` and ``NameSizes`` follow once the graph has been
compared with the model.
"""

from ti_fx.ir.pipeline import Pipeline
from ti_fx.ir.stages import CAPTURED
from ti_fx.passes.normalise.assign_roles import AssignRoles
from ti_fx.passes.normalise.buffer_writes import BufferWrites
from ti_fx.passes.normalise.canonicalize import Canonicalize
from ti_fx.passes.normalise.drop_assertions import DropAssertions
from ti_fx.passes.normalise.evaluate_anew import EvaluateAnew
from ti_fx.passes.normalise.inline_subgraphs import InlineSubgraphs
from ti_fx.passes.normalise.leaf_modules import LeafModules
from ti_fx.passes.normalise.merge_tied_names import MergeTiedNames
from ti_fx.passes.normalise.one_read_each import OneReadEach
from ti_fx.passes.normalise.out_of_place import OutOfPlace
from ti_fx.passes.normalise.plain_signature import PlainSignature
from ti_fx.passes.normalise.stochastic_depth import StochasticDepth
from ti_fx.passes.normalise.take_baked_inputs import TakeBakedInputs

NORMALISE = Pipeline(
    InlineSubgraphs(),
    DropAssertions(),
    PlainSignature(),
    TakeBakedInputs(),
    StochasticDepth(),
    LeafModules(),
    BufferWrites(),
    MergeTiedNames(),
    OneReadEach(),
    AssignRoles(),
    EvaluateAnew(),
    OutOfPlace(),
    Canonicalize(),
    stage=CAPTURED,
)
