"""FSDP2 over all devices of a run, whatever their number."""

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy


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
