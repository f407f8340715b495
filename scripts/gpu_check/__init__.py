"""What the GPU path does, in one call of at most ten minutes."""
