"""Settings of all tests: no time limit on a single hypothesis example, since machines stall."""

from hypothesis import settings

settings.register_profile("nanor1", deadline=None)
settings.load_profile("nanor1")
