"""The spaces whose members are trained themselves: what they propose, and a search of each in seconds."""

import csv
import itertools
import json

import pytest
import timm
import torch
from small_protocols import write_config

import visionpeft as vp
from visionpeft import search
from visionpeft.errors import ConfigurationError
from visionpeft.searching.autopeft import AutoPeftSpace
from visionpeft.searching.s4 import PATTERNS, PRESET, S4Space, groups_of
from visionpeft.searching.space import Host

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 192


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=6, num_classes=5).eval()


def played(rounds, score):
    """Rounds of members, as they come when each is given its score."""
    found, members = [], next(rounds)
    while members:
        found.append(members)
        try:
            members = rounds.send([score(member) for member in members])
        except StopIteration:
            break
    return found


# S4


@pytest.mark.parametrize(
    ("pattern", "sizes"), [("spindle", [2, 4, 4, 2]), ("uniform", [3] * 4), ("bottleneck", [4, 2, 2, 4])]
)
def test_groups_have_the_pattern(pattern, sizes):
    assert [len(group) for group in groups_of(pattern, 12)] == sizes
    for name in PATTERNS:
        for depth in (4, 5, 12, 24):
            groups = groups_of(name, depth)
            assert [*itertools.chain(*groups)] == list(range(depth))
            assert all(groups)
    with pytest.raises(ConfigurationError, match="has 3 blocks, so that no member fits it"):
        groups_of("spindle", 3)


def of_a_block(sizes):
    """Values that a mix trains in a block: adapter (2 D + 1) h + D, LoRA 4 r D, prefix 2 p D, biases 11 D."""
    adapter = (2 * WIDTH + 1) * sizes["A"] + WIDTH if "A" in sizes else 0
    return adapter + 4 * WIDTH * sizes.get("L", 0) + 2 * WIDTH * sizes.get("P", 0) + 11 * WIDTH * ("B" in sizes)


def test_blocks_of_the_preset_train_equally_many_values(model):
    host = Host(S4Space(), model)
    member = host.space.member(host, 8000)
    assert [sorted(sizes) for sizes in member["sizes"]] == [sorted(mix) for mix in PRESET]
    for sizes in member["sizes"]:
        assert abs(of_a_block(sizes) - 8000) <= 4 * WIDTH / 2 + 2 * WIDTH / 2 + WIDTH  # half a step of each size
        assert (
            abs(of_a_block(sizes | {"B": 1}) - of_a_block({k: s for k, s in sizes.items() if k != "B"})) == 11 * WIDTH
        )
    whole = sum(of_a_block(s) * len(g) for s, g in zip(member["sizes"], member["groups"], strict=True))
    assert host.count(member) == whole


def test_members_of_s4_are_different_and_respect_the_limit(model):
    (members,) = played(
        S4Space(values=(3000, 6000)).rounds(Host(S4Space(values=(3000, 6000)), model, 30_000), 8, 0), id
    )
    assert len({json.dumps(member) for member in members}) == 8
    host = Host(S4Space(), model)
    assert max(host.count(member) for member in members) <= 30_000
    assert members[0]["pattern"] == "spindle"
    assert len({member["pattern"] for member in members}) > 1


def test_biases_of_some_blocks(model):
    vp.attach(model, vp.BitFit(blocks=[1, 4]))
    try:
        assert vp.summary(model).adapter == 2 * 11 * WIDTH
        names = [name for name, _ in model.peft["default"].named_parameters() if not name.startswith("head")]
        assert {name.split(".")[2] for name in names} == {"1", "4"}
    finally:
        vp.detach(model)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: S4Space(values=()), "values must be positive integers"),
        (lambda: S4Space(values=(0,)), "values must be positive integers"),
        (lambda: AutoPeftSpace(largest_prefix=0), "largest_prefix must be a positive integer or None"),
    ],
)
def test_what_is_no_space_is_refused(make, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        make()


# AutoPEFT


def test_sizes_of_autopeft_are_halved_widths():
    assert AutoPeftSpace().sizes(768) == [0, 1, 3, 6, 12, 24, 48, 96, 192, 384, 768]
    assert AutoPeftSpace().sizes(768, 192)[-1] == 192


def test_what_autopeft_proposes_follows_from_the_scores(model):
    space = AutoPeftSpace()
    host = Host(space, model, 200_000)

    def score(member):
        return 0.1 * sum(member["blocks"])

    found = played(space.rounds(host, 10, 3), score)
    assert [len(each) for each in found] == [4, 4, 2]
    members = [*itertools.chain(*found)]
    assert len({json.dumps(member) for member in members}) == 10
    for member in members:
        number = sum(member["blocks"])
        adapters = sum((2 * WIDTH + 1) * member[kind] + WIDTH * (member[kind] > 0) for kind in ("serial", "parallel"))
        assert host.count(member) == number * (adapters + 2 * WIDTH * member["prefix"]) <= 200_000
    (least,) = itertools.chain(*played(space.rounds(Host(space, model, 2 * WIDTH), 1, 0), score))
    assert (least["prefix"], sum(least["blocks"])) == (1, 1)  # all that a limit this low allows
    again = played(space.rounds(host, 10, 3), score)
    assert again == found
    assert played(space.rounds(host, 10, 3), lambda member: -score(member))[1:] != found[1:]


def test_a_search_trains_its_members(tmp_path):
    config = write_config(tmp_path)
    command = [
        *("--space", "autopeft", "--space_options", "{largest_prefix: 4}", "--base", config, "--tasks", "dsprites_ori"),
        *("--budget", "1", "--seeds", "1", "--search_epochs", "1", "--output", str(tmp_path / "out")),
    ]
    assert search.main(command) == 0
    scores = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("trials/*/*/score.json")]
    assert [score["steps"] for score in scores] == [3]
    (row,) = csv.DictReader((tmp_path / "out/results.csv").open())
    assert (row["method"], row["search_steps"], row["steps"]) == ("autopeft, found", "3", "9")
    assert float(row["val_top1"]) == max(score["val_top1"] for score in scores)
    assert not list((tmp_path / "out").glob("trials/*/*/*/config.yaml"))  # a trial leaves its score alone
