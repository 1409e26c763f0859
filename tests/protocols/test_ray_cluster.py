"""`--workers ray` on a cluster of two nodes, Ray's own for tests: one node is lost in the middle of a protocol."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest
from small_protocols import Piece, measured, read_rows, write_config

from visionpeft import protocol
from visionpeft.errors import ConfigurationError
from visionpeft.protocols import work

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'visionpeft[ray]')")
cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
# A node that does not answer counts as lost after a second, and not after half a minute.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each; their processes find what the tests import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        made = cluster_utils.Cluster(initialize_head=True, head_node_args=NODE | {"_system_config": HEALTH})
        second = made.add_node(**NODE)
        patch.setenv("RAY_ADDRESS", made.address)
        ray.init(address=made.address, log_to_driver=False)  # once, as each time the nodes start new processes
        yield made, second
        ray.shutdown()
        made.shutdown()


def test_pieces_are_shared(cluster, tmp_path, monkeypatch, capsys):
    """Each is done in a process of the cluster, in the folder from which the paths of the user start."""
    monkeypatch.chdir(tmp_path)
    pieces = [Piece("a"), Piece("wrong", "it is wrong"), Piece("b")]
    with pytest.raises(ConfigurationError, match="it is wrong"):
        work.finish(pieces, Path("output"), workers="ray")
    assert [piece.name for piece in pieces if not piece.done(Path("output") / piece.name)] == ["wrong"]
    assert (tmp_path / "output" / "workers" / "wrong.log").is_file()
    for name in ("a", "b"):
        process, folder = (tmp_path / "output" / name / "done").read_text().split()
        assert process != str(os.getpid())
        assert Path(folder) == tmp_path
    assert "0 of 3 finished" in capsys.readouterr().out


def test_a_module_that_a_node_lacks_is_told(cluster, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "of_this_machine_alone", sys.modules[Piece.__module__])
    monkeypatch.setattr(Piece, "__module__", "of_this_machine_alone")
    with pytest.raises(ConfigurationError, match=r"could not do a part of the work .*of_this_machine_alone"):
        work.finish([Piece("a")], tmp_path, workers="ray")


def test_a_node_is_lost_in_the_middle(cluster, tmp_path):
    """The other one does its work, too: every cell once, and the table is that of one process."""
    made, second = cluster
    config = write_config(tmp_path / "configs", depth=2)
    given = ["vtab1k", "--configs", config, "--tasks", "dsprites_ori", "--seeds", "1", "2", "3", "--search", "none"]
    given += ["--trainer.max_epochs", "15", "--output"]

    def lose():
        """As soon as two cells are being trained, of which one is on the second node."""
        while True:
            trained = [run.parent for run in (tmp_path / "out").glob("final/*/*/metrics.csv")]
            if sum(not (run / "results.json").exists() for run in trained) == 2:
                break
            time.sleep(0.02)
        made.remove_node(second, allow_graceful=False)

    watching = threading.Thread(target=lose, daemon=True)
    watching.start()
    assert protocol.main([*given, str(tmp_path / "out"), "--workers", "ray"]) == 0
    watching.join(timeout=1)
    assert not watching.is_alive()
    cells = sorted((tmp_path / "out").glob("final/*/*/results.json"))
    assert len(cells) == len({path.parents[1].name for path in cells}) == 3
    # The work of the lost node was begun a second time, on the other one, and no other was.
    begun = [log.read_text().count("parameters are trained") for log in (tmp_path / "out").glob("workers/*/*.log")]
    assert sorted(begun) == [1, 1, 2]
    assert protocol.main([*given, str(tmp_path / "serial")]) == 0
    assert measured(read_rows(tmp_path / "out")) == measured(read_rows(tmp_path / "serial"))
