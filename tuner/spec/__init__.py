"""The spec: study.toml read, checked, and turned into workloads and configurations."""
