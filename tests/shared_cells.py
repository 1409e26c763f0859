"""One adapted model for all tests of a cell of the matrix that only read it, and the proof that they only did.

A test that asks for the fixture `cell` is given a model with a method attached and all tensors moved off their initial
values. Tests of one cell run one after another (`pytest_collection_modifyitems` in conftest sorts them so) and share
it. They may switch the adapter off and on, and leave gradients, which are dropped behind each test; whatever else they
change they put back. Behind the last test of a cell its classes, attributes, hooks, flags and bytes, and those of the
plain backbone the references read, are compared with what they were; behind a failed test the model is dropped.
"""

import functools
from dataclasses import dataclass, field

import pytest
import torch
from observing import anatomy, output_of, same_bytes


@dataclass(frozen=True)
class Key:
    """Names a cell: a host, a case, the precision of both. Hosts and cases are told apart by their names."""

    host: object = field(compare=False)
    case: object = field(compare=False)
    dtype: torch.dtype
    name: str = ""

    def __post_init__(self):
        object.__setattr__(self, "name", f"{self.host!r}-{self.case!r}")

    def __repr__(self):
        return self.name


@dataclass
class Cell:
    """A model with a method attached that several tests read.

    Attributes:
        host: the host.
        case: the case.
        dtype: precision of both.
        model: the host with the case attached, `adapted`, in eval mode.
        used_by: tests that were given it.
    """

    host: object
    case: object
    dtype: torch.dtype
    model: torch.nn.Module
    used_by: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.before = state_of(self.model)

    @functools.cached_property
    def output(self):
        """What the model gives for `host.inputs()`, without gradients."""
        return output_of(self.host, self.model, dtype=self.dtype)

    def require_unchanged(self):
        """Fail if a test changed the model or the plain backbone of its host."""
        users = ", ".join(self.used_by)
        assert same_state(state_of(self.model), self.before), f"the shared model was changed by one of {users}"
        assert same_state(state_of(plain(self.host, self.dtype)), plain_state(self.host, self.dtype)), (
            f"the shared backbone was changed by one of {users}"
        )


def state_of(model):
    """Everything of a model that no reader may change: what `anatomy` says, and its bytes."""
    return anatomy(model), {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(left, right):
    """Whether two such states are equal."""
    return left[0] == right[0] and same_bytes(left[1], right[1])


def plain(host, dtype=torch.float32):
    """The backbone of a host, frozen, for those who only read it; the same object at every call."""
    return _plain(host, dtype)


@functools.cache
def _plain(host, dtype):  # without a default, which would be another key than the same precision given
    return host.build(dtype).requires_grad_(False)


@functools.cache
def plain_state(host, dtype):
    """What it was at its making."""
    return state_of(host.build(dtype).requires_grad_(False))


@functools.cache
def plain_output(host, dtype=torch.float32):
    """What the backbone gives for `host.inputs()`, frozen, as under an adapter that is switched off."""
    return output_of(host, plain(host, dtype), dtype=dtype)


@functools.cache
def untouched_output(host, dtype=torch.float32):
    """Likewise of a backbone as its user has it: `nn.MultiheadAttention` rounds differently when it can be trained."""
    return output_of(host, host.build(dtype), dtype=dtype)


_current: list[tuple[Key, Cell]] = []


def cell_of(key, adapted):
    """The cell of a key, made with `adapted(host, case, dtype)` if it is not that of the test before."""
    if not _current or _current[0][0] != key:
        _current.clear()
        _current.append((key, Cell(key.host, key.case, key.dtype, adapted(key.host, key.case, key.dtype))))
    return _current[0][1]


def leave(item, next_item, failed):
    """Behind a test: drop gradients, and the cell if the test failed or no other follows, then after a comparison."""
    key = key_of(item)
    if key is None or not _current or _current[0][0] != key:
        return
    cell = _current[0][1]
    cell.used_by.append(item.name)
    cell.model.zero_grad()
    if failed:
        _current.clear()
    elif next_item is None or key_of(next_item) != key:
        _current.clear()
        cell.require_unchanged()


def key_of(item):
    """The cell a test reads, or None."""
    callspec = getattr(item, "callspec", None)
    found = callspec.params.get("cell") if callspec is not None else None
    return found if isinstance(found, Key) else None


def in_cells(items):
    """Tests in their order, but those that read one cell, of all modules, behind the first of them."""
    first = {}
    places = []
    for place, item in enumerate(items):
        key = key_of(item)
        places.append(place if key is None else first.setdefault(key, place))
    return [item for _, item in sorted(zip(places, items, strict=True), key=lambda entry: entry[0])]


def shared(pairs, dtype=torch.float32):
    """Parametrise a test over the shared models of (host, case) pairs, given as `cell`."""
    keys = [Key(host, case, dtype) for host, case in pairs]
    return pytest.mark.parametrize("cell", keys, ids=repr, indirect=True)
