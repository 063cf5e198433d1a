"""The code that the training scripts in `examples/` share: data, batches, losses, optimizers, checkpoints."""
