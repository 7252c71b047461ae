"""For all suites: property tests do not judge by the clock of a noisy machine, and CI repeats the same examples."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "appliance", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("appliance")
