"""Checkpoints are read as data, whoever has written them."""

import subprocess
import sys

import pytest
import torch

from maiht_lightning.training.checkpoint import read_checkpoint


class Harm:
    def __reduce__(self):
        return print, ("harm",)


def test_nothing_is_run(tmp_path, capsys):
    torch.save({"state_dict": {}, "harm": Harm()}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert "harm" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("mmap", [False, True])
def test_states_of_the_eight_bit_optimizer_are_data_in_any_process(tmp_path, mmap):
    optim = pytest.importorskip("torchao.optim")
    weight = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = optim.AdamW8bit([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.save({"optimizer_states": [optimizer.state_dict()]}, tmp_path / "x.ckpt")
    program = f"""
import sys
from maiht_lightning.training.checkpoint import read_checkpoint
assert "torchao" not in sys.modules
print(list(read_checkpoint(sys.argv[1], mmap={mmap})))
"""
    command = [sys.executable, "-c", program, tmp_path / "x.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "['optimizer_states']\n", done.stderr
