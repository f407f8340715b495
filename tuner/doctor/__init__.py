"""`tuner doctor`: checks before a run. Each check is a function that returns a `Check`."""
