"""The gateway: keys, quotas, fair admission and an honest relay in front of vLLM."""

__version__ = "0.1.0"
