"""Recipes: published schedules, round trips through JSON and YAML, refusals, the same graphs from the same recipe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from models import Tiny, bert_model, text_example

import ti_fx
from ti_fx import Recipe
from ti_fx.errors import InputError, RecipeError
from ti_fx.passes import Distill, Intervene, KeepLayers, QuantizeActivations, Ternarize
from ti_fx.recipe import PRESETS, Curve, Phase
from ti_fx.train import TernaryModel
from ti_fx.train.schedule import spans

# Every option away from its default.
FULL = Recipe(
    "everything",
    ternarize=Ternarize(
        weights="row",
        embeddings=None,
        head=True,
        tied="embedding",
        min_rows=2000,
        clip=2.0,
        skip=("bert.encoder.layer.0.*",),
        method="absmean",
    ),
    activations=QuantizeActivations(
        encoding="int8-token",
        attention=True,
        skip=("bert.pooler.*",),
        encodings={"*.query": "nbits2", "*.key": "float"},
    ),
    distill=Distill(
        logits=0.5,
        layer_outputs=0.0,
        scores=2.0,
        attention_outputs=0.25,
        task=0.75,
        embeddings=0.5,
        variant="paper",
        mask_padding=True,
        maps=0.25,
        relations=0.125,
        errors="token",
        logits_loss="kl",
        temperature=2.0,
        embeddings_loss="cosine",
        learned=("logits", "maps"),
    ),
    schedule=(
        Phase(
            "both",
            Intervene("map", layers=(0, 1), stack=0, kind="self", keep_encoder_gradient=True, blend="rows"),
            3,
            restart=True,
            curves=(Curve("cosine", layers=(0,)), Curve("step")),
            phase_in=Curve("cosine", 0.1, 0.9),
            weights={"scores": Curve("linear", 0.0, 1.0), "task": Curve("constant", 0.5)},
        ),
        Phase("quantise", restart=True),
    ),
    steps=50,
    teachers=(Recipe("first", ternarize=Ternarize(weights="row")), Recipe("second", steps=7)),
    keep_layers=KeepLayers(share=0.75, layers=(0, 2), stack=1),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ternarybert", [("quantise", None, 0, 300, False)]),
        ("ti-o", [("output", "output", 0, 60, False), ("quantise", None, 60, 300, True)]),
        ("ti-c", [("context", "context", 0, 60, False), ("quantise", None, 60, 300, True)]),
        ("ti-m", [("map", "map", 0, 60, False), ("quantise", None, 60, 300, True)]),
        (
            "ti-g",  # s = 60: output until s/6, context until s/3, map to the end, then plain QAT for N - s
            [
                ("output", "output", 0, 10, False),
                ("context", "context", 10, 20, False),
                ("map", "map", 20, 60, False),
                ("quantise", None, 60, 300, True),
            ],
        ),
        (
            "ti-g-inverted",
            [
                ("map", "map", 0, 10, False),
                ("context", "context", 10, 20, False),
                ("output", "output", 20, 60, False),
                ("quantise", None, 60, 300, True),
            ],
        ),
        ("ti-stochastic", [("draw", "layer", 0, 150, False), ("quantise", None, 150, 300, False)]),
        ("layer-blend", [("blend", "layer", 0, 150, False), ("quantise", None, 150, 300, False)]),
        ("phase-in", [("phase-in", None, 0, 150, False), ("quantise", None, 150, 300, False)]),
        ("bit", [("quantise", None, 0, 300, False)]),
        ("bitdistill", [("quantise", None, 0, 300, False)]),
        ("xtc", [("quantise", None, 0, 300, False)]),
        ("xtc-binary", [("quantise", None, 0, 300, False)]),
        ("tsld", [("quantise", None, 0, 300, False)]),
    ],
)
def test_a_preset_has_the_published_schedule(name: str, expected: list[tuple[Any, ...]]) -> None:
    laid = spans(Recipe.preset(name).phases(), 300)
    found = [(s.phase.name, s.phase.intervene.at, s.start, s.end, s.phase.restart) for s in laid]
    assert found == expected


@pytest.mark.parametrize(
    "name", [name for name in PRESETS if name not in ("tsld", "bitdistill", "calibrated")]
)  # not the published numerics
def test_a_preset_has_the_published_numerics(name: str) -> None:
    recipe = Recipe.preset(name)
    assert (recipe.ternarize.weights, recipe.ternarize.embeddings, recipe.ternarize.clip) == (
        "tensor",
        "row",
        2.5,
    )
    distill = recipe.distill
    assert (distill.layer_outputs, distill.scores, distill.attention_outputs, distill.task) == (1, 1, 1, 0)
    assert not distill.mask_padding


@pytest.mark.parametrize("steps", [6, 7, 11, 61, 120])
def test_the_gradual_schedule_covers_exactly_its_steps(steps: int) -> None:
    *intervened, last = Recipe.preset("ti-g", intervention_steps=steps).phases()
    assert [phase.steps for phase in intervened] == [
        steps // 6,
        steps // 3 - steps // 6,
        steps - steps // 3,
    ]
    assert last.steps is None


def test_presets_refuse_what_they_cannot_do() -> None:
    with pytest.raises(RecipeError, match=r"no recipe is called 'ti-G'; did you mean .*'ti-g'"):
        Recipe.preset("ti-G")
    with pytest.raises(RecipeError, match="intervention_steps is 5; give at least 6"):
        Recipe.preset("ti-g", intervention_steps=5)


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
@pytest.mark.parametrize("recipe", [*map(Recipe.preset, PRESETS), FULL], ids=lambda recipe: recipe.name)
def test_a_recipe_reads_back_as_it_was_written(recipe: Recipe, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"recipe{suffix}"
    recipe.save(path)
    assert Recipe.load(path) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_everything_here_is_away_from_its_default() -> None:
    """Else the round trip above would not notice an option that is lost."""
    for made in (
        FULL.ternarize,
        FULL.activations,
        FULL.distill,
        FULL.keep_layers,
        FULL.schedule[0],
        FULL.schedule[0].intervene,
    ):
        assert made is not None
        default = Phase("map") if isinstance(made, Phase) else type(made)()
        same = [
            entry.name
            for entry in dataclasses.fields(made)
            if getattr(made, entry.name) == getattr(default, entry.name)
        ]
        assert same == [], type(made).__name__


def test_options_left_out_keep_their_defaults() -> None:
    assert Recipe.from_dict({"name": "short"}) == Recipe("short")
    short = Recipe.from_dict({"name": "short", "distill": {"task": 1}, "schedule": [{"name": "only"}]})
    assert short == Recipe("short", distill=Distill(task=1.0), schedule=(Phase("only"),))


def _edited(edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    values = json.loads(json.dumps(Recipe.preset("ti-g").to_dict()))
    edit(values)
    return dict(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(schedul=[]), r"recipe has no key 'schedul'; did you mean 'schedule'\?"),
        (lambda v: v.update({5: 1}), r"recipe has no key 5"),
        (lambda v: v["ternarize"].update(weigths=1),
            r"recipe\.ternarize has no option 'weigths'; did you mean 'weights'\?"),
        (lambda v: v["ternarize"].update({5: 1}), r"recipe\.ternarize has no option '5'"),
        (lambda v: v["activations"].update(encodin="x"),
            r"recipe\.activations has no option 'encodin'; did you mean 'encoding'"),
        (lambda v: v["distill"].update(score=1), r"recipe\.distill has no option 'score'; did you mean 'scores'\?"),
        (lambda v: v["schedule"][1].update(step=1), r"recipe\.schedule\[1\] has no key 'step'; did you mean 'steps'\?"),
        (lambda v: v["schedule"][2]["intervene"].update(layer=1),
            r"recipe\.schedule\[2\]\.intervene has no option 'layer'; did you mean 'layers'\?"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_at_every_level(edit: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(_edited(edit))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(format=2), "recipe has format 2; this version reads format 1"),
        (lambda v: v.pop("name"), "recipe has no name"),
        (lambda v: v.update(name=5), r"recipe\.name is 5; it must be text"),
        (lambda v: v.update(steps="many"), r"recipe\.steps is 'many'"),
        (lambda v: v.update(steps=True), r"recipe\.steps is True"),
        (lambda v: v.update(steps=0), r"recipe\.steps is 0"),
        (lambda v: v.update(ternarize="row"), r"recipe\.ternarize holds 'row'"),
        (lambda v: v.update(ternarize=None), r"recipe\.ternarize holds None"),
        (lambda v: v["ternarize"].update(weights="cube"), r"recipe\.ternarize: weights='cube' does not fit one of "),
        (lambda v: v["ternarize"].update(clip="wide"), r"recipe\.ternarize: clip='wide' does not fit float"),
        (lambda v: v["ternarize"].update(skip=5), r"recipe\.ternarize: skip=5 does not fit"),
        (lambda v: v["ternarize"].update(skip=[5]), r"recipe\.ternarize: skip=\[5\] does not fit"),
        (lambda v: v["activations"].update(encoding=8), r"recipe\.activations: encoding=8 does not fit str"),
        (lambda v: v["activations"].update(encoding="int8-tensr"), "int8-tensor"),
        (lambda v: v["activations"].update(attention="yes"), r"recipe\.activations: attention='yes' does not fit bool"),
        (lambda v: v["activations"].update(attention=1), r"recipe\.activations: attention=1 does not fit bool"),
        (lambda v: v["distill"].update(scores=True), r"recipe\.distill: scores=True does not fit float"),
        (lambda v: v["distill"].update(scores=None), r"recipe\.distill: scores=None does not fit float"),
        (lambda v: v["distill"].update(scores=[1]), r"recipe\.distill: scores=\[1\] does not fit float"),
        (lambda v: v["distill"].update(scores=-1), r"weight of scores is -1"),
        (lambda v: v["distill"].update(task=float("nan")), r"weight of task is nan"),
        (lambda v: v.update(schedule={}), r"recipe\.schedule holds \{\}; it must be a list"),
        (lambda v: v.update(schedule=[]), "has no phase"),
        (lambda v: v.update(schedule=["map"]), r"recipe\.schedule\[0\] holds 'map'"),
        (lambda v: v["schedule"][0].pop("name"), r"recipe\.schedule\[0\] has no name"),
        (lambda v: v["schedule"][0].update(name=1), r"recipe\.schedule\[0\]\.name is 1; it must be text"),
        (lambda v: v["schedule"][0].update(steps=None), "phase 'output' .* needs steps"),
        (lambda v: v["schedule"][0].update(steps=2.5), r"recipe\.schedule\[0\]\.steps is 2\.5"),
        (lambda v: v["schedule"][0].update(restart="yes"), r"recipe\.schedule\[0\]\.restart is 'yes'"),
        (lambda v: v["schedule"][0].update(intervene="output"), r"recipe\.schedule\[0\]\.intervene holds 'output'"),
        (lambda v: v["schedule"][0]["intervene"].update(at="outputs"),
            "can't intervene at 'outputs'; did you mean 'output'"),
        (lambda v: v["schedule"][0]["intervene"].update(layers=["a"]), "layers="),
        (lambda v: v["schedule"][0].update(name="context"), "two phases .*'context'"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_refused_in_one_line(edit: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_dict(_edited(edit))
    assert "\n" not in str(caught.value)


def test_one_name_may_come_twice_for_the_same_intervention() -> None:
    recipe = Recipe("twice", schedule=(Phase("map", Intervene("map"), 2), Phase("map", Intervene("map"))))
    assert len(recipe.phases()) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.json", "{", "is not JSON"),
        ("recipe.json", "[]", "must hold keys and values"),
        ("recipe.json", "", "is not JSON"),
        ("recipe.yaml", "name: [", "is not YAML"),
        ("recipe.yaml", "", "must hold keys and values"),
        ("recipe.yaml", "name: !!python/object:os.system {}", "is not YAML"),
        ("recipe.txt", "", r"must end in \.json, \.yaml or \.yml"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.load(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"can't read recipe .*missing\.json: No such file"):
        Recipe.load(tmp_path / "missing.json")
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    with pytest.raises(RecipeError, match=r"can't read recipe .*folder\.yaml: Is a directory"):
        Recipe.load(folder)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not JSON"):
        Recipe.load(tmp_path / "binary.json")
    with pytest.raises(InputError, match=r"can't write .*binary\.json"):
        FULL.save(tmp_path / "binary.json" / "recipe.json")


def test_an_unwritable_place_leaves_the_old_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    FULL.save(path)
    with pytest.raises(RecipeError, match="must end in"):
        FULL.save(path.with_suffix(".toml"))
    assert yaml.safe_load(path.read_text())["name"] == "everything"
    assert [found.name for found in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.slow
def test_equal_models_and_recipes_give_equal_dumps() -> None:
    recipe = Recipe.preset("ti-g")

    def digests() -> dict[str, str]:
        gm = ti_fx.capture(bert_model(layers=1), text_example())
        recipe.prepare(gm)
        return TernaryModel(gm, recipe).phase_digests()

    first, second = digests(), digests()
    assert first == second
    assert list(first) == ["output", "context", "map", "quantise"]
    assert len(set(first.values())) == 4


def test_preparing_twice_changes_nothing(bert_layer: Tiny) -> None:
    gm = bert_layer.fork()
    recipe = Recipe.preset("ti-o")
    recipe.prepare(gm)
    once, names = ti_fx.dump(gm), set(gm.state_dict())
    recipe.prepare(gm)
    assert ti_fx.dump(gm) == once
    assert set(gm.state_dict()) == names


def test_another_recipe_replaces_the_options_of_the_first(bert_layer: Tiny) -> None:
    first, fresh = bert_layer.fork(), bert_layer.fork()
    Recipe.preset("ti-o").prepare(first)
    other = Recipe("other", distill=Distill(scores=0.0, variant="paper"))
    other.prepare(first)
    other.prepare(fresh)
    assert ti_fx.diff(first, fresh) == ""


def test_a_recipe_prints_what_it_does() -> None:
    assert str(Recipe.preset("ti-g")).splitlines()[0] == "recipe ti-g"
    assert "  context: intervene{at=context}, 10 steps" in str(Recipe.preset("ti-g")).splitlines()
    assert "  quantise: intervene, to the end, restart" in str(Recipe.preset("ti-g")).splitlines()
