"""`tuner doctor`: what a run needs, looked at before time is spent. Each check is a function that returns a `Check`.

check.py          what a check says, and how it is shown
examine.py        all of them, in the order in which they are to be read
quick.py          those that `launch`, `promote` and `train` begin with
installation.py   Python, packages, compilers, the clock
device.py         the device that a run would take
gpus.py           what holds the GPUs' memory at this moment
storage.py        the database, and the trials left open in it
data.py           the spec's files, the packed store, the loader
memory.py         batch sizes and snapshots against memory
attention.py      whether the flash kernel takes the model's shapes
disk.py           room for checkpoints
"""
