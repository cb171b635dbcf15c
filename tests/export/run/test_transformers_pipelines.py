"""An exported file as a callable: transformers' pipelines around ONNX Runtime, with what lies beside the file."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from classifier import LABELS, tokenizer
from exported_models import without_record
from models import bert_model, llama_model, text_example, vit_model
from PIL import Image
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import GenerationConfig, TextClassificationPipeline, ViTImageProcessorPil

import ti_fx
from ti_fx.errors import InputError, MissingExtra
from ti_fx.export import Runtime, pipeline, to_onnx, with_cache
from ti_fx.export.run.generate import OnnxCausalLM
from ti_fx.passes import Pack, QuantizeActivations, Ternarize

TEXTS = ["how many w7", "who is w2 and w5 and w9 and w11"]
NAMES: dict[str, Any] = {
    "id2label": dict(enumerate(LABELS)),
    "label2id": {name: index for index, name in enumerate(LABELS)},
}
# The student in PyTorch and ONNX Runtime: float32 sums in another order, no value beside a rounding boundary.
CLOSE = 1e-5


def packed(model: nn.Module, example: dict[str, Tensor], dynamic: Any = "auto") -> GraphModule:
    gm = ti_fx.capture(model.train(False), example, dynamic=dynamic)
    ti_fx.Pipeline(Ternarize(min_rows=32), QuantizeActivations("int8-token"), Pack())(gm)
    return gm


@dataclass(frozen=True)
class Exported:
    """A packed student and its file."""

    student: GraphModule
    path: Path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A classifier of texts and pairs of texts, of any size up to 32 tokens."""
    model = bert_model(layers=1, initializer_range=0.5, **NAMES)
    example = {**text_example(batch=2), "token_type_ids": torch.tensor([[0] * 3 + [1] * 4] * 2)}
    student = packed(model, example)
    path = tmp_path_factory.mktemp("texts") / "student.onnx"
    to_onnx(student, path, example, config=model.config, tokenizer=tokenizer())
    return Exported(student, path)


def scores(student: GraphModule, *given: Any, **options: Any) -> Tensor:
    """Return what PyTorch's student says of the tokenizer's output."""
    inputs = tokenizer()(*given, return_tensors="pt", return_token_type_ids=True, **options)
    with torch.no_grad():
        found: Tensor = student(**inputs)["logits"].softmax(-1)
    return found


def test_texts_get_labels_and_scores(texts: Exported) -> None:
    call = pipeline(texts.path)
    (found,) = call(TEXTS[0])
    expected = scores(texts.student, TEXTS[0])[0]
    assert found["label"] == LABELS[int(expected.argmax())]
    assert found["score"] == pytest.approx(float(expected.max()), abs=CLOSE)
    every = call(TEXTS, top_k=None, batch_size=2)
    for row, text in zip(every, TEXTS, strict=True):
        expected = scores(texts.student, text)[0]
        assert {one["label"]: one["score"] for one in row} == pytest.approx(
            dict(zip(LABELS, expected.tolist(), strict=True)), abs=CLOSE
        )
    assert call([]) == []


def test_pairs_of_texts_are_told_apart(texts: Exported) -> None:
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    found = pipeline(texts.path, top_k=None)([pair])[0]
    expected = scores(texts.student, TEXTS[0], TEXTS[1])[0]
    assert {one["label"]: one["score"] for one in found} == pytest.approx(
        dict(zip(LABELS, expected.tolist(), strict=True)), abs=CLOSE
    )


def test_a_long_text_is_cut_at_what_the_model_takes(texts: Exported) -> None:
    long = " ".join(f"w{index}" for index in range(100))
    (found,) = pipeline(texts.path)(long)
    expected = scores(texts.student, long, truncation=True, max_length=32)[0]
    assert found["score"] == pytest.approx(float(expected.max()), abs=CLOSE)
    with pytest.raises(InputError, match="has size 40, and the model takes at most 32"):
        pipeline(texts.path)(long, max_length=40)


class Bag(nn.Module):
    """A classifier of bags of words: quick to export."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix, self.head = nn.Embedding(1100, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return {"logits": self.head(self.mix((self.table(input_ids) * mask.unsqueeze(-1)).sum(1)))}


def bag(folder: Path, example: dict[str, Tensor], dynamic: Any = "auto") -> Exported:
    student = packed(Bag(), example, dynamic)
    report = to_onnx(
        student, folder / "bag.onnx", example, config=bert_model(**NAMES).config, tokenizer=tokenizer()
    )
    return Exported(student, report.path)


def test_a_file_of_fixed_sizes_takes_any_texts(tmp_path: Path) -> None:
    example = text_example(batch=2)
    length = example["input_ids"].shape[1]
    exported = bag(tmp_path, example, "none")
    assert Runtime(exported.path).inputs["input_ids"].shape == [2, length]
    given = [*TEXTS, "how much"]
    cut = tokenizer()(given, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids, mask = cut["input_ids"], cut["attention_mask"]
    with torch.no_grad():  # two rows at a time, the last one twice
        rows = [
            exported.student(input_ids=ids[two], attention_mask=mask[two])["logits"]
            for two in ([0, 1], [2, 2])
        ]
    expected = torch.cat(rows)[:3].softmax(-1).amax(-1)
    found = pipeline(exported.path)(given, batch_size=3)
    assert [row["score"] for row in found] == pytest.approx(expected.tolist(), abs=CLOSE)


def test_an_input_that_the_file_lacks_is_refused_where_it_matters(tmp_path: Path) -> None:
    call = pipeline(bag(tmp_path, {"input_ids": text_example(batch=2)["input_ids"]}).path)
    assert len(call(TEXTS)) == 2
    with pytest.raises(InputError, match="takes no attention_mask, and these texts need it"):
        call(TEXTS, batch_size=2)
    with pytest.raises(InputError, match="takes no token_type_ids, and these texts need it"):
        call({"text": TEXTS[0], "text_pair": TEXTS[1]}, return_token_type_ids=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = vit_model(num_hidden_layers=1, image_size=16, initializer_range=0.5, **NAMES)
    example = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    student = packed(model, example)
    path = tmp_path_factory.mktemp("images") / "student.onnx"
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    report = to_onnx(student, path, example, config=model.config, processor=processor)
    assert {part.name for part in report.sidecars} == {"config.json", "preprocessor_config.json"}
    return Exported(student, path)


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_images_get_labels_and_scores(images: Exported, tmp_path: Path) -> None:
    call = pipeline(images.path)
    assert isinstance(call.image_processor, ViTImageProcessorPil)
    picture(0).save(tmp_path / "a.png")
    found = call([picture(0), picture(1)], batch_size=2)
    assert [one["label"] for one in call(picture(0))] == [one["label"] for one in found[0]]
    assert call(str(tmp_path / "a.png")) == call(tmp_path / "a.png") == call(picture(0))
    with torch.no_grad():
        pixels = call.image_processor(picture(1), return_tensors="pt")["pixel_values"]
        expected = images.student(pixel_values=pixels)["logits"][0].softmax(-1)
    assert {one["label"]: one["score"] for one in found[1]} == pytest.approx(
        dict(zip(LABELS, expected.tolist(), strict=True)), abs=CLOSE
    )


def test_images_need_pillow(images: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'ti_fx\[images\]'"):
        pipeline(images.path)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = llama_model(
        num_hidden_layers=1, initializer_range=0.5, eos_token_id=3, pad_token_id=0, bos_token_id=2
    ).train(False)
    example = text_example(batch=2)
    cached = with_cache(packed(model, example), model, example)
    path = tmp_path_factory.mktemp("prompts") / "student.onnx"
    generation: Any = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=5, do_sample=False, eos_token_id=3, pad_token_id=0
    )
    report = to_onnx(
        *(cached.gm, path, cached.inputs),
        config=model.config,
        tokenizer=tokenizer(),
        generation_config=generation,
    )
    assert {part.name for part in report.sidecars} >= {"generation_config.json", "tokenizer_config.json"}
    return Exported(cached.gm, path)


@pytest.mark.slow
def test_prompts_are_continued(prompts: Exported) -> None:
    call = pipeline(prompts.path)
    single = [call(text)[0]["generated_text"] for text in TEXTS]
    assert all(
        whole.startswith(text) and len(whole) > len(text) for whole, text in zip(single, TEXTS, strict=True)
    )
    runtime: Any = OnnxCausalLM(prompts.path, call.model.config, call.model.generation_config)
    ids = tokenizer()(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    written = runtime.generate(**ids, do_sample=False, eos_token_id=3, pad_token_id=0)[
        0, ids["input_ids"].shape[1] :
    ]
    assert single[0] == f"{TEXTS[0]}{tokenizer().decode(written, skip_special_tokens=True)}"
    # padded on the left, as the pipeline sees to, each is continued as alone
    together = call(TEXTS, batch_size=2)
    assert [row[0]["generated_text"] for row in together] == single
    new = call(TEXTS[0], return_full_text=False, max_new_tokens=2)[0]["generated_text"]
    assert 0 < len(new.split()) <= 2


def test_sampling_options_reach_generate(prompts: Exported) -> None:
    call = pipeline(prompts.path, do_sample=True, top_k=0, temperature=5.0)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(call(TEXTS[0])[0]["generated_text"])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(call(TEXTS[0], num_return_sequences=3)) == 3


def test_a_pipeline_is_transformers_own(texts: Exported) -> None:
    assert isinstance(pipeline(texts.path), TextClassificationPipeline)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "takes a text, a pair .*; got int"),
        ([TEXTS[0], None], "got NoneType"),
        ({"texts": "how"}, "got dict"),
        ({"text": "how", "text_pair": 1}, "got dict"),
    ],
)
def test_what_is_no_text_is_refused(texts: Exported, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline(texts.path)(given)


def test_what_is_no_image_or_no_prompt_is_refused(
    images: Exported, prompts: Exported, tmp_path: Path
) -> None:
    call = pipeline(images.path)
    with pytest.raises(InputError, match=r"takes a PIL image, .*; got int"):
        call(5)
    with pytest.raises(InputError, match="can't make inputs of this str: Incorrect image source"):
        call(str(tmp_path / "none.png"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="can't make inputs of this PosixPath: cannot identify image"):
        call(tmp_path / "text.png")
    with pytest.raises(InputError, match=r"takes a prompt, .*; got int"):
        pipeline(prompts.path)(5)


def test_options_that_transformers_can_not_use_are_one_line(images: Exported, prompts: Exported) -> None:
    picture, prompt = Image.new("L", (9, 9)), "how"
    look, generate = pipeline(images.path), pipeline(prompts.path)
    for call, message in (
        (lambda: look(None), "without an inputs argument"),
        (lambda: look(picture, top_k="2"), "not supported between instances"),
        (lambda: look(picture, nonsense=1), "unexpected keyword argument 'nonsense'"),
        (lambda: look([picture, picture], batch_size=0), "batch_size should be a positive integer"),
        (lambda: pipeline(images.path, nonsense=1), "can't make this pipeline: .*'nonsense'"),
        (lambda: generate(prompt, max_new_tokens=0), "`max_new_tokens` must be greater than 0"),
        (lambda: generate(prompt, max_new_tokns=3), "'max_new_tokns'"),
        (lambda: generate(prompt, num_beams=0), "integer division or modulo by zero"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_a_text_without_a_token_is_named(texts: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    call = pipeline(texts.path)
    none = {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}
    monkeypatch.setattr(TextClassificationPipeline, "preprocess", lambda self, given, **options: none)
    with pytest.raises(InputError, match="makes no token of the text ' '; give one that is not empty"):
        call(" ")


def test_a_wrong_task_is_refused(texts: Exported, prompts: Exported, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="there is no task 'text-clasification'; did you mean 'text-classification'"
    ):
        pipeline(texts.path, "text-clasification")
    with pytest.raises(InputError, match="is for text-classification, and text-generation was asked for"):
        pipeline(texts.path, "text-generation")
    with pytest.raises(InputError, match="is for text-generation, and image-classification was asked for"):
        pipeline(prompts.path, "image-classification")
    with pytest.raises(InputError, match="there is no file"):
        pipeline(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="takes x and gives y, which is none of text-classification"):
        pipeline(relu(tmp_path, "x", "y"))
    with pytest.raises(
        InputError, match=r"one of an encoder-decoder's two files; call both with .*OnnxSeq2SeqLM"
    ):
        pipeline(relu(tmp_path, "x", "cross_key_0"))


def relu(folder: Path, given: str, made: str) -> Path:
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4])
        for name in (given, made)
    ]
    node = onnx.helper.make_node("Relu", [given], [made])
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / "relu.onnx")
    return folder / "relu.onnx"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"there is no config.json beside .*to_onnx\(..., config=model.config\)"),
        ("tokenizer_config.json", r"there is no tokenizer_config.json beside .*tokenizer=tokenizer"),
    ],
)
def test_what_is_missing_beside_a_file_is_named(
    texts: Exported, tmp_path: Path, missing: str, message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(texts.path.parent, folder)
    (folder / missing).unlink()
    with pytest.raises(InputError, match=message):
        pipeline(folder / "student.onnx")


def test_what_is_damaged_or_of_another_model_is_refused(
    texts: Exported, images: Exported, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(texts.path.parent, folder)
    without_record(folder / "student.onnx")
    bert_model(num_labels=5).config.save_pretrained(folder)
    with pytest.raises(InputError, match="names 5 labels, and the file gives 3; it is another model's"):
        pipeline(folder / "student.onnx")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"can't read config.json beside .*export it again"):
        pipeline(folder / "student.onnx")
    shutil.copy(images.path, folder / "image.onnx")
    shutil.copy(images.path.parent / "config.json", folder)
    with pytest.raises(InputError, match=r"there is no preprocessor_config\.json beside"):
        pipeline(folder / "image.onnx")
