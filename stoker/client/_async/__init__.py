"""The clients' source, for asyncio. `python -m tests.unasync` writes `stoker/client/_sync` from it (`make format`)."""
