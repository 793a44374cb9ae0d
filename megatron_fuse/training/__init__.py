"""The training loop around Megatron-core: schedule, batches, loss accounting, checkpoints and the log."""
