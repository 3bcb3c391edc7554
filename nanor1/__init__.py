"""nanor1: how language models are taught to reason. Start at train_zero.py."""
