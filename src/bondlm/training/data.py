"""What the prompts of a run must be, beside each of them alone."""

from typing import Any

from bondlm.errors import ConfigError


def check_number(num_prompts: int, args: Any) -> None:
    """There must be enough prompts for one step.

    Raises:
        ConfigError: a run would end without one.
    """
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and num_prompts < batch:
        raise ConfigError(
            f"dataloader_drop_last=True leaves out the only batch: {num_prompts} prompts are fewer than the {batch} of "
            "one (per_device_train_batch_size on each process). Set it to False, or lower the batch size"
        )
