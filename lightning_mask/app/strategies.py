"""DDP, and FSDP2 over all devices of a run, with a time after which a rank no longer waits for the others."""

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy


class DataParallel(DDPStrategy):
    """Lightning's DDPStrategy, with a time limit that a config can say.

    Args:
        timeout: Minutes that a rank waits for the others in a collective, and when a run begins, before it ends with an error.
        find_unused_parameters: As in DDPStrategy.
    """

    def __init__(self, timeout: float = 30.0, find_unused_parameters: bool = False) -> None:
        super().__init__(timeout=timedelta(minutes=timeout), find_unused_parameters=find_unused_parameters)


class FullyShard(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all devices in the data-parallel dimension: FSDP2 and nothing else.

    The module deals its parameters out in ``configure_model``, over ``self.device_mesh["data_parallel"]``.

    Args:
        save_distributed_checkpoint: Whether each rank writes its shards into a folder; False: one file with everything.
        timeout: Minutes that a collective may take.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, timeout: float = 30.0) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timedelta(minutes=timeout),
        )

    def setup_environment(self) -> None:
        """Count the devices, which are known only now."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
