# Generated from stoker/client/_async/__init__.py by `make format`: edit that file.
"""The clients' source, for asyncio. `python -m tests.unasync` writes `stoker/client/_sync` from it (`make format`)."""
