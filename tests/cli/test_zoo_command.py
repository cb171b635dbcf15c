"""``ti-fx zoo``: what it prints, the files it writes, what counts as what, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, ZOO_RESULTS

from ti_fx.errors import InputError
from ti_fx.zoo.chain import STAGES, Outcome
from ti_fx.zoo.page import render
from ti_fx.zoo.results import Result, Run, group_of
from ti_fx.zoo.run import Job, jobs
from ti_fx.zoo.summary import BEGIN, END, markdown, replaced

Called = Callable[..., tuple[int, str, str]]
MODELS = """
import os
import time

import torch
from torch import nn
from beside import SIZE


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(1100, SIZE)
        self.query, self.key, self.value, self.output = (nn.Linear(SIZE, SIZE) for _ in range(4))
        self.head = nn.Linear(SIZE, 4)

    def forward(self, tokens):
        x = self.embedding(tokens)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / SIZE**0.5
        return self.head(x + self.output(scores.softmax(-1) @ self.value(x)))


class ByValue(Attention):
    def forward(self, tokens):
        scores = super().forward(tokens)
        return scores * (1 if scores.sum() > 0 else 2)  # the weights decide, and training changes them


def example(kind):
    return kind(), {"tokens": torch.arange(10).view(2, 5)}, {"tokens": torch.arange(21).view(3, 7)}


def plain():
    return example(Attention)


def refused():
    return example(ByValue)


def without():
    return nn.Linear(4, 4), {"input": torch.ones(2, 4)}


def sleeps():
    time.sleep(600)


def dies():
    print("this is not shown")
    os._exit(7)


def raises():
    raise ValueError("no such weights")


def returns_nothing():
    pass
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of factories in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "models_to_try.py").write_text(MODELS)
    (tmp_path / "beside.py").write_text("SIZE = 16\n")
    return "models_to_try.py"


def results(path: Path) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in json.loads(path.read_text())["results"]}


@pytest.mark.slow
def test_types_and_a_factory_pass_and_say_so_everywhere(run: Called, models: str, tmp_path: Path) -> None:
    kept, page = tmp_path / "zoo.json", tmp_path / "zoo.html"
    work = ("bert", "mamba", f"{models}:plain")
    code, out, err = run("zoo", *work, "--until", "sites", "--json", kept, "--html", page)
    assert (code, err) == (0, "")
    assert re.search(r"^1/3  passed +bert  sites  2 blocks: 2 self  \d+\.\d s$", out, re.MULTILINE)
    assert "model types, eager attention: 1 with attention; left out: 1 without softmax attention" in out
    assert re.search(r"^  sites +1 of 1 \(100\.0%\)$", out, re.MULTILINE)
    assert "mamba: a state is carried from step to step" in out
    found = results(kept)
    assert {name: (one["verdict"], one["group"], one["file"]) for name, one in found.items()} == {
        "bert": ("passed", "encoder", None),
        "mamba": ("no attention", "decoder", None),
        "plain": ("passed", "plain PyTorch", models),
    }
    assert "BertForSequenceClassification" in page.read_text()

    # Going on with the file skips what is in it, unless it passed and has further to go.
    more = (f"{models}:plain", "--json", kept, "--resume", "--until")
    code, out, _ = run("zoo", *more, "sites")
    assert (code, out.splitlines()[0]) == (0, f"1 of 1 are in {kept} already")
    code, out, _ = run("zoo", *more, "teacher")
    assert (code, out.split()[:3]) == (0, ["1/1", "passed", "plain"])
    stages = {name: one["stage"] for name, one in results(kept).items()}
    assert stages == {"bert": "sites", "mamba": "build", "plain": "teacher"}
    for option, count in (("--resume", 2), ("--retry", 1)):
        _, out, _ = run("zoo", "bert", "mamba", "--json", kept, option, "--until", "sites")
        assert out.startswith(f"{count} of 2 are in {kept} already\n")


@pytest.mark.slow
def test_a_factory_goes_through_the_whole_chain(run: Called, models: str, tmp_path: Path) -> None:
    code, out, err = run("zoo", f"{models}:plain", "--json", tmp_path / "zoo.json")
    assert (code, err) == (0, "")
    found = results(tmp_path / "zoo.json")["plain"]
    assert found["stage"] == STAGES[-1]
    assert {"captured", "replaced", "float runtime", "int8-tensor runtime"} <= found["numbers"].keys()
    assert re.search(r"^  runtime +1 of 1 \(100\.0%\)$", out, re.MULTILINE)


@pytest.mark.slow
def test_what_goes_wrong_is_told_apart(run: Called, models: str, tmp_path: Path) -> None:
    kept, page = tmp_path / "zoo.json", tmp_path / "zoo.html"
    work = [f"{models}:{name}" for name in ("dies", "refused", "without", "raises", "returns_nothing")]
    options = ("--until", "capture", "--json", kept, "--html", page)
    code, _, err = run("zoo", f"{models}:sleeps", "--limit", 1, *options)
    assert (code, err) == (1, "")
    code, out, err = run("zoo", *work, "--workers", 2, "--resume", *options)
    assert (code, err) == (1, "")
    found = results(kept)
    assert {name: one["verdict"] for name, one in found.items()} == {
        "sleeps": "timed out",
        "dies": "died",
        "refused": "refused",
        "without": "no attention",
        "raises": "not built",
        "returns_nothing": "not built",
    }
    assert found["sleeps"]["refused"] == ["TimeoutError", "build: not done after 1 s"]
    assert found["dies"]["refused"] == ["ProcessError", "build: the process ended with code 7"]
    assert found["refused"]["refused"][0] == "CaptureError"
    assert [found[name]["typed"] for name in ("sleeps", "dies", "refused")] == [False, False, True]
    assert "raises() raised ValueError: no such weights" in out
    assert "this is not shown" not in out
    assert "site-packages/" not in kept.read_text()
    text = page.read_text()
    places = [text.index(f"{name} ({models})") for name in ("sleeps", "dies", "refused")]
    assert places == sorted(places)
    assert "build: not done after 1 s" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("brt",), "'brt' is no model type and no Python file; did you mean "),
        (("absent.py",), "there is no file absent.py"),
        (("models_to_try.py:plane",), "models_to_try.py has no factory 'plane'; did you mean 'plain'"),
        (("empty.py",), "empty.py has no factory; write a function without arguments"),
        (("broken.py",), "broken.py can't be imported: NameError: name 'oops' is not defined"),
        (("leaves.py",), "leaves.py can't be imported: SystemExit: 3"),
        (("bert", "--until", "trian"), "there is no stage 'trian' for --until; did you mean 'train'"),
        (("bert", "--attention", "flash"), "--attention is 'flash'"),
        (("bert", "--limit", "0"), "--limit is 0"),
        (("bert", "--workers", "0"), "--workers is 0"),
        (("bert", "--resume"), "--resume needs --json"),
        (("bert", "--retry"), "--retry needs --json"),
        (("bert", "--resume", "--json", "empty.py"), "empty.py holds no results of ti-fx zoo"),
        (("bert", "--json", "empty.py/zoo.json"), "can't write empty.py/zoo.json"),
    ],
)
def test_bad_input_is_one_line(
    run: Called, models: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty.py").write_text("def takes(one): pass\n")
    (tmp_path / "broken.py").write_text("oops\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    code, out, err = run("zoo", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"ti-fx: {message}")
    assert err.count("\n") == 1


def test_the_help_names_every_stage(run: Called) -> None:
    code, out, _ = run("zoo", "--help")
    assert code == 0
    assert " ".join(STAGES) in " ".join(out.split())


@pytest.mark.slow
def test_ctrl_c_ends_the_processes_and_keeps_what_is_done(models: str, tmp_path: Path) -> None:
    with open(models, "a", encoding="utf-8") as file:
        file.write("\ndef waits():\n    open('pid', 'w').write(str(os.getpid()))\n    time.sleep(600)\n")
    # What a shell starts with & ignores Ctrl-C, and so would what these tests start then.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{listening}; from ti_fx.cli import main; main()"]
    command += ["zoo", "--json", "zoo.json"]
    command += ["--until", "build", f"{models}:plain", f"{models}:waits"]
    # A group of its own, as a terminal's: Ctrl-C reaches every process in it.
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(started.pid, signal.SIGINT)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 130
    assert err == "ti-fx: stopped; zoo.json holds 1 results, and --resume goes on from there\n"
    assert results(tmp_path / "zoo.json").keys() == {"plain"}
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_type_is_run_once_for_each_attention_and_a_factory_once(models: str) -> None:
    assert jobs("bert", ("eager", "sdpa")) == [Job("bert"), Job("bert", attention="sdpa")]
    names = [job.name for job in jobs(models, ("eager", "sdpa"))]
    assert names == ["plain", "refused", "without", "sleeps", "dies", "raises", "returns_nothing"]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("BertForSequenceClassification", "encoder"),
        ("LlamaForCausalLM", "decoder"),
        ("XLNetLMHeadModel", "decoder"),
        ("T5ForConditionalGeneration", "encoder-decoder"),
        ("ViTForImageClassification", "vision"),
        ("Qwen2_5_VisionTransformerPretrainedModel", "multimodal"),
        ("Wav2Vec2ForCTC", "audio"),
        ("WhisperForConditionalGeneration", "audio"),
        ("CLIPModel", "multimodal"),
        ("Gemma3ForCausalLM", "decoder"),  # of a multimodal family, and takes text only
        ("InformerModel", "other"),
        ("NoSuchModel", "other"),
    ],
)
def test_a_class_is_grouped_by_what_it_takes(name: str, group: str) -> None:
    assert group_of(name) == group


def result(name: str, group: str = "encoder", until: str = "runtime", **outcome: Any) -> Result:
    job = Job(name, attention=outcome.pop("attention", "eager"))
    return Result(job, Outcome(name, attention=job.attention, **outcome), until, group)


def test_the_table_counts_by_group_and_lists_what_is_left_out() -> None:
    refused = ("CoverageError", "sites: 1 attention blocks found, 2 counted | <here> [a](b)")
    run = Run.of(
        [
            result("a", stage="runtime", blocks=2, sites=2),
            result("b", stage="capture", blocks=2, sites=1, refused=refused),
            result("c", stage="train", blocks=2, sites=2, until="train"),
            result("d", "vision", stage="train", refused=("KeyError", "pack: x"), typed=False, blocks=1),
            result("mamba", stage="build", refused=("CoverageError", "count: none"), blocks=0),
            result("e", "", refused=("DataError", "build: e: needs the package x")),
            result("f", "", refused=("DataError", "build: f: needs the package x")),
            result("f", "", refused=("DataError", "build: f: needs the package x"), attention="sdpa"),
            result("a", stage="runtime", blocks=2, sites=2, attention="sdpa"),
            result("b", "", refused=("DataError", "build: b: has no sdpa"), attention="sdpa"),
        ]
    )
    lines = markdown(run).splitlines()
    assert [line for line in lines if line.startswith("| ")][2:] == [
        "| encoder | 3 | 2 | 1 of 2 | 1 | 1 | 1 |",
        "| vision | 1 | 1 | 0 | 0 | – | – |",
        "| **all types** | **4** | **3 (75.0%)** | **1 of 3 (33.3%)** | **1** | **1 (100.0%)** | **1 (100.0%)** |",
    ]
    assert "- `d`: KeyError: pack: x" in lines
    assert "- `b`: CoverageError: sites: 1 attention blocks found, 2 counted | &lt;here> [a]\\(b)" in lines
    assert "<details><summary>Without softmax attention: 1</summary>" in lines
    assert "<details><summary>Built, but not with sdpa attention: 1</summary>" in lines
    assert "- `b`: has no sdpa" in lines
    assert "<details><summary>Not built: 2</summary>" in lines
    assert "- `e`, `f`: needs the package x" in lines


def test_a_page_escapes_what_it_shows_and_needs_nothing_else() -> None:
    text = render(
        Run.of([result("<b>", stage="count", blocks=1, refused=("Error", "capture: <script>"), typed=False)])
    )
    assert "&lt;b&gt;" in text
    assert "capture: &lt;script&gt;" in text
    assert text.count("<script>") == 1
    assert not re.search(r'(?:src|href)="(?!#|data:)', text)
    render(Run.of([]))


def test_a_file_of_results_reads_back(tmp_path: Path) -> None:
    run = Run.of(
        [result("a", stage="sites", refused=("Error", "teacher: x"), kinds={"self": 2}), result("b")]
    )
    run.write(tmp_path / "zoo.json")
    assert Run.read(tmp_path / "zoo.json") == run
    worse = Run.of([result("a", numbers={"captured": float("inf"), "loss": float("nan"), "replaced": 1 / 3})])
    worse.write(tmp_path / "zoo.json")
    again = Run.read(tmp_path / "zoo.json")
    assert again.results[0].outcome.numbers == {"captured": None, "loss": None, "replaced": 0.333333}
    again.write(tmp_path / "zoo.json")
    render(again)
    with pytest.raises(InputError, match=r"can.t read .*absent\.json: No such file"):
        Run.read(tmp_path / "absent.json")


def test_the_page_of_architectures_shows_the_committed_results() -> None:
    kept = ZOO_RESULTS
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    table = markdown(Run.read(kept))
    again = "run: python -m ti_fx.zoo.summary docs/zoo.json docs/architectures.md"
    assert replaced(page, table) == page, again
    assert str(ROOT) not in kept.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="has no place for the table"):
        replaced(page.replace(BEGIN, "").replace(END, ""), table)
