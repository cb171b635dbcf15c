"""A preset is a published method as data: what it does, where it is from, its phases, and the options of its passes.

Phases of the presets are the published ones where there are some (arXiv 2302.11812, section 4 and its code): with
s = 60 intervention steps, TI-G intervenes at the output until s/6, at the context until s/3 and at the map to the end;
then plain quantisation-aware training with a fresh optimiser and learning-rate schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ti_fx.passes import Calibrate, Distill, Intervene, KeepLayers, QuantizeActivations, SubNorms, Ternarize
from ti_fx.phases import Curve, Phase

DEFAULT = "calibrated"  # what `ti-fx train` and `make demo` train by

TERNARYBERT = "TernaryBERT, EMNLP 2020 (arXiv 2009.12812)"
TEACHER_INTERVENTION = "Teacher Intervention, EACL 2023 (arXiv 2302.11812)"

Schedule = Callable[[float], tuple[Phase, ...]]


@dataclass(frozen=True)
class Preset:
    """A method.

    Attributes:
        what: it does, in a line.
        source: where it is from.
        schedule: returns the phases for an intervened part of so many steps, or of such a fraction of training.
        length: of the intervened part, where none is asked for; None: nothing intervenes, and none can be asked for.
        options: of the recipe beside its name and phases: its passes, by the recipe's own names.
        teachers: the same of the recipes before it in a chain, with their names.
    """

    what: str
    source: str
    schedule: Schedule
    length: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    teachers: tuple[Mapping[str, Any], ...] = ()


def _plain(steps: float) -> tuple[Phase, ...]:
    return (Phase("quantise"),)


def _one_point(point: str) -> Schedule:
    def schedule(steps: float) -> tuple[Phase, ...]:
        return (Phase(point, Intervene(point), steps), Phase("quantise", restart=True))

    return schedule


def _gradual(*points: str) -> Schedule:
    """Three points in turn: the first for a sixth of the steps, the second until a third, the last to the end."""

    def schedule(steps: float) -> tuple[Phase, ...]:
        sixth, third = (steps / 6, steps / 3) if isinstance(steps, float) else (steps // 6, steps // 3)
        lengths = (sixth, third - sixth, steps - third)
        phases = (
            Phase(point, Intervene(point), length) for point, length in zip(points, lengths, strict=True)
        )
        return (*phases, Phase("quantise", restart=True))

    return schedule


def _blended(name: str, blend: Any, curve: Curve) -> Schedule:
    """Every layer reads the teacher's stream or its own as the curve says; then none, without a restart."""

    def schedule(steps: float) -> tuple[Phase, ...]:
        return (Phase(name, Intervene("layer", blend=blend), steps, curves=(curve,)), Phase("quantise"))

    return schedule


def _phased_in(steps: float) -> tuple[Phase, ...]:
    return (Phase("phase-in", steps=steps, phase_in=Curve("linear", 0.0, 1.0)), Phase("quantise"))


PRESETS: dict[str, Preset] = {
    "ternarybert": Preset(
        "No intervention: quantisation-aware training with the teacher's losses.", TERNARYBERT, _plain
    ),
    "ti-o": Preset(
        "The student reads the teacher's attention output for s steps; then plain training, with a restart.",
        TEACHER_INTERVENTION,
        _one_point("output"),
        60,
    ),
    "ti-c": Preset(
        "The student reads the teacher's attention context for s steps; then plain training, with a restart.",
        TEACHER_INTERVENTION,
        _one_point("context"),
        60,
    ),
    "ti-m": Preset(
        "The student reads the teacher's attention maps for s steps; then plain training, with a restart.",
        TEACHER_INTERVENTION,
        _one_point("map"),
        60,
    ),
    "ti-g": Preset(
        "Gradual: the teacher's output until s/6, its context until s/3, its maps until s; then plain training, with "
        "a restart.",
        TEACHER_INTERVENTION,
        _gradual("output", "context", "map"),
        60,
    ),
    "ti-g-inverted": Preset(
        "The order of ti-g turned round: the teacher's maps until s/6, its context until s/3, its output until s; then "
        "plain training, with a restart.",
        f"control of {TEACHER_INTERVENTION}",
        _gradual("map", "context", "output"),
        60,
    ),
    "ti-stochastic": Preset(
        "Each token of each layer reads the teacher's stream or its own, drawn in every step, for half of training (or "
        "s); then plain training, without a restart.",
        "the draw: QDrop, ICLR 2022 (arXiv 2203.05740), there between quantised and unquantised activations",
        _blended("draw", "tokens", Curve("constant", 0.5)),
        0.5,
    ),
    "layer-blend": Preset(
        "Every layer reads the teacher's stream, blended into the student's own over half of training (or s); then "
        "plain training, without a restart.",
        "not published",
        _blended("blend", True, Curve("linear", 1.0, 0.0)),
        0.5,
    ),
    "calibrated": Preset(
        "A scale a row; the weights are set by up to 512 rows of the training data, without gradients (Calibrate), and "
        "trained from there by the logits' KL divergence and errors in units of each layer's own variance.",
        "not published",
        _plain,
        options={
            "ternarize": Ternarize(weights="row"),
            "calibrate": Calibrate(),
            "distill": Distill(errors="layer", logits_loss="kl"),
        },
    ),
    "phase-in": Preset(
        "No intervention: weights are read as W + λ (Q(W) - W), λ from 0 to 1 over half of training (or s); then plain "
        "training, without a restart.",
        "a control of the blends, not published",
        _phased_in,
        0.5,
    ),
    "tsld": Preset(
        "Logits alone, those of tokens that the teacher finds hard for more; where a model has no logits a token, by "
        "their KL divergence.",
        "Token-Scaled Logit Distillation, NeurIPS 2023 (arXiv 2308.06744)",
        _plain,
        options={
            "distill": Distill(
                layer_outputs=0, scores=0, attention_outputs=0, logits_loss="token-scaled-or-kl"
            )
        },
    ),
    "bitdistill": Preset(
        "Norms of the student's own before attention's and the feed-forward's last projection; logits by KL at "
        "temperature 5, and the relations of the last block. The source's third loss, on labels, is distill: task.",
        "BitNet Distillation (arXiv 2510.13998), without its continued pre-training",
        _plain,
        options={
            "distill": Distill(
                layer_outputs=0, scores=0, attention_outputs=0, relations=1, logits_loss="kl", temperature=5.0
            ),
            "extra_passes": (SubNorms(),),
        },
    ),
    "bit": Preset(
        "A chain of three students, each the next one's teacher and start, in a third of the steps each: scales a row "
        "and activations in full precision, activations of 8 bits, then scales a tensor.",
        "BiT, NeurIPS 2022 (arXiv 2205.13016), whose chain goes by bits of weights and activations",
        _plain,
        teachers=(
            {
                "name": "bit-1",
                "ternarize": Ternarize(weights="row"),
                "activations": QuantizeActivations("float"),
            },
            {"name": "bit-2", "ternarize": Ternarize(weights="row")},
        ),
    ),
    "xtc": Preset(
        "Half of the teacher's layers, evenly spread, initialised from these and compared with them; one stage. "
        "Published for far longer training than others.",
        "XTC, NeurIPS 2022 (arXiv 2206.01859)",
        _plain,
        options={"keep_layers": KeepLayers(share=0.5)},
    ),
    "xtc-binary": Preset(
        "As xtc, with binary weights: -1 and 1.",
        "XTC, NeurIPS 2022 (arXiv 2206.01859)",
        _plain,
        options={"keep_layers": KeepLayers(share=0.5), "ternarize": Ternarize(method="binary")},
    ),
}
