"""The model's own loss, as a function of outputs, labels and inputs: what its forward computes between the two.

The forward of a transformers head is the only place that says what its loss is: which labels are shifted, ignored or
turned into a decoder's inputs. So nothing is looked up by the kind of head. A forward that calls the model's
``loss_function`` on its outputs and labels as they are is seen to do so, and that function is the loss. Any other is
captured with labels, and the nodes between outputs and loss are the loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from ti_fx.errors import DataError, InputError, TiFxError, first_line
from ti_fx.frontend.capture import capture
from ti_fx.ir.edit import ancestors, mode, stored
from ti_fx.ir.inputs import require_inputs
from ti_fx.ir.outputs import named_leaves

CLOSE = 1e-5  # how near the loss of outputs and labels is to the forward's, relative
LOSS = "loss"
COMPUTED = "computed"
_PLAIN = (bool, int, float, str, type(None))

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TaskLoss:
    """The model's own loss.

    Attributes:
        compute: outputs, labels and inputs by name to the loss, a scalar.
        called: whether it is a call of the model's own ``loss_function``; else a part of its captured forward.
    """

    compute: Callable[[Tensors, Tensors, Tensors], Tensor]
    called: bool

    def __call__(self, outputs: Any, labels: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a model's output structure, of labels and inputs by name.

        Raises:
            DataError: the labels are beyond the model's outputs.
        """
        try:
            return self.compute(leaves(outputs), dict(labels), dict(inputs))
        except (IndexError, InputError) as error:  # torch's "Target 7 is out of bounds."
            names = ", ".join(labels)
            raise DataError(
                f"the model's loss can't take the labels in {names}: {first_line(error)}; "
                "make them fit the model's outputs"
            ) from error


def own_loss(model: nn.Module, inputs: Tensors, labels: Tensors) -> TaskLoss:
    """Return the loss that the model's forward computes, compared with it on these inputs and labels.

    Args:
        model: a module whose forward takes the labels and returns a loss among its outputs.
        inputs: the forward's inputs but the labels, by name.
        labels: the forward's labels, by name.

    Raises:
        InputError: the forward gives no loss for these, or one that is not a function of outputs, labels and inputs;
            says why, in one line.
    """
    name = type(model).__name__
    if isinstance(model, GraphModule):
        raise InputError(
            "a captured graph takes no labels; pass the module itself, or pass compute_loss_func="
        )
    with _undisturbed(model):
        expected = _forward(model, inputs, labels)
        plain = leaves(_run(model, inputs, name))
        _outputs_alike(name, expected.outputs, plain)
        found = _called(model, inputs, labels, expected)
        if found is None:
            found = _between(model, inputs, labels)
        with torch.no_grad():
            for count in (None, 1):
                few, fewer = _rows(inputs, count), _rows(labels, count)
                if few is None or fewer is None:
                    continue
                wanted = _forward(model, few, fewer).loss
                try:
                    given = found(plain if count is None else leaves(_run(model, few, name)), fewer, few)
                except DataError:
                    if count is None:
                        raise
                    continue  # the forward's sizes are fixed, and so are its loss's
                if not torch.allclose(given, wanted, rtol=CLOSE, atol=CLOSE * 0.1, equal_nan=True):
                    raise InputError(
                        f"{name}'s loss is {float(wanted):.6g}, but its outputs and labels alone give "
                        f"{float(given):.6g}; pass compute_loss_func="
                    )
    return found


@dataclass(frozen=True)
class _Forward:
    """What a forward with labels returned: its loss, and its outputs by name."""

    loss: Tensor
    outputs: Tensors


def _forward(model: nn.Module, inputs: Tensors, labels: Tensors) -> _Forward:
    """Run the model with labels.

    Raises:
        InputError: it does not take them, fails, or returns no loss.
    """
    name = type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    unknown = [one for one in labels if one not in parameters]
    if unknown:
        raise InputError(
            f"the forward of {name} takes no {unknown[0]!r}, so it has no loss; pass compute_loss_func="
        )
    found = leaves(_run(model, {**inputs, **labels}, name))
    loss = found.pop(LOSS, None)
    if loss is None or loss.dim():
        raise InputError(
            f"the forward of {name} returns no scalar called loss for the labels {', '.join(labels)}; "
            "pass compute_loss_func="
        )
    return _Forward(loss, found)


def _run(model: nn.Module, inputs: Tensors, name: str) -> Any:
    caches = {
        one: False for one in ("use_cache", "use_mems") if one in inspect.signature(model.forward).parameters
    }
    try:
        with torch.no_grad():
            return model(**inputs, **caches)
    except IndexError as error:  # torch's "Target 7 is out of bounds."
        raise DataError(
            f"{name} can't take the labels: {first_line(error)}; make them fit the model's outputs"
        ) from error
    except Exception as error:
        raise InputError(
            f"the forward of {name} fails on {', '.join(inputs)}: {first_line(error)}"
        ) from error


def _outputs_alike(name: str, with_labels: Tensors, without: Tensors) -> None:
    """Refuse a forward that computes other outputs where it has labels: it makes inputs of them."""
    for key, value in without.items():
        other = with_labels.get(key)
        if other is None or other.shape != value.shape or not _near(other, value):
            raise InputError(
                f"{name} makes some of its inputs from the labels, as {key} shows; put those inputs into the rows "
                "(decoder_input_ids, for example), or pass compute_loss_func="
            )


def _near(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation, without drawing on the random numbers of training."""
    with torch.random.fork_rng(), mode(model, False):
        yield


def _rows(tensors: Tensors, count: int | None) -> Tensors | None:
    """Return the first rows of tensors that all have as many; None where they have not, or no more than that."""
    if count is None:
        return tensors
    batches = {len(value) if value.dim() else 0 for value in tensors.values()}
    if len(batches) != 1 or batches.pop() <= count:
        return None
    return {name: value[:count] for name, value in tensors.items()}


# --- a call of the model's loss function ----------------------------------------------------------------------------


@dataclass
class _Call:
    """One call of a loss function."""

    function: Callable[..., Any]
    arguments: dict[str | int, Any]
    result: Any


def _called(model: nn.Module, inputs: Tensors, labels: Tensors, expected: _Forward) -> TaskLoss | None:
    """Return the model's loss function on the arguments that its forward gives it, None if it gives it others.

    Every tensor of numbers among the arguments must be an output, a label or an input as it is, and what is no tensor
    must be the same for fewer rows. Other tensors (lengths of the outputs) depend on inputs and labels alone: the
    forward is run again for them.
    """
    plans = []
    for count in (None, 1):
        few, fewer = _rows(inputs, count), _rows(labels, count)
        if few is None or fewer is None:
            continue
        plan = _plan(model, few, fewer)
        if plan is None:
            return None
        plans.append(plan)
    function, sources = plans[0]
    if any(other[1] != sources for other in plans[1:]):
        return None

    computed = any(kind == COMPUTED for kind, _ in sources.values())

    def compute(outputs: Tensors, given: Tensors, features: Tensors) -> Tensor:
        known = {"output": outputs, "label": given, "input": features}
        again = _arguments(model, features, given) if computed else {}
        args: dict[int, Any] = {}
        kwargs: dict[str, Any] = {}
        for key, (kind, value) in sources.items():
            argument = known[kind][value] if kind in known else again[key] if kind == COMPUTED else value
            if isinstance(key, int):
                args[key] = argument
            else:
                kwargs[key] = argument
        loss: Tensor = function(*(args[index] for index in sorted(args)), **kwargs)
        return loss

    return TaskLoss(compute, called=True)


_Sources = dict[str | int, tuple[str, Any]]


def _plan(model: nn.Module, inputs: Tensors, labels: Tensors) -> tuple[Callable[..., Any], _Sources] | None:
    """Return the function that makes the forward's loss, and where each of its arguments comes from."""
    calls: list[_Call] = []
    with _recorded(model, calls):
        result = _run(model, {**inputs, **labels}, type(model).__name__)
    found = leaves(result)
    loss = found.pop(LOSS)
    last = next((one for one in calls if one.result is loss), None)
    if last is None:
        return None
    sources: _Sources = {}
    for key, argument in last.arguments.items():
        if not isinstance(argument, Tensor):
            if not isinstance(argument, _PLAIN) and argument is not getattr(model, "config", None):
                return None
            sources[key] = ("constant", argument)
            continue
        groups = {"label": labels, "output": found, "input": inputs}
        places = [(k, name) for k, group in groups.items() for name, v in group.items() if _same(v, argument)]
        if not places and argument.is_floating_point():
            return None
        sources[key] = places[0] if places else (COMPUTED, None)
    return last.function, sources


def _arguments(model: nn.Module, inputs: Tensors, labels: Tensors) -> dict[str | int, Any]:
    """Return what the forward of a batch gives to its loss function, in evaluation."""
    calls: list[_Call] = []
    with _undisturbed(model), _recorded(model, calls):
        _run(model, {**inputs, **labels}, type(model).__name__)
    return calls[-1].arguments


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, seen in the same way."""
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
    )


@contextmanager
def _recorded(model: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Note each call of the model's ``loss_function``, a property of transformers' models that can be set."""
    function: Any = getattr(model, "loss_function", None)
    own = model.__dict__.get("_loss_function")
    if function is None or not isinstance(inspect.getattr_static(model, "loss_function", None), property):
        yield
        return

    def record(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        given: dict[str | int, Any] = dict(enumerate(args))
        given.update(kwargs)
        calls.append(_Call(function, given, result))
        return result

    model.loss_function = record  # type: ignore[assignment]
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["_loss_function"]
        else:
            model.__dict__["_loss_function"] = own


# --- a part of the captured forward ---------------------------------------------------------------------------------


def _between(model: nn.Module, inputs: Tensors, labels: Tensors) -> TaskLoss:
    """Return what the forward computes between its outputs and its loss, of the model captured with labels.

    Raises:
        InputError: the forward with labels can't be captured, or its loss depends on more than these.
    """
    name = type(model).__name__
    try:
        gm = capture(model, {**inputs, **labels})
    except TiFxError as error:
        raise InputError(
            f"{name}'s loss can't be separated from its forward ({first_line(error)}); pass compute_loss_func="
        ) from error
    gm.eval()
    ends = named_leaves(gm.graph.output_node().args[0])
    loss = ends.pop(LOSS, None)
    if loss is None:
        raise InputError(f"{name}'s captured forward returns no loss; pass compute_loss_func=")
    outputs = {node: key for key, node in reversed(ends.items())}
    needed = ancestors([loss], stop=lambda node: node in outputs)
    for node in needed:
        value = stored(gm, node)
        if isinstance(value, nn.Parameter):
            raise InputError(
                f"{name}'s loss depends on more than its outputs, labels and inputs (it reads {node.target}); "
                "pass compute_loss_func="
            )
    steps = [node for node in gm.graph.nodes if node in needed and node not in outputs]
    takes = [node for node in gm.graph.find_nodes(op="placeholder") if node in needed]

    def compute(given: Tensors, tags: Tensors, features: Tensors) -> Tensor:
        everything = {**features, **tags}
        require_inputs(gm, (), {str(node.target): everything[str(node.target)] for node in every_input})
        run = Interpreter(gm, garbage_collect_values=False)
        run.env = {
            **{node: given[key] for node, key in outputs.items() if node in needed},
            **{node: everything[str(node.target)] for node in takes},
        }
        for node in steps:
            if node.op != "placeholder":
                run.env[node] = run.run_node(node)
        found: Tensor = run.env[loss]
        return found

    every_input = gm.graph.find_nodes(op="placeholder")
    return TaskLoss(compute, called=False)


# --- output structures ----------------------------------------------------------------------------------------------


def leaves(outputs: Any) -> Tensors:
    """Return an output structure's tensors by name, as ``ti_fx.ir.outputs.named_leaves`` names a graph's.

    A tuple whose first item is a loss has the names that it has without one.
    """
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    items = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    found: Tensors = {}
    for name, value in items:
        if isinstance(value, Tensor):
            found[str(name)] = value
        elif isinstance(value, Mapping | tuple | list):
            found.update({f"{name}.{inner}": leaf for inner, leaf in leaves(value).items()})
    return found


def single(values: tuple[Any, ...]) -> Any:
    """Return a lone value as it is, several as a tuple: so Trainer and its metrics take them."""
    return values[0] if len(values) == 1 else values
