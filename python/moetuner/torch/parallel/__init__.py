"""Expert parallelism over torch.distributed."""
