"""`python -m bench`: every benchmark of this folder, one after the other."""

import sys

from bench.runner import main

if __name__ == "__main__":
    sys.exit(main())
