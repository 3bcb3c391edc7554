"""R1's stages besides reinforcement learning: fine-tuning, a reward model, rejection sampling, distillation."""
