"""The safetensors container: against the safetensors library both ways, and every way in which a file is damaged."""

import errno
import json
import os
import struct
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from fluxkiln.checkpoint import CheckpointError, SafetensorsFile
from fluxkiln.safetensors_file import save_file

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def every_dtype():
    values = torch.randn(3, 5, generator=torch.manual_seed(0)) * 9
    tensors = {str(dtype): values.to(dtype) for dtype in DTYPES}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "transposed": values.T}


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_reads_what_the_library_writes(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in every_dtype().items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"title": "é"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"title": "é"}
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert same(file.tensor(name), tensor), name
        assert file.read(name) == bits(tensor).numpy().tobytes()


def test_library_reads_what_is_written(tmp_path):
    tensors = every_dtype()
    save_file(tmp_path / "a.safetensors", tensors.items(), {"title": "é"})
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert set(read) == set(tensors)
    assert all(same(read[name], tensors[name]) for name in tensors)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"title": "é"}


def test_large_file_is_streamed(tmp_path):
    """Over 32 MiB the data is not moved behind the header: padding stands between them."""
    tensors = {f"t{i}": torch.randn(1 << 20, generator=torch.manual_seed(i)) for i in range(9)}
    save_file(tmp_path / "a.safetensors", tensors.items(), {})
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    ours = SafetensorsFile(tmp_path / "a.safetensors")
    assert all(same(read[name], tensors[name]) and same(ours.tensor(name), tensors[name]) for name in tensors)


def test_tensors_at_odd_addresses(tmp_path):
    values = torch.randn(7)
    data = b"x" + values.numpy().tobytes()
    entry = {"dtype": "F32", "shape": [7], "data_offsets": [1, 29]}
    header = {"pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "odd": entry}
    file = SafetensorsFile(raw_file(tmp_path / "a.safetensors", header, data))
    assert torch.equal(file.tensor("odd"), values)


def test_writing_in_place_of_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    save_file(tmp_path / "a.safetensors", [("x", torch.ones(4))], {})
    SafetensorsFile(tmp_path / "a.safetensors").tensor("x").zero_()
    assert SafetensorsFile(tmp_path / "a.safetensors").tensor("x").sum() == 4


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(path, [("x", torch.ones(4))], {})

    def tensors():
        yield "x", torch.zeros(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_file(path, tensors(), {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
    assert SafetensorsFile(path).tensor("x").sum() == 4
    with pytest.raises(ValueError, match="two tensors are named x"):
        save_file(path, [("x", torch.ones(1)), ("x", torch.ones(1))], {})


@pytest.mark.parametrize("place", ["", "none/a.safetensors", "full.safetensors"])
def test_what_cannot_be_written_is_named(tmp_path, monkeypatch, place):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space|No such|Is a directory") as refusal:
        save_file(tmp_path / place, [("x", torch.ones(1))], {})
    assert refusal.value.filename == str(tmp_path / place)
    assert list(tmp_path.iterdir()) == []


def test_digest_sees_every_tensor_and_is_the_same_for_a_copy(tmp_path):
    tensors = {f"t{i}": torch.randn(64, 64, generator=torch.manual_seed(i)) for i in range(4)}
    save_file(tmp_path / "a.safetensors", tensors.items(), {})
    save_file(tmp_path / "b.safetensors", tensors.items(), {})
    digest = SafetensorsFile(tmp_path / "a.safetensors").digest
    assert SafetensorsFile(tmp_path / "b.safetensors").digest == digest
    for name in tensors:
        save_file(tmp_path / "c.safetensors", (tensors | {name: tensors[name] + 1}).items(), {})
        assert SafetensorsFile(tmp_path / "c.safetensors").digest != digest
    save_file(tmp_path / "d.safetensors", tensors.items(), {"title": "other"})
    assert SafetensorsFile(tmp_path / "d.safetensors").digest != digest


def test_sha256_is_that_of_the_file(tmp_path):
    save_file(tmp_path / "a.safetensors", [("x", torch.ones(4))], {})
    expected = subprocess.check_output(["sha256sum", tmp_path / "a.safetensors"], text=True).split()[0]
    assert SafetensorsFile(tmp_path / "a.safetensors").sha256() == expected


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGE = {
    "empty": (b"", "it is empty"),
    "text": (b"hello, this is a note about a model", "begins with b'hello, t'"),
    "web page": (b"<!DOCTYPE html><html>Access denied</html>", "it is a web page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "it is a Git LFS pointer"),
    "short header": (struct.pack("<Q", 500) + b'{"x"', "truncated: its header alone takes 508 bytes, the file has 12"),
    "huge header": (struct.pack("<Q", 1 << 60) + b"{}", "is not a safetensors file"),
}
BAD_HEADERS = {
    "not json": (b'{"x": ', b"", "header is not valid"),
    "not text": (b"\xff\xfe{}", b"", "header is not valid"),
    "a list": (b"[1, 2]", b"", "header is not valid"),
    "too deep": (b"[" * 50_000 + b"]" * 50_000, b"", "header is not valid"),
    "twice": (b'{"x": {}, "x": {}}', b"", "a name stands twice"),
    "no dtype": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, b"12345678", "header is not valid"),
    "strange dtype": ({"x": X | {"dtype": "F12"}}, b"12345678", "x has the unknown dtype F12"),
    "negative": ({"x": X | {"shape": [-2]}}, b"12345678", "not a whole number"),
    "fraction": ({"x": X | {"shape": [2.0]}}, b"12345678", "not a whole number"),
    "size": ({"x": X | {"shape": [3]}}, b"12345678", r"x is F32 \[3\] but takes 8 bytes"),
    "hole": ({"x": X, "y": X | {"data_offsets": [12, 20]}}, b"1" * 20, "x and y leave a hole"),
    "overlap": ({"x": X, "y": X | {"data_offsets": [4, 12]}}, b"1" * 12, "x and y overlap"),
    "same place": ({"x": X, "y": X}, b"1" * 8, "x and y overlap"),
    "first hole": ({"x": X | {"data_offsets": [8, 16]}}, b"1" * 16, "the header and x leave a hole"),
    "beyond the end": ({"x": X}, b"1234", r"truncated: its header promises \d+ bytes, the file has \d+"),
    "left over": ({"x": X}, b"1" * 11, "3 bytes follow its last tensor"),
    "metadata": ({"__metadata__": {"a": 1}, "x": X}, b"1" * 8, "metadata holds something other than text"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_no_safetensors_file(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(tmp_path / "a.safetensors")
    with pytest.raises(safetensors.SafetensorError):  # the library agrees that it is none
        safetensors.torch.load_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("header", "data", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_corrupt_file(tmp_path, header, data, message):
    path = raw_file(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="not there"):
        SafetensorsFile(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="a folder"):
        SafetensorsFile(tmp_path)


def test_header_is_read_without_pytorch(tmp_path):
    save_file(tmp_path / "a.safetensors", [("x", torch.ones(4))], {})
    script = (
        "import sys; from fluxkiln.safetensors_file import SafetensorsFile; "
        "file = SafetensorsFile(sys.argv[1]); file.digest; file.read('x'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "a.safetensors"], check=True)
