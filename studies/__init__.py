"""Ready-made studies: each folder holds a workload and its study.toml."""
