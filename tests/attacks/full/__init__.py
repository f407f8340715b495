"""The attacks in full, with their figures: `python -m tests.attacks.full --help`."""
