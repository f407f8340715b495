"""Data on its way to the device: batches by length, the loader, and the packed store."""
