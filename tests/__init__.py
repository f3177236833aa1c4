"""The test suite: one thread in every process, set here because numpy and torch read it when they are imported.

Sums of several threads differ in their last bits, and the threads of two test processes get in each other's way.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
