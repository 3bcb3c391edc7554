"""How torch's CPU threads wait for each other: imported before torch, by the scripts alone.

A thread of GNU OpenMP, which torch has on Linux, looks for milliseconds whether the others are there before it sleeps.
Beside one other busy program it so keeps the processor from the very thread that it waits for, and two threads do less
than one. GOMP_SPINCOUNT is how often it looks; 1000 is what the library takes itself where it knows of more threads
than processors. It reads the variable as torch is imported.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
