"""Local mode: the same path as local processes, for machines without Docker."""
