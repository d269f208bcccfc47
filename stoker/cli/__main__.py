"""`python -m stoker.cli`: the command, where `stoker` is not on the path."""

from stoker.cli import main

main()
