"""What the training scripts in `examples/` share: data, batches, losses, optimiser, checkpoints."""
