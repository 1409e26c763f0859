"""Two processes, replicated (DDP, without `find_unused_parameters`) or sharded (FSDP2), train as one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_training import KINDS, NAMES

SCRIPT = Path(__file__).parents[1] / "parallel_training.py"


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Losses, logits and the adapter's tensors after three steps are those of one process with the whole batch."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), str(rank), "2", str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    wrong = []
    for saved in ranks:
        for name in NAMES:
            expected = saved["results"][name, "alone"]
            for kind in KINDS:
                found = saved["results"][name, kind]
                assert found["frozen"], f"{name}, {kind}: the backbone was changed"
                assert found.keys() == expected.keys()
                wrong += [
                    f"{name}, {kind}: {key} is off by {(found[key] - expected[key]).abs().max():.1e}"
                    for key in found.keys() - {"frozen"}
                    if not torch.allclose(found[key], expected[key], rtol=1e-9, atol=1e-10)
                ]
            losses = expected["losses"]
            assert losses.isfinite().all()
            assert losses[0] != losses[-1]
    assert not wrong, "\n".join(sorted(wrong))
    for saved in ranks:
        assert len(saved["refusals"]) == 4
        assert all("is sharded" in sentence for sentence in saved["refusals"])
    check_child_tuning([saved["child"] for saved in ranks])


def check_child_tuning(ranks):
    """All processes draw one mask, that of one process: otherwise their copies of the parameters part."""
    for name, tensor in ranks[0]["ddp"].items():
        assert torch.equal(tensor, ranks[1]["ddp"][name]), name
        assert torch.allclose(tensor, ranks[0]["alone"][name], rtol=1e-9, atol=1e-10), name
    assert any(not torch.equal(tensor, ranks[1]["apart"][name]) for name, tensor in ranks[0]["apart"].items())
    for saved in ranks:
        assert saved["fsdp"].keys() == saved["ddp"].keys()
        assert 0.4 < saved["ddp"]["share"] < 0.6
        assert 0.4 < saved["fsdp"]["share"] < 0.6
    for name, tensor in ranks[0]["fsdp"].items():
        assert name == "share" or torch.equal(tensor, ranks[1]["fsdp"][name])
