"""A protocol that is killed at random points, and processes that share an output folder."""

import gc
import json
import os
import random
import shutil
import signal
import time
import weakref
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from forked import start, wait
from small_protocols import measured, read_rows, write_config
from small_runs import arguments as small_arguments
from small_runs import draw_images
from small_runs import run as run_fit

from visionpeft import fit, protocol
from visionpeft.errors import ConfigurationError
from visionpeft.files import claim, write_json
from visionpeft.protocols import work
from visionpeft.protocols.cells import settle
from visionpeft.protocols.method_runs import Trial

pytestmark = pytest.mark.usefixtures("one_thread")


def table(folder, config):
    return ["vtab1k", "--configs", config, "--tasks", "dsprites_ori", "--seeds", "1", "2", "--output", str(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A configuration, the rows of an uninterrupted protocol, and how long it took.

    In this process, of which others are forked: what a first run imports takes as long as the others, and each of
    them would import it anew.
    """
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "configs", depth=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert protocol.main([*table(folder / "first", config), "--search", "none"]) == 0
    started = time.monotonic()
    assert protocol.main(table(folder / "out", config)) == 0
    seconds = time.monotonic() - started
    torch.set_num_threads(threads)
    return config, measured(read_rows(folder / "out")), seconds


def kill_and_resume(folder, whole, kills, seed):
    """Start the protocol again and again, each time for a random while, until it was killed so often; then to its end.

    One that comes to its end in between, as on a machine that has become faster, is looked at, and another begins.
    """
    config, rows, seconds = whole
    generator = random.Random(seed)
    part, killed = folder / "0", 0
    for _ in range(20 * kills):
        # Long enough for an epoch now and then, so that it gets on, and killed anywhere.
        code = wait(start(protocol.main, table(part, config)), generator.uniform(0.05, 0.7 * seconds))
        assert code in (None, 0)
        killed += code is None
        if killed == kills:
            break
        if code == 0:
            check(part, rows)
            part = folder / str(int(part.name) + 1)
    assert killed == kills
    assert wait(start(protocol.main, table(part, config))) == 0
    check(part, rows)


def check(folder, rows):
    """The table is that of an uninterrupted protocol, and nothing was trained twice."""
    assert measured(read_rows(folder)) == rows
    finished = [path.parent.parent.name for path in folder.glob("final/*/*/results.json")]
    assert max(Counter(finished).values()) == 1
    assert not list(folder.glob("search/*/*/*/config.yaml"))


def test_a_protocol_killed_at_random_points_ends_as_if_it_had_not_been(tmp_path, whole):
    kill_and_resume(tmp_path / "out", whole, kills=4, seed=0)


def test_a_kill_between_the_score_and_the_removal_of_its_run(tmp_path):
    trial = Trial("trial", "a trial", ())
    run, mine, copy = (tmp_path / "trial" / name for name in ("squares-LoRA-1", "my-project", "a-copy-of-the-run"))
    for folder, files in ((run, ("config.yaml", "environment.json")), (mine, ("config.yaml",))):
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_text("{}")
    shutil.copytree(run, copy)
    write_json(tmp_path / "trial/score.json", {"val_top1": 0.25, "run": run.name})
    assert trial.done(tmp_path / "trial")
    assert trial.score(tmp_path) == 0.25
    # What else is there is not what the trial made.
    assert {path.name for path in (tmp_path / "trial").iterdir()} == {"score.json", mine.name, copy.name}


def test_a_trial_without_a_validated_epoch_has_no_score(tmp_path):
    images = draw_images(tmp_path / "squares")
    rare = ("--trainer.check_val_every_n_epoch", "2", "--report", "last", "--test", "false")
    short, enough = (
        Trial(str(epochs), f"a trial of {epochs} epochs", (*small_arguments(images, *rare, epochs=epochs),))
        for epochs in (1, 2)
    )
    (tmp_path / short.name).mkdir()
    (tmp_path / enough.name).mkdir()
    with pytest.raises(ConfigurationError, match="no epoch of a trial of 1 epochs was validated"):
        short.do(tmp_path / short.name)
    assert not short.done(tmp_path / short.name)
    enough.do(tmp_path / enough.name)
    assert 0 <= enough.score(tmp_path) <= 1


@pytest.mark.parametrize("name", ["", ".", "..", "../elsewhere", "linked", "my-project"])
def test_a_score_names_nothing_else_to_be_removed(name, tmp_path):
    """Whatever its file says, only a run in the folder of the trial goes."""
    folder, elsewhere = tmp_path / "trial", tmp_path / "elsewhere"
    for each in (folder / "my-project", elsewhere):
        each.mkdir(parents=True)
    for path in (elsewhere / "config.yaml", elsewhere / "environment.json", folder / "my-project" / "config.yaml"):
        path.write_text("{}")
    (folder / "linked").symlink_to(elsewhere)
    write_json(folder / "score.json", {"val_top1": 0.25, "run": name})
    before = sorted(tmp_path.rglob("*"))
    assert Trial("trial", "a trial", ()).score(tmp_path) == 0.25
    assert sorted(tmp_path.rglob("*")) == before


def test_a_protocol_does_not_replace_tables_of_others(tmp_path, capsys):
    (tmp_path / "results.csv").write_text("mine")
    command = ["vtab1k", "--method", "LoRA", "--tasks", "dsprites_loc", "--output", str(tmp_path)]
    assert protocol.main(command) == 2
    assert "which no protocol wrote" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    assert (tmp_path / "results.csv").read_text() == "mine"
    assert protocol.main([*command[:-1], str(tmp_path / "results.csv")]) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.slow
def test_ten_more_kills(tmp_path, whole):
    kill_and_resume(tmp_path / "out", whole, kills=10, seed=1)


def test_two_processes_on_one_folder_lose_nothing_and_share_nothing(tmp_path, whole):
    config, rows, _ = whole
    children = [start(protocol.main, table(tmp_path, config)) for _ in range(2)]
    assert [wait(child) for child in children] == [0, 0]
    assert measured(read_rows(tmp_path)) == rows
    runs = [path.parent for path in tmp_path.glob("final/*/*/config.yaml")]
    assert len(runs) == len({run.parent for run in runs}) == 2  # one run for each cell
    assert len(list(tmp_path.glob("search/*/*/score.json"))) == 2


def test_methods_of_two_processes_are_in_one_table(tmp_path, whole):
    config, rows, _ = whole
    other = write_config(tmp_path / "configs", "probe", "LinearProbe", depth=2)
    children = [start(protocol.main, table(tmp_path / "out", name)) for name in (config, other)]
    assert [wait(child) for child in children] == [0, 0]
    assert wait(start(protocol.main, table(tmp_path / "out", other))) == 0
    found = read_rows(tmp_path / "out")
    assert [row["method"] for row in found] == ["probe", "probe", "small", "small"]
    assert measured(found)[2:] == rows


def test_the_first_settings_of_a_folder_hold(tmp_path, whole):
    config, _, _ = whole
    children = [
        start(protocol.main, [*table(tmp_path, config), "--search", "none", "--model.drop_path", rate])
        for rate in ("0", "0.1")
    ]
    assert sorted(wait(child) for child in children) == [0, 2]
    assert len(json.loads((tmp_path / "protocol.json").read_text())["arguments"]) == 2


# Single runs


def test_a_run_that_is_being_trained_is_not_resumed_by_another(tmp_path, capsys):
    images = draw_images(tmp_path / "squares")
    made = run_fit(tmp_path / "runs", images, epochs=1)
    before = (made / "results.json").read_bytes()
    with claim(made / ".lock") as mine:
        assert mine
        assert fit.main(["--resume", str(made)]) == 2
    error = capsys.readouterr().err
    assert "another process is training in" in error
    assert error.count("\n") == 1
    assert (made / "results.json").read_bytes() == before
    assert fit.main(["--resume", str(made)]) == 0


def test_a_claim_ends_with_its_process(tmp_path):
    def hold():
        with claim(tmp_path / "lock") as mine:
            (tmp_path / "held").write_text(str(mine))
            time.sleep(60)
        return 0

    child = start(hold)
    while not (tmp_path / "held").is_file():
        time.sleep(0.005)
    with claim(tmp_path / "lock") as mine:
        assert not mine
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with claim(tmp_path / "lock") as mine:
        assert mine


def test_runs_started_at_once_have_directories_of_their_own(tmp_path):
    images = draw_images(tmp_path / "squares")
    command = [*small_arguments(images, epochs=1), "--output", str(tmp_path / "runs")]
    children = [start(fit.main, command) for _ in range(4)]
    assert [wait(child) for child in children] == [0] * 4
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 4
    assert all(json.loads((run / "results.json").read_text())["run_directory"] == str(run) for run in runs)
    assert not any((run / "curves.png").exists() for run in runs)


@pytest.mark.parametrize("where", ["on one machine", "in containers with equal process ids"])
def test_json_files_of_many_writers_are_always_whole(tmp_path, where, monkeypatch):
    if where != "on one machine":
        monkeypatch.setattr(os, "getpid", lambda: 7)

    def write(number):
        for count in range(200):
            write_json(tmp_path / "shared.json", {"by": number, "numbers": [count] * 200})
        return 0

    children = [start(write, number) for number in range(3)]
    while not (tmp_path / "shared.json").is_file():
        time.sleep(0.001)
    for _ in range(200):
        assert len(set(json.loads((tmp_path / "shared.json").read_text())["numbers"])) == 1
    assert [wait(child) for child in children] == [0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["shared.json"]


def test_containers_with_equal_process_ids_settle_for_one_thing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)

    def agree(number):
        for _ in range(200):
            settle(tmp_path, "protocol.json", {"numbers": [1] * 200})
        return 0

    assert [wait(child) for child in [start(agree, number) for number in range(3)]] == [0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["protocol.json"]
    with pytest.raises(ConfigurationError, match="numbers"):
        settle(tmp_path, "protocol.json", {"numbers": [2] * 200})


@dataclass
class Cycle:
    """Work that leaves something behind which refers to itself, as a trainer and its task do."""

    name: str
    left: list
    text: str = "a cycle"

    def done(self, folder):
        return (folder / "done").is_file()

    def do(self, folder):
        assert not any(reference() for reference in self.left), "what earlier work left is still in memory"
        cycle = type("Trainer", (), {})()
        cycle.task = cycle
        self.left.append(weakref.ref(cycle))
        (folder / "done").touch()


def test_what_a_cell_leaves_is_gone_before_the_next(tmp_path):
    left = []
    gc.disable()  # so that chance collects nothing
    try:
        work.finish([Cycle("first", left), Cycle("second", left)], tmp_path)
    finally:
        gc.enable()
    assert len(left) == 2
