import struct

import pytest
import torch

from dualnn.data import MNIST, MissingDataError
from dualnn.data.mnist import FILES


def write_idx(path, array):
    """The IDX format: two zero bytes, 8 for unsigned bytes, the number of axes, their lengths (big endian), data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + bytes(array.flatten().tolist()))


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name, count in zip(FILES, (20, 20, 5, 5), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        high = 256 if "images" in name else 10
        write_idx(tmp_path / "MNIST" / "raw" / name, torch.randint(high, shape, generator=generator))
    return tmp_path


def test_reads_idx_files(folder):
    data = MNIST(root=str(folder), batch_size=6)
    data.prepare_data()
    data.setup()
    assert [len(p) for p in (data.split.train, data.split.val, data.split.test)] == [18, 2, 5]
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (6, 1, 28, 28) and x.dtype == torch.float32 and y.dtype == torch.int64
    raw = (folder / "MNIST" / "raw" / FILES[2]).read_bytes()[16:]
    pixels = torch.tensor(list(raw)).view(5, 1, 28, 28)
    torch.testing.assert_close(data.split.test.x, (pixels / 255 - 0.1307) / 0.3081)


def test_flat(folder):
    data = MNIST(root=str(folder), flat=True)
    assert data.input_shape == (784,) and data.split.val.x.shape == (2, 784)


def test_missing_files_are_named_with_what_to_do(folder):
    (folder / "MNIST" / "raw" / FILES[3]).unlink()
    with pytest.raises(MissingDataError, match=f"{FILES[3]} not found in .*download=True") as info:
        MNIST(root=str(folder)).setup()
    assert FILES[0] not in str(info.value)
    assert isinstance(info.value, FileNotFoundError)


def test_download_is_asked_for(tmp_path, monkeypatch):
    import torchvision

    asked = []

    class Reader(torchvision.datasets.MNIST):
        def __init__(self, root, train=True, download=False):
            asked.append(download)
            raise ConnectionError("offline")

    monkeypatch.setattr(torchvision.datasets, "MNIST", Reader)
    MNIST(root=str(tmp_path)).prepare_data()
    assert asked == []
    with pytest.raises(ConnectionError):
        MNIST(root=str(tmp_path), download=True).prepare_data()
    assert asked == [True]
