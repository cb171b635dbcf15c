"""A model in two files: what they hold, what is refused, and that a write that stops anywhere leaves a whole pair."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported_models import Layers, layers_example, packed
from torch.fx import GraphModule

from ti_fx.errors import ExportError, InputError, ParityError, TiFxError
from ti_fx.export import ParityReport, Runtime, check, compare, to_onnx, writer
from ti_fx.export.compare import whole_file
from ti_fx.export.file import write
from ti_fx.export.file.content import open_file
from ti_fx.export.file.external_data import DATA_KEY, data_file
from ti_fx.export.file.stored import is_external
from ti_fx.export.file.write import write_model

# --- a pair of files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layers() -> GraphModule:
    return packed(Layers(), layers_example(), "base3")


@pytest.fixture(scope="module")
def written(layers: GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair") / "student.onnx"
    report = to_onnx(layers, path, layers_example(), external_data=True, size_threshold=0)
    assert report.sidecars == (data_file(path),)
    assert report.bytes == sum(file.stat().st_size for file in path.parent.iterdir())
    return path


@pytest.fixture
def pair(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written.parent, tmp_path / "copy")) / written.name


def data_of(path: Path) -> Path:
    found = data_file(path)
    assert found is not None
    return found


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_pair_is_one_model(written: Path, layers: GraphModule, run: Callable[..., Any]) -> None:
    data = data_of(written)
    assert names_in(written.parent) == [written.name, data.name]
    stored = onnx.load(str(written), load_external_data=False).graph.initializer
    outside = [tensor for tensor in stored if is_external(tensor)]
    assert {"packed.first.weight_codes", "packed.first.bias_half", "codes_of_base3"} <= {
        tensor.name for tensor in outside
    }
    assert all(tensor.data_type == onnx.TensorProto.INT64 for tensor in stored if tensor not in outside)
    for tensor in outside:  # can be mapped into memory
        assert int({entry.key: entry.value for entry in tensor.external_data}["offset"]) % 4096 == 0
    check(written, layers, layers_example())
    expected = layers(**layers_example())["logits"].detach().numpy()
    np.testing.assert_allclose(Runtime(written)(layers_example())["logits"], expected, atol=1e-5)
    code, out, _ = run("inspect", written, "--json")
    assert code == 0
    assert json.loads(out)["bytes"] == written.stat().st_size + data.stat().st_size


def test_the_same_student_gives_the_same_bytes(written: Path, layers: GraphModule, tmp_path: Path) -> None:
    to_onnx(layers, tmp_path / written.name, layers_example(), external_data=True, size_threshold=0)
    assert names_in(tmp_path) == names_in(written.parent)
    for name in names_in(tmp_path):
        assert (tmp_path / name).read_bytes() == (written.parent / name).read_bytes()


def test_large_tensors_begin_where_windows_can_map_them(tmp_path: Path) -> None:
    model = onnx_model({"small": 3, "large": 2**20, "last": 5})
    write_model(model, tmp_path / "a.onnx", external=True, size_threshold=0)
    spans = {
        name: (value.const_value.offset, value.const_value.length)
        for name, value in model.graph.initializers.items()
    }
    assert spans == {"small": (0, 3), "large": (65536, 2**20), "last": (65536 + 2**20, 5)}


def onnx_model(sizes: dict[str, int]) -> Any:
    import onnx_ir as ir

    values = [
        ir.Value(name=name, const_value=ir.tensor(np.full(size, 7, np.uint8), name=name))
        for name, size in sizes.items()
    ]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 25}), ir_version=13)


def test_above_the_limit_a_model_becomes_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "LIMIT", 3000)
    write_model(onnx_model({"a": 2000}), tmp_path / "small.onnx", None, 1024)
    assert names_in(tmp_path) == ["small.onnx"]
    write_model(onnx_model({"a": 2000, "b": 2000, "c": 1000}), tmp_path / "large.onnx", None, 1024)
    data = data_of(tmp_path / "large.onnx")
    assert data.stat().st_size == 4096 + 2000  # c stays in the model
    with pytest.raises(ExportError, match=r"don't fit one ONNX file \(2 GB\); leave external_data out"):
        write_model(onnx_model({"a": 4000}), tmp_path / "refused.onnx", False, 1024)


def test_a_negative_threshold_is_refused(layers: GraphModule, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="size_threshold is -1"):
        to_onnx(layers, tmp_path / "a.onnx", layers_example(), size_threshold=-1)


# --- what is refused -------------------------------------------------------------------------------------------------


def shorten(path: Path) -> None:
    data = data_of(path)
    data.write_bytes(data.read_bytes()[:-1])


def change(path: Path) -> None:
    data = data_of(path)
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)


def link(path: Path) -> None:
    data = data_of(path)
    data.rename(path.parent.parent / "elsewhere")
    data.symlink_to(path.parent.parent / "elsewhere")


def edit(path: Path, key: str, value: str) -> None:
    """Change what every external tensor says of its place."""
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value
    path.write_bytes(model.SerializeToString())


def record(path: Path, **changes: Any) -> None:
    """Change what the metadata says of the data file."""
    model = onnx.load(str(path), load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == DATA_KEY:
            entry.value = json.dumps({**json.loads(entry.value), **changes})
    path.write_bytes(model.SerializeToString())


def relocate(path: Path, location: str) -> None:
    edit(path, "location", location)
    record(path, name=location)


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda path: data_of(path).unlink(), "it is missing; copy both"),
    "short": (shorten, "bytes, and .* were written"),
    "changed": (change, "its SHA-256 is another"),
    "link": (link, "is a link; copy the file itself"),
    "absolute": (
        lambda path: relocate(path, str(data_of(path).resolve())),
        "no file beside it: don't trust it",
    ),
    "above": (lambda path: relocate(path, f"../copy/{data_of(path).name}"), "no file beside it"),
    "backslash": (lambda path: relocate(path, r"..\student.data"), "no file beside it"),
    "folder": (lambda path: relocate(path, ".."), "no file beside it"),
    "one of two": (lambda path: edit(path, "location", "other.data"), "'other.data', which .* did not write"),
    "beyond": (lambda path: edit(path, "offset", str(10**9)), "bytes that .* does not have"),
    "negative": (lambda path: edit(path, "offset", "-4096"), "bytes that .* does not have"),
    "no number": (lambda path: edit(path, "offset", "four"), "bytes that .* does not have"),
    "too few": (lambda path: edit(path, "length", "1"), "not as many as .* takes"),
    "other keys": (lambda path: record(path, size=3), f"metadata {DATA_KEY} can't be read"),
    "other types": (lambda path: record(path, bytes="3"), "other types than were written"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_pair_that_was_spoilt_is_refused(how: str, pair: Path, layers: GraphModule) -> None:
    spoil, message = SPOILT[how]
    spoil(pair)
    for read in (Runtime, open_file, lambda path: check(path, layers, layers_example())):
        with pytest.raises(InputError, match=message) as raised:
            read(pair)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("location", ["/etc/hostname", "../../hostname"])
def test_a_foreign_model_can_not_read_elsewhere_either(location: str, pair: Path) -> None:
    edit(pair, "location", location)
    model = onnx.load(str(pair), load_external_data=False)
    del model.metadata_props[:]
    pair.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="can't load"):
        Runtime(pair)
    with pytest.raises(InputError, match="no file beside it"):
        open_file(pair)


def test_a_damaged_model_is_refused_as_any_other(pair: Path) -> None:
    content = pair.read_bytes()
    for kept in (0, 1, len(content) // 2, len(content) - 3):
        pair.write_bytes(content[:kept])
        with pytest.raises(InputError):
            Runtime(pair)
        with pytest.raises(InputError):
            open_file(pair)


# --- writing over a pair ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced() -> tuple[GraphModule, Any]:
    """Another student of the same architecture, and what the exporter makes of it."""
    model = Layers()
    with torch.no_grad():
        model.first.weight[0] *= -1
    student = packed(model, layers_example(), "base3")
    return student, writer.onnx_model(student, layers_example(), 25)


@pytest.fixture
def other(traced: tuple[GraphModule, Any], monkeypatch: pytest.MonkeyPatch) -> GraphModule:
    """A student whose export is quick: the trace was made, and nothing is run."""
    student, model = traced
    monkeypatch.setattr(writer, "onnx_model", lambda *arguments: model.clone())
    monkeypatch.setattr(compare, "all_of", lambda *arguments: ParityReport((), ""))
    return student


def write_over(path: Path, student: GraphModule, **options: Any) -> None:
    to_onnx(student, path, layers_example(), size_threshold=0, **{"external_data": True, **options})


def test_the_data_of_the_replaced_model_is_removed(pair: Path, other: GraphModule) -> None:
    old = data_of(pair)
    kept = pair.with_name(f"{pair.name}.0000000000000000.data")  # of nobody that we know
    kept.touch()
    write_over(pair, other)
    assert names_in(pair.parent) == sorted([pair.name, data_of(pair).name, kept.name])
    assert not old.exists()


def test_one_file_replaces_two(pair: Path, other: GraphModule) -> None:
    write_over(pair, other, external_data=False)
    assert names_in(pair.parent) == [pair.name]


def test_a_pair_that_disagrees_is_not_kept(
    pair: Path, other: GraphModule, layers: GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names_in(pair.parent)

    def differs(*arguments: object) -> None:
        raise ParityError("differs")

    monkeypatch.setattr(compare, "all_of", differs)
    with pytest.raises(ParityError):
        write_over(pair, other)
    assert names_in(pair.parent) == before
    monkeypatch.undo()
    check(pair, layers, layers_example())


WRITES = ("os.rename", "os.remove", "os.chmod", "os.mkdir")
DONE, DONE_ALL_THE_SAME, REFUSED = 0, 4, 3


def stopped_at(step: int, path: Path, student: GraphModule, stop: Callable[[], None]) -> int:
    """Write in a process of its own, and stop at its ``step``-th change of the folder; return how it ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    torch.set_num_threads(1)  # the threads of OpenMP stayed in the parent
    left = step

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        opens_to_write = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in WRITES or opens_to_write) and str(path.parent) in str(arguments):
            left -= 1
            if left == 0:
                stop()

    sys.addaudithook(watch)
    code = 1
    try:
        write_over(path, student)
        code = DONE if left > 0 else DONE_ALL_THE_SAME
    except TiFxError:
        code = REFUSED
    finally:
        os._exit(code)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_space() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("stop", "ends"), [(killed, {-signal.SIGKILL}), (out_of_space, {REFUSED, DONE_ALL_THE_SAME})]
)
def test_a_write_that_stops_anywhere_leaves_a_pair(
    stop: Callable[[], None], ends: set[int], written: Path, other: GraphModule, tmp_path: Path
) -> None:
    seen, ended, step = set(), -1, 0
    while ended != DONE:
        step += 1
        folder = Path(shutil.copytree(written.parent, tmp_path / str(step)))
        path = folder / written.name
        ended = stopped_at(step, path, other, stop)
        assert ended in {DONE, *ends}, step
        open_file(path)
        old, new = data_of(written).name, data_of(path).name
        seen.add((ended, new != old))
        if ended == DONE or (stop is out_of_space and not (ended == REFUSED and new != old)):
            assert names_in(folder) == [path.name, new], step
        elif stop is killed:
            assert stopped_at(sys.maxsize, path, other, stop) == DONE  # clears up
            assert not [name for name in names_in(folder) if name.endswith(".tmp")]
        else:  # it says that it could not remove the old data
            assert set(names_in(folder)) == {path.name, new, old}, step
        shutil.rmtree(folder)
    assert step > 10
    assert seen >= {(DONE, True), (min(ends), False)}


# --- without running it ----------------------------------------------------------------------------------------------


def test_what_takes_too_much_memory_is_not_run_and_the_report_says_so(
    pair: Path, layers: GraphModule, traced: tuple[GraphModule, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = check(pair, layers, layers_example(), ram_megabytes=0.001)
    assert (report.differences, report.nodes) == ((), None)
    assert report.tensors == check(pair, layers, layers_example(), ram_megabytes=1).tensors
    assert "not compared at any size: the weights take about 0 MB in ONNX Runtime, and" in str(report)
    student, model = traced
    monkeypatch.setattr(writer, "onnx_model", lambda *arguments: model.clone())
    assert to_onnx(student, pair, layers_example(), ram_megabytes=0.001).parity.skipped
    with pytest.raises(ParityError, match="is not the graph's"):
        check(pair, layers, layers_example(), ram_megabytes=0.001)


@pytest.mark.parametrize(
    ("encoding", "bytes_each"), [("int8-tensor", 1.25), ("base3", 1.25), ("nbits2", 0.5), ("float", 8.25)]
)
def test_the_estimate_follows_the_encoding(encoding: str, bytes_each: float) -> None:
    student = packed(Layers(), layers_example(), encoding)
    weights = 2 * 16 * 24
    kept = sum(value.numel() for value in Layers().parameters()) - weights
    kept_bytes = kept * (2 + 4 if encoding == "base3" else 4 + 4) + 2 * 8  # and two scales
    assert whole_file.runtime_megabytes(student) == pytest.approx((weights * bytes_each + kept_bytes) / 1e6)
