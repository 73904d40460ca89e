"""Training a pruned model on, without Lightning: frozen zeros, masked LoRA, distillation."""
