"""For all suites: no test depends on chance, on a noisy machine's clock, or on the day that ends just then."""

import datetime as dt
import os
import time

from hypothesis import HealthCheck, settings

LAST_SECONDS = 100  # of a day: what a test has spent of a quota would be gone before it looks

# The same examples in every run, none kept from another: what a new example finds is met by who looks for it
# (EXAMPLES=random, which `make test-long` sets), not by who changed something else.
settings.register_profile(
    "appliance",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=os.environ.get("EXAMPLES") != "random",
    database=None,
)
settings.load_profile("appliance")


def pytest_runtest_setup() -> None:
    """Days turn at midnight, UTC; no test begins so close to it that it would see both."""
    now = dt.datetime.now(dt.UTC)
    tomorrow = (now + dt.timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    left = (tomorrow - now).total_seconds()
    if left < LAST_SECONDS:
        time.sleep(left + 1)
