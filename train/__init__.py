"""The train room: data and a recipe in, a checkpoint out. Needs the `train` extra (torch)."""
