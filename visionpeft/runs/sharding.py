"""`--trainer.strategy fsdp2`: a backbone that does not fit on one device, in equal parts on all of them.

What does not fit is the backbone, and it is frozen: adapters and heads are a few percent of it. So the blocks alone
are sharded, by PyTorch's `fully_shard`, which gathers the weights of a block while it computes and frees them again.
What is trained stays whole on every device; its gradients are averaged by `DistributedDataParallel`. A checkpoint, an
adapter and the state of the optimiser are therefore those of one device, written by the first process, and training can
go on from them on any number of devices.
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, share_comm_ctx

from visionpeft.adapters.storage import remember_backbone
from visionpeft.backbones.quantised import is_quantised
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError
from visionpeft.sites import HEAD
from visionpeft.tasks import ImageTask
from visionpeft.tasks.adapted_task import AdaptedTask
from visionpeft.tasks.averaging import averaging_callbacks

NAME = "fsdp2"


class ShardedBackbone(DDPStrategy):
    """Lightning's strategy of several devices, which shards the blocks of the backbone before it replicates the rest.

    Outside the blocks, embeddings and norms stay whole, as does what is trained with its gradients and optimiser state.
    """

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard once, before anything is moved to the device; then as for replicas."""
        task = self.lightning_module
        if not hasattr(task, "_ddp_params_and_buffers_to_ignore"):
            self.precision_plugin.convert_module(task)
            if trainer.is_global_zero:  # which saves
                remember_backbone(task.model)
            # What one process alone cannot compare with that of others, DDP is told to leave alone.
            task._ddp_params_and_buffers_to_ignore = shard(task, self.root_device.type, self.world_size)
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        # As for replicas, too, but that they are not sent from the first process to all: they are equal since training.
        self.accelerator.setup(trainer)
        self.model_to_device()
        self.setup_precision_plugin()

    def teardown(self) -> None:
        """As for replicas, but the parts stay on their devices, from which a test goes on."""
        task, self._lightning_module = self._lightning_module, None
        try:
            super().teardown()
        finally:
            self._lightning_module = self.model = task


StrategyRegistry.register(NAME, ShardedBackbone, description="blocks sharded by fully_shard, adapters replicated")


def shard(task: AdaptedTask, device: str, processes: int) -> list[str]:
    """Shard the frozen weights of each block of a task's backbone over all processes; returns their names in the task.

    Args:
        task: its methods are attached, so that its classes stay as they are.
        device: kind of the device, "cuda" or "cpu".
        processes: how many there are.
    """
    mesh = init_device_mesh(device, (processes,))
    blocks = [block.module for tower in describe(task.model).towers.values() for block in tower.blocks]
    frozen = {id(parameter) for block in blocks for parameter in block.parameters() if not parameter.requires_grad}
    names = [name for name, parameter in task.named_parameters() if id(parameter) in frozen]
    for block in blocks:
        trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    share_comm_ctx(blocks)  # one set of streams, and at most the weights of two blocks in them
    return names


def check_sharding(trainer: pl.Trainer, task: ImageTask) -> None:
    """Refuse what cannot be trained with a sharded backbone, if the trainer is to shard it.

    Raises:
        ConfigurationError: so it is.
    """
    if not isinstance(trainer.strategy, ShardedBackbone):
        return
    how = f"--trainer.strategy {NAME}"
    if trainer.world_size == 1:
        raise ConfigurationError(
            f"{how} shares a backbone among devices, and there is one; give more (--trainer.devices 2), or use "
            "--trainer.strategy auto"
        )
    if averaging := averaging_callbacks(trainer.callbacks):
        raise ConfigurationError(
            f"{type(averaging[0]).__name__} keeps a copy of the whole backbone on each device, which {how} is to "
            "avoid; leave one of the two out"
        )
    if not isinstance(task, AdaptedTask):
        raise ConfigurationError(f"{how} shards a backbone with adapters, and {task.label} is a learner; leave it out")
    if task.adapter.pending:
        raise ConfigurationError(
            f"{task.label} chooses what it trains by gradients of all weights, of which each device has a part with "
            f"{how}; leave that out"
        )
    if any(placement.add == HEAD for _, placement in task.adapter.placements):
        raise ConfigurationError(
            f"{task.label} asks in blocks whose own outputs have no gradient, so that {how} would not gather their "
            "weights again for the backward pass; use ddp"
        )
    if any(tower.layers_only is not None for tower in describe(task.model).towers.values()):
        raise ConfigurationError(
            f"{how} shares out sited blocks, and {task.label} acts on a model that has layer sites only; use ddp"
        )
    if getattr(task, "trunk", None) is not None:
        raise ConfigurationError(
            f"with {how} all devices compute the frozen blocks together, and cache lets each leave them out for images "
            "of its own; leave one of the two out"
        )
    if kind := next((type(tensor).__name__ for tensor in task.parameters() if is_quantised(tensor)), None):
        raise ConfigurationError(f"{how} cannot share out quantised weights ({kind}); use ddp, or do not quantise")


class EqualBatches(pl.Callback):
    """Processes with a smaller share of a measured split compute as many batches as the others, the last without data.

    The weights of a block are gathered from all processes, so all of them must compute it.
    """

    def __init__(self):
        self.own = self.missing = 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Agree on the number of batches."""
        self._agree(trainer, trainer.num_val_batches)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Agree on the number of batches."""
        self._agree(trainer, trainer.num_test_batches)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int, dataloader_idx=0) -> None:
        """Compute what is missing after the last batch, before metrics are put together."""
        self._make_up(trainer, pl_module, batch_idx)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int, dataloader_idx=0) -> None:
        """Compute what is missing after the last batch, before metrics are put together."""
        self._make_up(trainer, pl_module, batch_idx)

    def _agree(self, trainer: pl.Trainer, batches: list[int]) -> None:
        self.own = sum(batches)
        most = torch.tensor(self.own, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        self.missing = int(most) - self.own

    def _make_up(self, trainer: pl.Trainer, task: AdaptedTask, batch: int) -> None:
        for _ in range(self.missing if batch + 1 == self.own else 0):
            example = trainer.precision_plugin.convert_input(task.example().to(trainer.strategy.root_device))
            with trainer.precision_plugin.forward_context():
                task(example)
