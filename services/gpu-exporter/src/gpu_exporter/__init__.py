"""GPU exporter: NVIDIA GPUs as Prometheus metrics, truthful also when the driver is not."""

__version__ = "0.1.0"
