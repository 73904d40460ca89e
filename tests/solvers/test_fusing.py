"""Passes over memory: run as they stand, by kernels, or by whom a context names."""

import sys
from types import SimpleNamespace

import pytest
import torch

from maiht_lightning.solvers import fusing
from maiht_lightning.solvers.fusing import one_pass, run_by, unfused


@one_pass
def halve(matrix, *, scratch=None):
    """Half of a matrix, by way of a buffer."""
    return torch.mul(matrix, 0.5, out=scratch)


def test_a_pass_writes_to_its_buffers():
    matrix, buffer = torch.ones(3), torch.empty(3)
    assert halve(matrix, scratch=buffer) is buffer  # on a CPU as it stands
    with run_by(unfused):
        assert halve(matrix, scratch=buffer) is buffer


def test_how_passes_are_run_ends_with_its_context():
    calls = []

    def how(function, scratch, *args):
        calls.append(scratch)
        return function(*args, scratch=scratch)

    def fail():
        with run_by(how):
            halve(torch.ones(3), scratch=buffer)
            with run_by(None):
                halve(torch.ones(3))
            raise KeyError

    buffer = torch.empty(3)
    with pytest.raises(KeyError):
        fail()
    halve(torch.ones(3))
    assert len(calls) == 1
    assert calls[0] is buffer


# ---- On a GPU: something that says that it is there, and kernels that are made up

ON_GPU = SimpleNamespace(is_cuda=True, get_device=lambda: -1)


@one_pass
def echo(matrix, other, *, scratch):
    """What a pass was given."""
    return "as it stands", matrix, other, scratch


@pytest.fixture
def kernel(monkeypatch):
    """Sets what does the work of `echo` on a GPU."""
    monkeypatch.setattr(fusing, "failures", [])

    def choose(launch):
        monkeypatch.setattr(fusing, "_kernels", lambda: SimpleNamespace(echo=launch))

    return choose


def test_a_gpus_passes_are_kernels(kernel):
    kernel(lambda matrix, other: ("by a kernel", matrix, other))
    assert echo(ON_GPU, 3, scratch="buffer") == ("by a kernel", ON_GPU, 3)
    on_host = SimpleNamespace(is_cuda=False)
    assert echo(on_host, 3, scratch="buffer") == ("as it stands", on_host, 3, "buffer")
    with run_by(unfused):
        assert echo(ON_GPU, 3, scratch="buffer") == ("as it stands", ON_GPU, 3, "buffer")


def test_kernels_run_where_their_matrices_are(kernel, monkeypatch):
    entered = []

    class Current:
        def __init__(self, matrix):
            self.device = matrix.get_device()

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", Current)
    kernel(lambda *_: entered.append("launched"))
    echo(SimpleNamespace(is_cuda=True, get_device=lambda: 3), 3, scratch="buffer")
    assert entered == [3, "launched", "left"]


def test_a_kernel_may_decline(kernel):
    kernel(lambda matrix, other: NotImplemented if other == 4 else "by a kernel")
    assert echo(ON_GPU, 4, scratch="buffer") == ("as it stands", ON_GPU, 4, "buffer")
    assert echo(ON_GPU, 3, scratch="buffer") == "by a kernel"
    assert fusing.failures == []


def test_a_compiler_that_fails_is_given_up_with_a_warning(kernel):
    """The pass is run as it stands, with its buffers, then and in future."""
    asked = []

    def broken(*_):
        asked.append(1)
        raise RuntimeError("Failed to find C compiler.\nand so on")

    kernel(broken)
    with pytest.warns(UserWarning, match=r"Triton could not make the solver's kernels \(RuntimeError: Failed .*er\.\)"):
        assert echo(ON_GPU, 3, scratch="buffer") == ("as it stands", ON_GPU, 3, "buffer")
    assert echo(ON_GPU, 3, scratch="buffer") == ("as it stands", ON_GPU, 3, "buffer")
    assert len(asked) == 1


def test_memory_that_ran_out_is_for_those_to_handle_who_can_do_with_less(kernel):
    def full(*_):
        raise torch.OutOfMemoryError("8 GiB")

    kernel(full)
    with pytest.raises(torch.OutOfMemoryError):
        echo(ON_GPU, 3, scratch="buffer")
    assert fusing.failures == []


def test_without_triton_passes_run_as_they_stand(monkeypatch):
    monkeypatch.setattr(fusing.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "maiht_lightning.solvers.kernels", raising=False)
    monkeypatch.setattr(fusing, "failures", [])
    fusing._kernels.cache_clear()
    try:
        assert echo(ON_GPU, 3, scratch="buffer") == ("as it stands", ON_GPU, 3, "buffer")
        assert fusing.failures == []  # nobody need know
    finally:
        fusing._kernels.cache_clear()
