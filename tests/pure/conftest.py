"""Settings of the tests that need no ranks."""

from hypothesis import settings

# Continuous-integration machines are slow and shared; a time limit per example says nothing.
settings.register_profile("pure", deadline=None, print_blob=True)
settings.load_profile("pure")
