"""Property tests draw the same examples in every run; `--hypothesis-profile=default` looks for new ones."""

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")
