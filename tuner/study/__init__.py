"""A study: its record in the storage, its trials, and the processes that run them."""
