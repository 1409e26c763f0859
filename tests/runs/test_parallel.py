"""Two processes, replicated (DDP, without `find_unused_parameters`) or sharded (FSDP2), train as one process does."""

import pytest
import torch
from forked import start, wait
from parallel_training import KINDS, NAMES, in_one_of


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_train_as_one(tmp_path):
    """Losses, logits and the adapter's tensors after three steps are those of one process with the whole batch."""
    printed = [tmp_path / f"{rank}.txt" for rank in range(2)]
    started = [start(in_one_of, 2, rank, tmp_path, output=printed[rank]) for rank in range(2)]
    codes = [wait(process, 300) for process in started]
    assert codes == [0, 0], "\n".join(file.read_text() for file in printed)
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
