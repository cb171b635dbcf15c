"""``run_chain`` takes one model through every stage, and keeps what was measured and why it ended where it did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ti_fx.errors import CoverageError, TiFxError, first_line
from ti_fx.example_inputs.makers import run
from ti_fx.export import Runtime, to_onnx
from ti_fx.export.compare.outputs import NOISE_CAP, nudged_outputs
from ti_fx.export.inputs import other_sizes, resized, run_graph
from ti_fx.find.attention import POINTS, AttentionSite, find_attention
from ti_fx.frontend.capture import capture, capture_report
from ti_fx.ir import roles
from ti_fx.ir.edit import fork, input_names, mode
from ti_fx.ir.pipeline import Pipeline
from ti_fx.numerics.closeness import distance, median_distance, relative, same
from ti_fx.passes import (
    DecomposeAttention,
    Distill,
    DuplicateTeacher,
    Intervene,
    Pack,
    QuantizeActivations,
    Strip,
    Ternarize,
)
from ti_fx.zoo.count import attention_calls, replaced, uniform
from ti_fx.zoo.graph_runs import Replaced, as_teacher, ordered, source_line, tensors
from ti_fx.zoo.models import Entry
from ti_fx.zoo.points import replacements

STAGES = ("build", "count", "capture", "sites", "teacher", "prepare", "train", "pack", "export", "runtime")
CAPTURED = 1e-5  # relative distance of the captured graph's outputs from the model's
REPLACED = 1e-4  # the same with one block's map replaced in both, where differences are amplified
MOVED = 0.01  # how far a known tensor must move the outputs to prove anything
# ONNX Runtime's outputs against the packed student's: the median over vectors of the relative distance.
FLOAT, QUANTISED = 1e-3, 0.03
# ... or, where rounding of activations amplifies the last bits to more (of untrained networks some do), so many times
# what they move PyTorch's own outputs at most in so many runs: ONNX Runtime's bits are as one more run.
NUDGED, NUDGES = 1.5, 8


@dataclass
class Outcome:
    """How far a model came.

    Attributes:
        name, model_class, attention: which model.
        stage: the last stage that was passed.
        refused: the type and message of the error at the next one; both None after the last.
        typed: whether that error is one that ti_fx raises on purpose.
        blocks: attention blocks counted while the model ran. sites: those found in its graph.
        numbers: what was measured, by name. seconds: by stage.
        notes: what was left out, and why.
    """

    name: str
    model_class: str = ""
    attention: str = "eager"
    stage: str = ""
    refused: tuple[str, str] | None = None
    typed: bool = True
    blocks: int | None = None
    sites: int | None = None
    kinds: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the last stage was passed."""
        return self.refused is None

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        return {**asdict(self), "passed": self.passed}


def run_chain(
    name: str,
    build: Callable[[], Entry],
    folder: Path,
    until: str = STAGES[-1],
    started: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Run the stages one after the other, up to the first that fails or to ``until``.

    Args:
        name: what to call the model.
        build: makes it.
        folder: for the ONNX files.
        until: the last of ``STAGES`` to run.
        started: called before each stage, and at the end.
    """
    outcome = Outcome(name)
    chain = Chain(build, folder, outcome)
    for stage in STAGES[: STAGES.index(until) + 1]:
        started(outcome)
        begun = time.perf_counter()
        try:
            getattr(chain, stage)()
        except Exception as error:
            outcome.refused = (type(error).__name__, f"{stage}: {first_line(error)[:500]}")
            outcome.typed = isinstance(error, TiFxError)
            break
        finally:
            outcome.seconds[stage] = round(time.perf_counter() - begun, 3)
        outcome.stage = stage
    started(outcome)
    return outcome


class Chain:
    """One method per stage, in the order of ``STAGES``."""

    entry: Entry
    other: dict[str, Tensor]
    expected: dict[str, Tensor]
    gm: GraphModule
    files: dict[str, tuple[Path, GraphModule]]

    def __init__(self, build: Callable[[], Entry], folder: Path, outcome: Outcome) -> None:
        self.make = build
        self.folder = folder
        self.outcome = outcome
        self.files = {}

    def build(self) -> None:
        """Make the model and its inputs."""
        self.entry = self.make()
        self.other = self.entry.other
        self.outcome.model_class = self.entry.model_class
        self.outcome.attention = self.entry.attention

    def count(self) -> None:
        """Run the model and count its attention blocks, by hooks on what it calls."""
        model = self.entry.model
        self.expected = tensors(run(model, self.other))
        again = tensors(run(model, self.other))
        if distance(again, self.expected) > 0:
            raise CoverageError(
                f"{self.entry.model_class} returns other values when it runs again; turn its randomness off"
            )
        self.calls = [
            call for call in attention_calls(model, self.entry.example) if call.has_value and call.used
        ]
        self.outcome.blocks = len(self.calls)
        if not self.calls:
            raise CoverageError(f"{self.entry.model_class} calls no softmax on a product of two activations")

    def capture(self) -> None:
        """Capture it, and compare the graph with it at another size."""
        self.gm = capture(self.entry.model, self.entry.example).eval()
        self._fit()
        found = distance(tensors(run(self.gm, self.other)), self.expected)
        self.outcome.numbers["captured"] = found
        if not found <= CAPTURED:
            raise CoverageError(
                f"the captured graph differs from {self.entry.model_class} at another size (relative {found:.1e})"
            )
        Pipeline(DecomposeAttention())(self.gm)

    def _fit(self) -> None:
        """Where the model fixes a size, use inputs that differ from the example in the other sizes alone."""
        dims = capture_report(self.gm).dims
        fixed = [
            f"{name}.{index}"
            for name, value in self.other.items()
            for index, size in enumerate(value.shape)
            if isinstance(dims[name][index], int) and dims[name][index] != size
        ]
        if fixed:
            self.outcome.notes.append(
                f"{', '.join(fixed)}: {capture_report(self.gm).static.get(fixed[0], 'fixed')}"
            )
            example = {name: self.entry.example[name] for name in input_names(self.gm)}
            self.other = resized(self.gm, example, other_sizes(self.gm, example)[0])
            try:
                self.expected = tensors(run(self.entry.model, self.other))
            except (ValueError, RuntimeError, IndexError) as error:  # as many image tokens as the images have
                self.outcome.notes.append(
                    f"the model takes no other size of the example: {first_line(error)[:500]}"
                )
                self.other = example
                self.expected = tensors(run(self.entry.model, self.other))

    def sites(self) -> None:
        """Find the blocks, as many as were counted, and replace their maps in graph and model."""
        sites = find_attention(self.gm)
        self.outcome.sites = len(sites)
        for site in sites:
            self.outcome.kinds[site.kind] = self.outcome.kinds.get(site.kind, 0) + 1
        if len(sites) != len(self.calls):
            raise CoverageError(self._miscounted(sites))
        differences = [
            self._replacing(site, call.index) for site, call in zip(sites, self.calls, strict=True)
        ]
        self.outcome.numbers["replaced"] = worst = max(differences)
        if not worst <= REPLACED:
            raise CoverageError(
                f"a uniform map of {sites[differences.index(worst)].where} changes the graph and the model differently "
                f"(relative {worst:.1e})"
            )

        self.check_points(sites)

    def check_points(self, sites: list[AttentionSite]) -> None:
        """Put known tensors at contexts and outputs, in the graph and by hooks in the model."""
        model, example = self.entry.model, self.entry.example
        before = tensors(run(model, example))
        for change in replacements(sites, self.calls, model, lambda: run(model, example)):
            with change.in_module():
                expected = tensors(run(model, example))
            changes = {change.node: change.value}
            with torch.no_grad():
                found = tensors(Replaced(self.gm, changes).run(*ordered(self.gm, example)))
            gap = distance(found, expected)
            if distance(expected, before) >= MOVED:
                self._worst(f"replaced {change.point}", gap)
            if not gap <= REPLACED:
                raise CoverageError(
                    f"a known {change.point} at %{change.node.name} changes the graph and the model differently "
                    f"(relative {gap:.1e})"
                )

    def _worst(self, name: str, value: float) -> None:
        numbers = self.outcome.numbers
        numbers[name] = max(numbers.get(name, 0.0), value)
        numbers[f"{name} sites"] = numbers.get(f"{name} sites", 0) + 1

    def _miscounted(self, sites: list[AttentionSite]) -> str:
        text = f"{len(sites)} attention blocks found, {len(self.calls)} counted"
        found = [source_line(site.map) for site in sites]
        for call in self.calls:
            if call.source not in found:
                return f"{text}; first missing: {call.op} in {call.module} ({call.source})"
            found.remove(call.source)
        return f"{text}; first too many: softmax in {found[0]}"

    def _replacing(self, site: AttentionSite, index: int) -> float:
        """Return how differently a uniform map changes the graph and the model."""
        assert site.map is not None
        with replaced(self.entry.model, index, uniform):
            expected = tensors(run(self.entry.model, self.entry.example))
        with torch.no_grad():
            found = tensors(Replaced(self.gm, {site.map: uniform}).run(*ordered(self.gm, self.entry.example)))
        return distance(found, expected)

    def teacher(self) -> None:
        """Add the teacher, which computes what the model does."""
        before = tensors(run(self.gm, self.other))
        Pipeline(DuplicateTeacher())(self.gm)
        twins = roles.twin_of(self.gm.graph)
        for what, values in (
            ("student", run(self.gm, self.other)),
            ("teacher", run(as_teacher(self.gm, twins), self.other)),
        ):
            for name, value in tensors(values).items():
                if not same(value, before[name]):
                    raise CoverageError(
                        f"the {what}'s output {name} is no longer bit-equal after duplicate-teacher"
                    )

    def prepare(self) -> None:
        """Add quantisers and losses."""
        Pipeline(Ternarize(min_rows=64), QuantizeActivations("int8-tensor"), Distill())(self.gm)

    def train(self) -> None:
        """Run one training step at each point of intervention."""
        sites = find_attention(self.gm)
        for point in (*POINTS, None):
            having = [site for site in sites if point is None or site.at(point) is not None]
            if not having:
                self.outcome.notes.append(f"no block has an {point}")
                continue
            layers = None if len(having) == len(sites) else tuple(sorted({site.layer for site in having}))
            passes = [Intervene(None)]
            if layers is None:
                passes = [Intervene(point)]
            else:
                missing = len(sites) - len(having)
                self.outcome.notes.append(f"{missing} of {len(sites)} blocks have no {point}")
                alike = {(site.stack, site.layer, site.kind) for site in sites if site not in having}
                passes += [
                    Intervene(point, layers=(site.layer,), stack=site.stack, kind=site.kind)
                    for site in having
                    if (site.stack, site.layer, site.kind) not in alike
                ]
            Pipeline(*passes)(self.gm)
            self._step(point)

    def _step(self, point: str | None) -> None:
        with mode(self.gm, True), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parameters = [value for value in self.gm.parameters() if value.requires_grad]
            result = self.gm(**self.other)
            result["loss"].backward()
            gradients = {
                name: value.grad for name, value in self.gm.named_parameters() if value.grad is not None
            }
            self.outcome.numbers[f"loss at {point}"] = float(result["loss"])
            if not gradients or not any(bool(value.any()) for value in gradients.values()):
                raise CoverageError(f"no parameter has a gradient with an intervention at {point}")
            for name, value in gradients.items():
                if not value.isfinite().all():
                    raise CoverageError(
                        f"the gradient of {name} is not finite with an intervention at {point}"
                    )
            if point is None:
                # a loss of millions, as some untrained networks have, would leave no number of the weights
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                torch.optim.SGD(parameters, lr=1e-4).step()
            for value in parameters:
                value.grad = None

    def pack(self) -> None:
        """Strip and pack, in two encodings."""
        floating = fork(self.gm)
        for encoding, gm in (("float", floating), ("int8-tensor", self.gm)):
            Pipeline(QuantizeActivations(encoding), Strip())(gm)
            expected = tensors(run(gm, self.other))
            Pipeline(Pack())(gm)
            for name, value in tensors(run(gm, self.other)).items():
                if not same(value, expected[name]):
                    raise CoverageError(f"output {name} is no longer bit-equal after pack")
            self.files[encoding] = self.folder / f"{encoding}.onnx", gm

    def export(self) -> None:
        """Write both files."""
        for encoding, (path, gm) in self.files.items():
            report = to_onnx(gm, path, self.entry.example)
            self.outcome.numbers[f"{encoding} bytes"] = report.bytes
            if report.parity.nodes is not None:
                self.outcome.numbers[f"{encoding} nodes"] = report.parity.nodes.nodes
                self.outcome.numbers[f"{encoding} worst node"] = report.parity.nodes.worst
                self.outcome.numbers[f"{encoding} steps"] = report.parity.nodes.steps

    def runtime(self) -> None:
        """Compare both files with their graphs in ONNX Runtime, at another size."""
        for encoding, (path, gm) in self.files.items():
            self.compare_file(encoding, path, gm)

    def compare_file(self, encoding: str, path: Path, gm: GraphModule) -> None:
        """Compare one file's outputs with its packed graph's.

        Raises:
            CoverageError: they are further apart than the encoding explains.
        """
        inputs = {name: self.other[name] for name in input_names(gm)}
        expected = {name: value for name, value in run_graph(gm, inputs).items() if value.is_floating_point()}
        found = {name: torch.from_numpy(value) for name, value in Runtime(path)(inputs).items()}
        median = median_distance(found, expected)
        self.outcome.numbers[f"{encoding} runtime"] = max(
            (relative(found[name], value) for name, value in expected.items()), default=0.0
        )
        self.outcome.numbers[f"{encoding} runtime median"] = median
        limit = FLOAT if encoding == "float" else QUANTISED
        if encoding != "float" and median > limit:
            noise = max(median_distance(nudged_outputs(gm, inputs, seed), expected) for seed in range(NUDGES))
            self.outcome.numbers[f"{encoding} noise median"] = noise
            self.outcome.notes.append(
                f"{encoding}: noise in the last bits moves PyTorch's own outputs by {noise:.1e}"
            )
            limit = max(limit, min(NUDGED * noise, NOISE_CAP))
        if not median <= limit:
            raise CoverageError(
                f"ONNX Runtime differs from the packed student in {encoding} "
                f"(relative {median:.1e}, at most {limit:.1e})"
            )
