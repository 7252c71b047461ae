"""AIPerf with the key of LOADTEST_KEY.

It takes a key as an argument alone, and arguments can be read by everybody on the machine. What is added to `sys.argv`
inside the process is not among them; its children get the key from AIPerf through their environment.
"""

import os
import sys

from aiperf.cli import app

if __name__ == "__main__":  # AIPerf's processes read this file, too
    sys.argv += ["--api-key", os.environ.pop("LOADTEST_KEY")]
    sys.exit(app())
