"""`python -m bench`: every benchmark of this folder, one after the other."""

import signal
import sys

from bench.runner import main

if __name__ == "__main__":
    # What it has started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
