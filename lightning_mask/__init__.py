"""Fine-tune, prune and unfreeze a network by mask in PyTorch Lightning."""
