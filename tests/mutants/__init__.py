"""Mistakes that are planted one at a time, to see whether the tests that own the place notice (`make mutants`)."""
