"""Property tests draw the same examples in every run; `--hypothesis-profile=default` looks for new ones."""

import gc

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")


def pytest_collection_finish() -> None:
    """What is imported stays: the collector, which capture keeps busy, needn't look at it again, nor as often as in a small process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
