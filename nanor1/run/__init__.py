"""What keeps a run: its options, folder, checkpoints, machine, and files that are gone on with."""
