"""TernaryModel is the module that is trained: it owns every tensor once, and has one graph per phase."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.errors import InputError
from ti_fx.ir import text
from ti_fx.ir.blends import set_shares, shares
from ti_fx.ir.edit import fork, input_names
from ti_fx.ir.leaves import DrawnShare
from ti_fx.ir.moved import log_variances
from ti_fx.ir.outputs import prepared_result
from ti_fx.ir.pipeline import Pipeline
from ti_fx.ir.roles import TEACHER_PREFIX
from ti_fx.ir.stages import PHASE
from ti_fx.passes.deploy.strip import Strip
from ti_fx.passes.normalise.drop_dead import DropDead
from ti_fx.passes.prepare.look_up_first import LookUpFirst
from ti_fx.passes.prepare.return_parts import ReturnParts
from ti_fx.recipe import Phase, Recipe
from ti_fx.train.blending import move
from ti_fx.train.compile import CompileRecord, Runner, Shapes

Compile = Literal["on", "off"]

# A fork that is quick to run, with the same values: no rows that no one looks up, and nothing that no one reads.
FOR_ONE_PHASE = Pipeline(LookUpFirst(), DropDead(keep_tensors=True), stage=PHASE)
FOR_TRAINING = Pipeline(ReturnParts(), *FOR_ONE_PHASE.passes, stage=PHASE)


class TernaryModel(nn.Module):
    """A prepared graph as a module to train: phases are graphs over the same tensors, and evaluation is the student.

    In training, ``forward`` returns ``{"loss", "losses", "outputs", "parts"}`` of the current phase (``parts`` are the
    means that each of the losses is the sum of); in evaluation, the stripped student's outputs. ``state_dict()`` has
    each tensor once, under the source model's names; the frozen teacher is under ``teacher.``.
    """

    main_input_name: str  # the input of which Trainer counts the tokens
    accepts_loss_kwargs = False  # the loss is a mean: transformers divides it when it accumulates gradients

    def __init__(self, prepared: GraphModule, recipe: Recipe, *, compile: Compile = "off") -> None:
        """Wrap a graph that ``recipe.prepare`` made.

        Raises:
            InputError: the graph has no losses.
        """
        super().__init__()
        if prepared_result(prepared) is None:
            raise InputError("the graph has no losses to train; run recipe.prepare(gm) on it first")
        self._modules = dict(prepared._modules)
        self._parameters, self._buffers = prepared._parameters, prepared._buffers
        self._non_persistent_buffers_set = prepared._non_persistent_buffers_set
        self._graphs = _Graphs(prepared, recipe, compiled=compile == "on")
        self._learned = {term: str(read.target) for term, read in log_variances(prepared).items()}
        self.inputs = input_names(prepared)
        self.recipe = recipe
        self.train(prepared.training)

    def forward(self, **inputs: Tensor) -> Any:
        """Run the current phase (training) or the student (evaluation) on the model's own inputs."""
        graphs = self._graphs
        return graphs.phase(graphs.current)(**inputs) if self.training else graphs.evaluation(**inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> TernaryModel:
        """Copy it with its graphs, as an average of weights does."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled: graphs would lose what they record, and code would run when they are loaded.

        Raises:
            InputError: says what is saved instead.
        """
        raise InputError(
            "a TernaryModel can't be pickled; trainer.save_model(folder) saves it and ti_fx.load(folder) loads the "
            "student (its values alone: model.state_dict())"
        )

    def enter(self, phase: Phase) -> None:
        """Train this phase's graph from now on."""
        self._graphs.current = phase

    @property
    def phase(self) -> Phase:
        """The phase that is trained."""
        return self._graphs.current

    def move(self, step: int, steps: int) -> dict[str, float]:
        """Let blends and losses read what the phase's curves are at its step ``step`` of ``steps``; return it for logs.

        That is each point's mean share (``blend_layer``), the share of weights that is quantised (``phase_in``), and
        the weights of losses that move (``weight_logits``).

        Raises:
            RecipeError: no curve moves a site, or a curve moves none.
        """
        if not self.phase.moves:
            return {}
        return move(self._graphs.phase(self.phase).gm, self.phase, step, steps)

    def shares(self) -> dict[str, float]:
        """Return the share of each site that the phase blends, by the name of its tap."""
        if not self.phase.curves:
            return {}
        return {share.tap: float(share.value) for share in shares(self._graphs.phase(self.phase).gm)}

    def set_shares(self, values: Mapping[str, float]) -> None:
        """Set shares of sites that the phase blends: those that :meth:`shares` returned."""
        if values:
            set_shares(self._graphs.phase(self.phase).gm, values)

    def train(self, mode: bool = True) -> TernaryModel:
        """Put every module in train or eval mode, also those that draw for the blends of one phase."""
        super().train(mode)
        self._graphs.train(mode)
        return self

    def distillation(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return loss, losses and outputs of the student without an intervention; in evaluation for validation."""
        result: dict[str, Any] = self._graphs.plain(**inputs)
        return result

    def runners(self) -> tuple[Callable[..., Any], GraphModule]:
        """Return the current phase's graph as it is called in training, and the same graph uncompiled."""
        runner = self._graphs.phase(self._graphs.current)
        return runner.call, runner.gm

    def student(self) -> GraphModule:
        """Return the stripped student: a graph of its own over the same tensors."""
        return fork(self._graphs.student)

    def prepared(self) -> GraphModule:
        """Return the prepared graph, without an intervention."""
        return self._graphs.prepared

    def compile_records(self) -> dict[str, CompileRecord]:
        """Return what compiling cost, by phase name."""
        return {name: runner.record for name, runner in self._graphs.phases.items()}

    def compiled_shapes(self) -> dict[str, list[Shapes]]:
        """Return the shapes of the inputs that each phase's graphs were compiled at, in order."""
        return {name: runner.shapes for name, runner in self._graphs.phases.items() if runner.shapes}

    def compile_at(self, shapes: Mapping[str, list[Shapes]]) -> None:
        """Compile each phase at these shapes first, as an earlier run did, so that its code has the same bits."""
        self._graphs.first_shapes = dict(shapes)

    def phase_digests(self) -> dict[str, str]:
        """Return the SHA-256 of each phase's dump, by phase name."""
        return self._graphs.digests()

    def student_state(self) -> dict[str, Tensor]:
        """Return the student's tensors, under the source model's names."""
        return {name: value for name, value in self.state_dict().items() if self.is_students(name)}

    def is_students(self, name: str) -> bool:
        """Whether a tensor is the student's: neither the teacher's, nor what training alone learns."""
        return not name.startswith(TEACHER_PREFIX) and name not in self._learned.values()

    def learned(self) -> dict[str, float]:
        """Return the logarithms of the variances that losses are learned to have, by term."""
        return {term: float(self.get_parameter(name).detach()) for term, name in self._learned.items()}

    def set_learned(self, values: Mapping[str, float]) -> None:
        """Set what :meth:`learned` returned, in place."""
        with torch.no_grad():
            for term, value in values.items():
                self.get_parameter(self._learned[term]).fill_(value)

    def teacher_digests(self) -> dict[str, str]:
        """Return the SHA-256 of each of the teacher's tensors, by the source model's name."""
        return {
            name.removeprefix(TEACHER_PREFIX): digest(value)
            for name, value in self.state_dict().items()
            if name.startswith(TEACHER_PREFIX)
        }


class _Graphs:
    """The graphs of a run; a plain object, so that no graph is a submodule and no tensor is registered twice."""

    def __init__(self, prepared: GraphModule, recipe: Recipe, compiled: bool) -> None:
        self.prepared = prepared
        self.recipe = recipe
        self.compiled = compiled
        self.current = recipe.phases()[0]
        self.training = prepared.training
        self.phases: dict[str, Runner] = {}
        self.first_shapes: dict[str, list[Shapes]] = {}

    def phase(self, phase: Phase) -> Runner:
        if phase.name not in self.phases:
            self.phases[phase.name] = Runner(
                self._fork(phase), self.compiled, self.first_shapes.get(phase.name, [])
            )
        return self.phases[phase.name]

    def _fork(self, phase: Phase) -> GraphModule:
        gm = fork(self.prepared)
        Pipeline(*phase.passes())(gm)
        FOR_TRAINING(gm)
        _train_draws(gm, self.training)
        return gm

    def train(self, mode: bool) -> None:
        self.training = mode
        for runner in self.phases.values():
            _train_draws(runner.gm, mode)

    @cached_property
    def plain(self) -> GraphModule:
        gm = fork(self.prepared)
        FOR_TRAINING(gm)
        return gm

    @cached_property
    def student(self) -> GraphModule:
        gm = fork(self.prepared)
        Pipeline(Strip(keep_tensors=True))(gm)
        return gm

    @cached_property
    def evaluation(self) -> GraphModule:
        gm = fork(self.student)
        FOR_ONE_PHASE(gm)
        return gm

    def digests(self) -> dict[str, str]:
        found = {}
        for phase in self.recipe.phases():
            gm = fork(self.prepared)
            Pipeline(*phase.passes())(gm)
            found[phase.name] = hashlib.sha256(text.dump(gm).encode()).hexdigest()
        return found


def _train_draws(gm: GraphModule, mode: bool) -> None:
    """Put what draws for blends in train or eval mode: a graph's own modules, which no other graph shares."""
    for module in gm.modules():
        if isinstance(module, DrawnShare):
            module.train(mode)


def digest(value: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, dtype and shape."""
    plain = value.detach().cpu().contiguous()
    content = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    content.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
