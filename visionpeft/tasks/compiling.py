"""A network compiled where it is: the same module with the same keys, whose calls run what `torch.compile` made."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from visionpeft.errors import ConfigurationError, one_line

BACKEND: str | Callable = "inductor"
# Training, validation and test, with batches of another size and of one, and adapters that were loaded since, are
# graphs of their own. Beyond so many PyTorch gives up.
MOST_GRAPHS = 32


def compile_in_place(model: nn.Module) -> None:
    """Let calls of a model run as one graph without breaks, compiled at the first call of each kind.

    What the adapted blocks spare of memory by computing norms and activations again, the compiled graph spares, too.
    The model stays the module that it is, so that its `state_dict` has no further prefix, adapters can be switched, and
    what copies it gets a model that is not compiled.

    Raises:
        ConfigurationError: this Python has no `torch.compile`, or there is no C++ compiler.
    """
    try:
        # Isolated, because the graphs of all models that are compiled so would be counted together.
        model.compile(
            backend=_keeping_little(BACKEND), fullgraph=True, recompile_limit=MOST_GRAPHS, isolate_recompiles=True
        )
    except RuntimeError as error:  # a Python or a system that it does not know
        raise _refused(error) from error
    if BACKEND == "inductor" and not torch.cuda.is_available():
        _require_cpp_compiler()


def _keeping_little(backend: str | Callable) -> Callable:
    """A backend that keeps no cheap result for the backward pass.

    By itself the compiler keeps what a product of matrices will read there, such as the output of a norm, although to
    compute it again costs next to nothing: it cannot be computed within the product's own kernel.
    """

    def compile_graph(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        from torch._dynamo import lookup_backend
        from torch._functorch import config

        compiler = lookup_backend(backend) if isinstance(backend, str) else backend
        with config.patch(ban_recompute_materialized_backward=False):
            return compiler(graph, inputs)

    return compile_graph


def _require_cpp_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise ConfigurationError(
            "compile needs a C++ compiler on a CPU, and none was found (set CXX, or install one); leave compile out"
        ) from error


def check_device(device: torch.device) -> None:
    """Refuse a GPU for which no code can be made.

    Raises:
        ConfigurationError: Triton, which compiles for it, is not there or does not know it.
    """
    if BACKEND != "inductor" or device.type != "cuda":
        return
    from torch.utils._triton import has_triton

    if not has_triton():
        raise ConfigurationError(
            "compile needs Triton on a GPU, and a GPU that it knows (compute capability 7.0 or above); leave compile "
            "out"
        )


@contextmanager
def not_compiled() -> Iterator[None]:
    """Within the context compiled models run as they are, for a few batches that are not worth a graph."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Within the context, what the compiler cannot do is said so that a user can act on it.

    Raises:
        ConfigurationError: in its place.
    """
    # Imported here, because it takes a second that only those who compile should pay.
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        raise _refused(error) from error


def _refused(error: Exception) -> ConfigurationError:
    return ConfigurationError(f"this model cannot be compiled as one graph: {one_line(error)}; leave compile out")
