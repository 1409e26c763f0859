"""The models that tests share: whoever changes one is found, and its readers run one after another."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CASES, adapted
from reference.hosts import HOSTS
from shared_cells import Cell, Key, in_cells, plain

import visionpeft as vp

HOST, CASE = HOSTS[0], next(case for case in CASES if case.name == "lora")


@pytest.fixture
def own():
    """A cell that no other test has."""
    return Cell(HOST, CASE, torch.float32, adapted(HOST, CASE))


def write_the_backbone(cell):
    with torch.no_grad():
        cell.model.blocks[0].attn.qkv.weight[0, 0] += 1e-6


def write_the_adapter(cell):
    with torch.no_grad():
        next(cell.model.peft.parameters())[0] *= 2


def leave_a_hook(cell):
    cell.model.blocks[0].register_forward_hook(lambda *_: None)


def freeze(cell):
    cell.model.requires_grad_(False)


def train(cell):
    cell.model.train()


def switch_off(cell):
    vp.disable(cell.model)


CHANGES = [write_the_backbone, write_the_adapter, leave_a_hook, freeze, train, switch_off]


def test_reading_is_no_change(own):
    assert own.output.isfinite().all()
    with vp.use(own.model, None):
        own.model(HOST.inputs())
    own.require_unchanged()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_kind_of_change_is_found(own, change):
    own.used_by.append("test_that_wrote")
    change(own)
    with pytest.raises(AssertionError, match="test_that_wrote"):
        own.require_unchanged()


def test_a_change_of_the_shared_backbone_is_found(own):
    weight = plain(HOST).head.weight
    with torch.no_grad():
        weight[0, 0] += 1
        with pytest.raises(AssertionError, match="shared backbone"):
            own.require_unchanged()
        weight[0, 0] -= 1
        weight.copy_(HOST.build().head.weight)
    own.require_unchanged()


def test_readers_of_one_cell_run_one_after_another():
    """Others keep their places, and a cell of another precision is another cell."""

    def item(name, host=None, dtype=torch.float32):
        key = Key(host, CASE, dtype) if host is not None else None
        return SimpleNamespace(name=name, callspec=SimpleNamespace(params={"cell": key} if key else {}))

    one, other = HOSTS[:2]
    items = [
        item("a", one),
        item("b", other),
        item("c"),
        item("d", one),
        item("e", one, torch.float64),
        item("f", other),
    ]
    assert "".join(found.name for found in in_cells(items)) == "adbfce"


def test_copies_of_hosts_share_nothing():
    left, right = HOST.build(), HOST.build()
    with torch.no_grad():
        for parameter in left.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in right.parameters())
    assert {id(module) for module in left.modules()}.isdisjoint(map(id, right.modules()))
