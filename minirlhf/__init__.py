"""minirlhf: a from-scratch, readable reference implementation of RLHF."""

import os

# On CPUs oneDNN keeps the compiled kernels of the last 1,024 shapes of matrices. Batches of many
# lengths have many shapes, and the cache grew by more than a gigabyte; 64 are as fast.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
