"""CUDA tensors where the installed Triton cannot compile the kernels."""

import importlib.metadata
import warnings

import pytest
import torch

from afd_fast import ops
from afd_fast.ops import _register


@pytest.fixture
def launch(monkeypatch):
    """The CUDA implementation that `operator` registers, with a launcher and a CPU function that name themselves."""
    found = {}
    monkeypatch.setattr(torch.library, "define", lambda *_: None)
    monkeypatch.setattr(torch.library, "impl", lambda name, device, function: found.update({device: function}))
    monkeypatch.setattr(torch.library, "register_fake", lambda *_: None)
    monkeypatch.setattr(_register, "launcher", lambda path: lambda *_: path)
    _register.operator("forward_noise() -> Tensor", cpu=lambda *_: "PyTorch", cuda="noise:forward_noise", fake=None)
    _register.triton_compiles.cache_clear()
    yield found["CUDA"]
    _register.triton_compiles.cache_clear()


@pytest.mark.parametrize("version", ["3.3.0", "3.10.1+git1234", "4.0.0"])
def test_kernels_run(launch, monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch(torch.zeros(2)) == "noise:forward_noise"
    assert launch(torch.zeros(2, dtype=torch.float64)) == "PyTorch"


@pytest.mark.parametrize("version", ["3.2.0", "2.1.0"])
def test_an_old_triton_is_named_once_and_pytorch_serves(launch, monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.warns(RuntimeWarning, match=f"need Triton 3.3 or later, and {version} is installed") as caught:
        assert [launch(torch.zeros(2)), launch(torch.zeros(2))] == ["PyTorch"] * 2
    assert len(caught) == 1
    assert f"CUDA: PyTorch (Triton {version} is too old" in ops.backends()["nft_loss"]


def test_a_missing_triton_is_named_by_its_import(launch, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert launch(torch.zeros(2)) == "noise:forward_noise"
