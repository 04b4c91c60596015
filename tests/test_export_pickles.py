"""Weights in torch's format: the same values as from safetensors, or one clear line."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.pickles import read_pickle
from edgevlm.export.checkpoint.source import read_checkpoint
from edgevlm.export.checkpoint.tensors import SourceTensor
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.vocabulary import remove_tokenizer, write_json

INDEX = "pytorch_model.bin.index.json"


def saved(path: Path, state: Any, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


def values(tensors: list[SourceTensor]) -> dict[str, Any]:
    return {t.name: t.float32() for t in tensors}


def weights(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.randn(2, 1, 7)}


def to_pickles(folder: Path) -> Path:
    """Rewrites a checkpoint's safetensors files as torch writes them."""
    from safetensors.torch import load_file

    for path in folder.glob("*.safetensors"):
        name = path.name.replace("model", "pytorch_model").replace("safetensors", "bin")
        saved(folder / name, load_file(path))
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text(encoding="utf-8").replace('"model-', '"pytorch_model-')
        (folder / INDEX).write_text(text.replace(".safetensors", ".bin"), encoding="utf-8")
        index.unlink()
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_checkpoint_reads_as_its_safetensors(tmp_path: Path, shards: int, dtype: str) -> None:
    options = {"version": 2, "shards": shards, "dtype": dtype}
    plain = read_checkpoint(write_paligemma(tmp_path / "plain", **options))
    other = read_checkpoint(to_pickles(write_paligemma(tmp_path / "other", **options)))
    assert [p.suffix for p in other.weights] == [".bin"] * shards
    assert other.tensors.keys() == plain.tensors.keys()
    for name, tensor in plain.tensors.items():
        assert (other.tensors[name].dtype, other.tensors[name].shape) == (
            tensor.dtype,
            tensor.shape,
        )
        np.testing.assert_array_equal(other.tensors[name].raw(), tensor.raw())


def test_safetensors_win(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path)
    saved(folder / "pytorch_model.bin", weights())
    assert [p.name for p in read_checkpoint(folder).weights] == ["model.safetensors"]


def test_a_tower_needs_no_tokenizer(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "clip"})
    saved(tmp_path / "pytorch_model.bin", weights())
    assert read_checkpoint(tmp_path, tokenizer=False).tensors.keys() == {"a", "b", "c"}
    with pytest.raises(SourceError, match=r"has no tokenizer\.model"):
        read_checkpoint(tmp_path)


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    table = torch.randn(4, 6)
    state = weights() | {
        "table": table,
        "tied": table,
        "rows": table[1:3],
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    found = values(read_pickle(saved(tmp_path / "x.pth", state)))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.detach().numpy())
        assert found[name].shape == tuple(tensor.shape)


def test_what_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    state = weights() | {"epoch": 3, "name": "x", "nothing": None, 7: torch.zeros(1)}
    assert values(read_pickle(saved(tmp_path / "x.pth", state))).keys() == weights().keys()


def test_integers_are_named_not_converted(tmp_path: Path) -> None:
    (ids,) = read_pickle(saved(tmp_path / "x.pth", {"ids": torch.arange(4)}))
    assert (ids.dtype, ids.shape) == ("int64", (4,))


def test_a_state_dict_inside_another(tmp_path: Path) -> None:
    state = {"model": weights(1), "optimizer": {"model": weights(2)}, "epoch": 1}
    path = saved(tmp_path / "x.pth", state)
    found = values(read_pickle(path, "model"))
    np.testing.assert_array_equal(found["a"], weights(1)["a"].numpy())
    with pytest.raises(SourceError, match=r"x\.pth: holds no tensors but model, optimizer, epoch"):
        read_pickle(path)
    with pytest.raises(SourceError, match=r"its entry 'weights' is not a state dict"):
        read_pickle(path, "weights")


def test_weights_saved_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = saved(tmp_path / "x.pth", weights())
    monkeypatch.undo()
    np.testing.assert_array_equal(values(read_pickle(path))["c"], weights()["c"].numpy())


def test_files_of_older_torch_lack_the_offsets(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path / "x.pth", weights()), drop=(".format_version", "byteorder"))
    np.testing.assert_array_equal(values(read_pickle(path))["b"], weights()["b"].numpy())


def test_reading_the_list_of_tensors_reads_none_of_them(tmp_path: Path) -> None:
    read_pickle(saved(tmp_path / "warm.pth", weights()))  # torch loads modules at its first file
    path = saved(tmp_path / "x.pth", {"big": torch.zeros(64 << 20, dtype=torch.uint8)})
    before = psutil.Process().memory_info().rss
    (big,) = read_pickle(path)
    assert big.elements == 64 << 20
    assert psutil.Process().memory_info().rss - before < 16 << 20


def rewritten(
    path: Path,
    drop: tuple[str, ...] = (),
    put: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """The same archive as another tool would write it."""
    with zipfile.ZipFile(path) as archive:
        entries = {n: archive.read(n) for n in archive.namelist() if not n.endswith(drop)}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            ending = name.split("/", 1)[1]
            archive.writestr(name, (put or {}).get(ending, data))
    return path


class Payload:
    """Creates a file when it is unpickled by anything that obeys."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return open, (str(self.target), "w")


def hostile_pickle(path: Path) -> None:
    saved(path, weights() | {"evil": Payload(path.with_name("executed"))})


def hostile_without_archive(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(path.with_name("executed")), protocol=2))


def hostile_legacy(path: Path) -> None:
    state = {"evil": Payload(path.with_name("executed"))}
    saved(path, state, _use_new_zipfile_serialization=False)


def whole_module(path: Path) -> None:
    saved(path, torch.nn.Linear(2, 2))


def legacy(path: Path) -> None:
    saved(path, weights(), _use_new_zipfile_serialization=False)


def cut(keep: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(keep(saved(path, weights()).read_bytes()))


def text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")


def compressed(path: Path) -> None:
    rewritten(saved(path, weights()), compression=zipfile.ZIP_DEFLATED)


def big_endian(path: Path) -> None:
    rewritten(saved(path, weights()), put={"byteorder": b"big"})


def shifted(path: Path) -> None:
    # A copy without torch's padding, that still claims to be laid out as torch does.
    rewritten(saved(path, weights()))


def no_pickle(path: Path) -> None:
    rewritten(saved(path, weights()), put={"data.pkl": b"\x80\x02garbage"})


def short_record(path: Path) -> None:
    drop = (".format_version",)
    rewritten(saved(path, weights()), drop=drop, put={"data/1": struct.pack("<2f", 1, 2)})


def state(value: Any) -> Callable[[Path], object]:
    return lambda path: saved(path, value)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (hostile_pickle, "wants to run"),
        (hostile_without_archive, "not a torch.save file"),
        (hostile_legacy, "is in the format of torch before 1.6"),
        (whole_module, "wants to run torch.nn.modules.linear.Linear"),
        (legacy, "is in the format of torch before 1.6"),
        (cut(lambda data: data[:-30]), "is truncated or damaged"),
        (cut(lambda data: data[: len(data) // 2]), "is truncated or damaged"),
        (cut(lambda data: data[:500] + data[700:]), "x.bin: "),
        (cut(lambda data: b""), "not a torch.save file"),
        (text, "not a torch.save file"),
        (compressed, "is a compressed archive"),
        (big_endian, "is not little-endian"),
        (shifted, "b is not where torch expects it"),
        (no_pickle, "torch cannot read it"),
        (short_record, "b is not where torch expects it"),
        (state(torch.zeros(2)), "is not a state dict"),
        (state([torch.zeros(2)]), "is not a state dict"),
        (state({}), "holds no tensors but nothing"),
        (state({"w": torch.zeros(2, 3).t()}), "w is sparse or a view"),
        (state({"w": torch.eye(3).to_sparse()}), "w is sparse or a view"),
        (lambda path: None, "cannot be read (No such file"),
    ],
)
def test_bad_files(tmp_path: Path, write: Callable[[Path], None], says: str) -> None:
    path = tmp_path / "x.bin"
    write(path)
    with pytest.raises(SourceError) as caught:
        read_pickle(path)
    assert str(caught.value).startswith(f"{path}: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_the_payload_would_work(tmp_path: Path) -> None:
    hostile_without_archive(tmp_path / "x.bin")
    pickle.load(io.BytesIO((tmp_path / "x.bin").read_bytes())).close()
    assert (tmp_path / "executed").exists()


def test_nan_is_refused_where_it_is_read(tmp_path: Path) -> None:
    (tensor,) = read_pickle(saved(tmp_path / "x.pth", {"w": torch.tensor([1.0, torch.nan])}))
    with pytest.raises(SourceError, match="w holds NaN"):
        tensor.raw()


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[Path]:
    """A folder with two files of weights and their index."""
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    write_json(tmp_path / "config.json", {"model_type": "clip"})
    saved(tmp_path / names[0], {"a": torch.zeros(2)})
    saved(tmp_path / names[1], {"b": torch.zeros(3)})
    write_json(tmp_path / INDEX, {"weight_map": dict(zip("ab", names, strict=True))})
    yield tmp_path


def test_the_index_is_checked(sharded: Path) -> None:
    def message() -> str:
        with pytest.raises(SourceError) as caught:
            read_checkpoint(sharded, tokenizer=False)
        return str(caught.value)

    second = sharded / "pytorch_model-00002-of-00002.bin"
    saved(second, {"b": torch.zeros(3), "c": torch.zeros(1)})
    assert f"holds c, which {INDEX} does not know" in message()
    saved(second, {"b": torch.zeros(3), "a": torch.zeros(2)})
    assert "a is also in pytorch_model-00001-of-00002.bin" in message()
    saved(second, {"c": torch.zeros(1)})
    assert f"lacks b, which {INDEX} promises" in message()
    second.unlink()
    assert f"{second.name}: is missing, {INDEX} names it" in message()
    index = json.loads((sharded / INDEX).read_text(encoding="utf-8"))
    (sharded / INDEX).unlink()
    assert f"has weights but no {INDEX}" in message()
    write_json(sharded / INDEX, {**index, "weight_map": {"a": "../x.bin"}})
    assert "is missing" in message()


def test_without_torch_the_message_says_what_to_install(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "clip"})
    saved(tmp_path / "pytorch_model.bin", weights())
    code = (
        "import sys, pathlib\n"
        "sys.modules['torch'] = None\n"
        "from edgevlm.errors import EngineMissing\n"
        "from edgevlm.export.checkpoint.source import read_checkpoint\n"
        "try: read_checkpoint(pathlib.Path(sys.argv[1]), tokenizer=False)\n"
        "except EngineMissing as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert 'pip install "edgevlm[export]"' in done.stdout and done.stdout.count("\n") == 1


def test_a_missing_tokenizer_alone_is_forgiven(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path)
    remove_tokenizer(folder)
    assert read_checkpoint(folder, tokenizer=False).tensors
