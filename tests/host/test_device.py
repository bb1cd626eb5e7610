"""What is told at a GPU's first call; on a fake GPU."""

import warnings
from types import SimpleNamespace

import cutlass
import pytest
import torch

from cute_attn import device


@pytest.fixture
def gpu(monkeypatch):
    """A machine with Hopper GPUs, of which no call has been made."""
    hopper = SimpleNamespace(major=9, minor=0, name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: hopper)
    monkeypatch.setattr(device, "_devices", {})

    def versions(of_torch, of_dsl):
        monkeypatch.setattr(torch.version, "cuda", of_torch)
        monkeypatch.setattr(cutlass, "CUDA_VERSION", SimpleNamespace(major=of_dsl[0], minor=of_dsl[1]))

    return versions


def told(*indices):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [device.get(index).index for index in indices] == list(indices)
    return [str(warning.message) for warning in caught]


def test_libraries_for_an_earlier_cuda_are_told_once(gpu):
    gpu("13.0", (12, 9))
    (text,) = told(0, 0, 1)
    assert "torch is built for CUDA 13.0" in text and "libraries for CUDA 12 only" in text
    assert "CUDA 12.9's ptxas" in text and text.endswith('pip install "cute_attn[cu13]"')


@pytest.mark.parametrize(
    ("of_torch", "of_dsl"),
    [("13.0", (13, 4)), ("12.9", (12, 9)), ("12.6", (12, 9)), ("12.9", (13, 4)), (None, (12, 9))],
)
def test_other_versions_are_no_matter(gpu, of_torch, of_dsl):
    gpu(of_torch, of_dsl)
    assert told(0, 1) == []


def test_another_gpu_raises_first(gpu, monkeypatch):
    gpu("13.0", (12, 9))
    ampere = SimpleNamespace(major=8, minor=0, name="NVIDIA A100", multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: ampere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="sm_80"):
            device.get(0)


def test_the_dsl_tells_its_cuda():
    assert (cutlass.CUDA_VERSION.major, cutlass.CUDA_VERSION.minor) >= (12, 9)
