"""What a computation moves between a device and the host, counted on a machine that has no such device.

`FakeTensorMode` of PyTorch runs every operation on shapes, types and devices alone. `Traffic` sees each operation that
is dispatched, and what of its arguments and results is on the device and what on the host. It has no gradients on a
device that the machine lacks, so backward passes are walked on the CPU, where tensors without values still show who
asks for one.
"""

import io
import pickle
import traceback
import warnings
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

aten = torch.ops.aten

# A number that Python asked for, and operations whose result, or its shape, is decided by values: for all of them the
# host waits for the device. Those that give no number are refused by `FakeTensorMode`.
NUMBER = aten._local_scalar_dense
READS = {NUMBER, aten.allclose, aten.equal, aten.masked_select, aten.nonzero, aten._unique2, aten.unique_dim}
# These copy even a single number of the host among their arguments; arithmetic takes it along with its kernel.
COPY_NUMBERS = {aten.index_put, aten.index_put_, aten._index_put_impl_, aten.copy_, aten._to_copy}


class Traffic(TorchDispatchMode):
    """Lists what happens between a device and the host, with the lines of this project that asked for it.

    Args:
        device: type of the device: "cuda", or "cpu" where gradients are computed.
        answer: what a number that is read turns out to be.

    Attributes:
        copies: values of the host that were copied to the device, or made from Python's numbers to be copied.
        reads: values of the device that the host waited for.
        strangers: tensors of the host that were computed with, single numbers left out.
    """

    def __init__(self, device="cuda", answer=1):
        super().__init__()
        self.device, self.answer = device, answer
        self.copies, self.reads, self.strangers = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Look at one operation, then run it."""
        packet, kwargs = func.overloadpacket, kwargs or {}
        if packet is torch.ops.prim.device:
            return func(*args, **kwargs)
        here, away = self._sorted((args, kwargs))
        if here and packet in READS:
            self.reads.append(_said(func))
        if packet is NUMBER:  # of the host: one that it has at hand, such as the step that an optimiser counts
            return bool(self.answer) if args[0].dtype == torch.bool else self.answer
        result = func(*args, **kwargs)
        made_here, made_away = self._sorted(result)
        from_numbers = packet is aten.lift_fresh and any(each.ndim for each in (*here, *away))
        if from_numbers:
            self.copies.append(_said(func))
        elif here and made_away:
            self.reads.append(_said(func))
        elif away and (here or made_here):
            if packet in COPY_NUMBERS or any(each.ndim for each in away):
                self.copies.append(_said(func))
        elif any(each.ndim for each in (*away, *made_away)):
            self.strangers.append(_said(func))
        return result

    def _sorted(self, values):
        """The tensors among values that are on the device, and the others."""
        here, away = [], []
        for each in _tensors(values):
            (here if each.device.type == self.device else away).append(each)
        return here, away

    @property
    def everything(self):
        """All of it, as a list of sentences."""
        kinds = {"is copied to the device": self.copies, "is waited for": self.reads, "is on the host": self.strangers}
        return [f"{each} {kind}" for kind, found in kinds.items() for each in found]


def _tensors(values):
    """The tensors among arguments or results: `tree_leaves` takes longer than many an operation without values."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple | dict):
        for each in values.values() if isinstance(values, dict) else values:
            yield from _tensors(each)


def _said(func):
    """An operation, and where it was asked for."""
    asked = [f for f in traceback.extract_stack() if "/visionpeft/" in f.filename]
    lines = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in asked[:-4:-1]]
    return f"{func} ({', '.join(lines)})"


@contextmanager
def no_values():
    """Within the context tensors have no values, and may say that they are on any device."""
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


@contextmanager
def autocast(device, dtype):
    """`torch.autocast`, which switches itself off where there is no such device."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def there(values, device="cuda"):
    """Tensors of these shapes on a device, within `no_values`, in the place of the tensors among the values."""
    return tree_map_only(torch.Tensor, lambda each: torch.empty_like(each, device=device), values)


def moved(module, device="cuda"):
    """A copy of a module as `module.to(device)` leaves it, within `no_values`: what it has not registered stays."""
    registered = {id(each) for each in (*module.parameters(), *module.buffers())}
    metrics = [each for each in module.modules() if isinstance(each, Metric)]  # these move their states by themselves
    registered |= {id(getattr(metric, state)) for metric in metrics for state in metric._defaults}
    # A vocabulary has no tensors, and most of the objects of a learner: copying it would take longer than a step.
    vocabularies = {id(each.tokenizer) for each in module.modules() if hasattr(each, "tokenizer")}
    kept, made = {}, {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, torch.Tensor) and id(value) not in vocabularies:
                return None
            kept[id(value)] = value
            return id(value)

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, key):
            value = kept[key]
            if key in registered and key not in made:
                empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
                parameter = isinstance(value, torch.nn.Parameter)
                made[key] = torch.nn.Parameter(empty, value.requires_grad) if parameter else empty
            return made.get(key, value)

    file = io.BytesIO()
    Pickler(file).dump(module)
    file.seek(0)
    return Unpickler(file).load()
