"""`python -m bench`: every benchmark of this folder, one after the other."""

from bench import whole

if __name__ == "__main__":
    whole.main()
