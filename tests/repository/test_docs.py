"""The documentation is true where a test can tell: links, commands, code, the list of every file."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import ti_fx

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
ARCHITECTURE = DOCS / "ARCHITECTURE.md"
README_LINES = 150
CHANGELOG_LINES = 110
Called = Callable[..., tuple[int, str, str]]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)


def test_the_readme_and_the_changelog_are_short() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= README_LINES
    assert len(read(ROOT / "CHANGELOG.md").splitlines()) <= CHANGELOG_LINES


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_leads_to_every_page() -> None:
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in read(ROOT / "README.md"), page.name


def commands() -> Iterator[Any]:
    for page in PAGES:
        for block in blocks(page, "console"):
            lines = [line.partition("  #")[0].strip() for line in block.splitlines()]
            typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            for line in typed or filter(None, lines):  # with a prompt, what has none is what was printed
                yield pytest.param(line, id=f"{page.name}: {line}")


@pytest.mark.parametrize("line", list(commands()))
def test_commands_exist_and_have_their_options(
    line: str, run: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # so that no option is cut short
    program, first, *rest = itertools.dropwhile(lambda word: "=" in word, shlex.split(line))  # a setting
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        known = re.findall(r"^([a-z-]+):.*## ", read(ROOT / "Makefile"), re.MULTILINE)
        assert first in known
    elif program == "ti-fx":
        code, out, _ = run(first, "--help")
        assert code == 0
        assert {word for word in rest if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", out))
    elif program.endswith("python") and first == "-m":
        assert find_spec(rest[0]) is not None
    elif program == "python":
        text = read(ROOT / first)
        assert all(word in text for word in rest if word.startswith("--"))
    else:
        assert (program, first) in {("pip", "install"), ("git", "diff"), ("pre-commit", "install")}, line
        assert all((ROOT / word).exists() for word in rest if "/" in word or word.endswith(".txt"))


SIZES: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}


def classifier(folder: Path) -> dict[str, Any]:
    """What the pages about classifiers take as given: a model, its tokenizer, inputs."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "any", "text", "and", "another", "one"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    kind: Any = BertTokenizer  # untyped in transformers
    tokenizer = kind(str(folder / "vocab.txt"))
    sizes = {**SIZES, "vocab_size": 1100, "intermediate_size": 64, "num_labels": 3}
    model: nn.Module = BertForSequenceClassification(BertConfig(**sizes))
    example = tokenizer(["any text", "and another one"], padding=True, return_tensors="pt")
    rows = dict(example)
    return {"model": model.eval(), "tokenizer": tokenizer, "example": dict(example), "rows": rows}


def language_model(folder: Path) -> dict[str, Any]:
    """What the pages about language models take as given: a model in a folder, its configuration, inputs."""
    config = LlamaConfig(vocab_size=1100, intermediate_size=64, pad_token_id=0, **SIZES)
    model: Any = LlamaForCausalLM(config)
    model.eval()
    model.save_pretrained(folder / "model")
    tokens = torch.arange(2, 12).view(2, 5)
    example = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {"model": model, "config": config, "folder": folder / "model", "example": example}


GIVEN = {
    "ARCHITECTURE.md": classifier,
    "encodings.md": classifier,
    "file.md": classifier,
    "training.md": classifier,
    "language-models.md": language_model,
    "large-models.md": language_model,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in sorted(DOCS.glob("*.md")) if blocks(page, "python")], ids=lambda page: page.name
)
def test_code_runs_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    names = {"ti_fx": ti_fx, **GIVEN[page.name](tmp_path)}
    for code in blocks(page, "python"):  # the blocks of a page go on from each other
        exec(compile(code, page.name, "exec"), names)


def test_no_code_stands_in_a_block_that_no_test_runs() -> None:
    for page in PAGES:
        languages = set(re.findall(r"^```(\S+)$", read(page), re.MULTILINE))
        assert languages <= {"python", "console"}, page.name


def modules() -> set[str]:
    """Return every module of the package by its path; the links below ``ti_fx`` are followed at the top only."""
    paths = (path for room in ("ti_fx", "passes", "export") for path in (ROOT / room).rglob("*.py"))
    names = {path.relative_to(ROOT).as_posix() for path in paths}
    return {name for name in names if not name.startswith(("ti_fx/passes/", "ti_fx/export/"))}


def described() -> set[str]:
    """Return the modules that the page of the architecture describes, a row each below its room."""
    found = set()
    for section in re.split(r"^### ", read(ARCHITECTURE), flags=re.MULTILINE)[1:]:
        room = re.match(r"`([^`]+/)`", section)
        if room:
            found |= {room[1] + name for name in re.findall(r"^\| `(\w+\.py)` \|", section, re.MULTILINE)}
    return found


def test_the_architecture_describes_every_module() -> None:
    # a description is all that the __init__.py of many rooms holds
    missing = {name for name in modules() - described() if not name.endswith("/__init__.py")}
    assert missing == set(), "give each a row in docs/ARCHITECTURE.md"
    assert described() - modules() == set(), "there is no such file; mend docs/ARCHITECTURE.md"


def test_the_walks_name_functions_of_the_files_beside_them() -> None:
    rows = re.findall(r"^\| \d+ \| [^|]* \| ([^|]*) \| ([^|]*) \|$", read(ARCHITECTURE), re.MULTILINE)
    assert len(rows) > 30
    for functions, files in rows:
        texts = [read(ROOT / name) for name in re.findall(r"`([\w/]+\.py)`", files)]
        for function in re.findall(r"`([\w.]+)`", functions) if texts else []:
            name = function.rpartition(".")[2]
            assert any(re.search(rf"\b(?:def|class) {name}\b", text) for text in texts), (function, files)


@pytest.mark.slow  # half a minute: a graph of 32 layers
def test_a_large_model_is_shown_as_printed(
    run: Called, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "llama-7b")
    monkeypatch.chdir(tmp_path)
    (shown,) = [block for block in blocks(DOCS / "large-models.md", "console") if block.startswith("$ ")]
    line, _, printed = shown.partition("\n")
    code, out, _ = run(*shlex.split(line.removeprefix("$ ti-fx ")))
    assert code == 0
    assert [row.rstrip() for row in out.splitlines()] == [row.rstrip() for row in printed.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_is_named_exists(page: Path) -> None:
    rooms = r"(?:ti_fx|passes|export|tests|examples|benchmarks|docs)"
    for name in re.findall(rf"(?<![\w/.]){rooms}/[\w/.-]*\w\.(?:py|json|md|svg)\b", read(page)):
        assert (ROOT / name).exists(), name
    for name in re.findall(rf"`({rooms}/(?:[\w-]+/)*)`", read(page)):
        assert (ROOT / name).is_dir(), name
