"""Lists the internals of torch and transformers that ti_fx replaces or uses, and compares them with what is installed.

A row that is gone or takes other parameters is an error that names the installed version, and not a user's mistake.
"""

from __future__ import annotations

import inspect
import pkgutil
import sys
from dataclasses import dataclass
from typing import Any

from ti_fx.errors import VersionError

# The releases that everything was run with, oldest first. setup.cfg takes no older ones.
KNOWN = {"torch": ("2.13",), "transformers": ("5.23",)}


@dataclass(frozen=True)
class Internal:
    """An attribute of a library that the library does not promise to keep.

    Attributes:
        name: dotted, from the library's name on.
        parameters: as ``inspect.signature`` writes them, without annotations and defaults; None: any, or no function.
        why: what is done with it, and for what.
    """

    name: str
    parameters: str | None
    why: str


INTERNALS = (
    Internal(
        "torch.backends.mha.get_fastpath_enabled",
        "()",
        "read, so that the fast path can be put back as it was",
    ),
    Internal(
        "torch.backends.mha.set_fastpath_enabled",
        "(value)",
        "switched off: the fast path computes nothing at padding (zeros come out), and only in eval mode",
    ),
    Internal(
        "torch.nn.modules.transformer._detect_is_causal_mask",
        "(mask, is_causal, size)",
        "replaced: without a hint it compares the mask's values, and its answer only chooses a kernel",
    ),
    Internal(
        "torch.distributions.distribution.Distribution._validate_args",
        None,
        "set to False: a look at the arguments' values computes nothing",
    ),
    Internal(
        "torch._C._InferenceMode",
        None,
        "replaced by a region without gradients: a trace does not see inference mode, and would train what it holds",
    ),
    Internal(
        "torch.fx.node._side_effectful_functions",
        None,
        "gets the regions without gradients: one that only writes into a buffer would be left out",
    ),
    Internal(
        "torch.nn.modules.module.Module.to",
        "(self, *args, **kwargs)",
        "replaced where it would change nothing: a trace can't swap weights",
    ),
    Internal(
        "torch._C._nn._parse_to",
        None,
        "read, for the dtype that Module.to is asked for",
    ),
    Internal(
        "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_expr",
        "(self, orig_expr, hint, fx_node, size_oblivious, fallback_value, *, forcing_spec)",
        "replaced in a loop over what a mask selects: no selection is empty there",
    ),
    Internal(
        "torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode",
        None,
        "read: what ShapeEnv raises on a condition that depends on values",
    ),
    Internal(
        "torch._inductor.codegen.cpp.CppKernel.need_use_acc_helper",
        "(self, reduction_type, dtype, use_scalar)",
        "replaced for good: it guards the number of addends, so another batch would compile a graph again",
    ),
    Internal(
        "torch.onnx._internal.exporter._fx_passes.decompose_with_registry",
        "(exported_program, registry)",
        "replaced where there is nothing to decompose: it traces the graph once more, half of an export's time",
    ),
    Internal(
        "transformers.masking_utils._vmap_expansion_sdpa",
        "(mask_function)",
        "replaced by a broadcast: a graph can't hold vmap's batched tensors",
    ),
    Internal(
        "transformers.masking_utils._non_vmap_expansion_sdpa",
        "(batch_indices, head_indices, q_indices, kv_indices)",
        "read, for the indices that are broadcast",
    ),
    Internal(
        "transformers.masking_utils.TransformGetItemToIndex",
        "()",
        "replaced by nothing: it is for vmap alone",
    ),
    Internal(
        "transformers.utils.import_utils.torch_compilable_check",
        "(cond, msg, error_type)",
        "replaced by a node that checks: it looks at values and computes nothing",
    ),
    Internal(
        "torch._check_with",
        "(error_type, cond, message)",
        "replaced by a node that checks, where the model calls it: a trace loses its message",
    ),
    Internal(
        "torch._check_tensor_all_with",
        "(error_type, cond, message)",
        "replaced by a node that checks, where the model calls it: a trace loses its message",
    ),
    Internal(
        "transformers.modeling_utils.PreTrainedModel.set_attn_implementation",
        "(self, attn_implementation, allow_all_kernels)",
        "called, for eager attention: the map must be in the graph",
    ),
    Internal(
        "transformers.configuration_utils.PreTrainedConfig._attn_implementation_internal",
        None,
        "put back as it was, in every configuration of the model",
    ),
    Internal(
        "transformers.modeling_utils.PreTrainedModel.set_experts_implementation",
        "(self, experts_implementation)",
        "called, for experts as batched products: a loop over those that are hit depends on values",
    ),
    Internal(
        "transformers.configuration_utils.PreTrainedConfig._experts_implementation_internal",
        None,
        "put back as it was, in every configuration of the model",
    ),
)

_ROWS = {internal.name: internal for internal in INTERNALS}


def known_internal(name: str, owner: Any = None) -> Any:
    """Return what is installed under a name of ``INTERNALS``; ``owner`` is the object that has it, if no module has.

    Raises:
        VersionError: it is not there, or takes other parameters.
    """
    internal = _ROWS[name]
    owner_name, _, attribute = name.rpartition(".")
    try:
        found = getattr(pkgutil.resolve_name(owner_name) if owner is None else owner, attribute)
    except (ImportError, AttributeError):
        raise _version_error(name, f"{name}{internal.parameters or ''} is not there") from None
    if internal.parameters is not None:
        parameters = _parameters(found)
        if parameters != internal.parameters:
            raise _version_error(name, f"{name} takes {parameters} instead of {internal.parameters}")
    return found


def _parameters(function: Any) -> str:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "what can't be told"
    nothing = inspect.Parameter.empty
    bare = [one.replace(annotation=nothing, default=nothing) for one in signature.parameters.values()]
    return str(inspect.Signature(bare))


def _version_error(name: str, what: str) -> VersionError:
    library = name.partition(".")[0]
    installed = sys.modules[library].__version__.partition("+")[0]
    known = KNOWN[library]
    return VersionError(
        f"ti_fx knows {library} {', '.join(known)}, this is {installed}: {what}; install {library} {known[-1]} or "
        "report this"
    )
