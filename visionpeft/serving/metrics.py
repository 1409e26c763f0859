"""What Prometheus is told."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from visionpeft.serving.service import Service

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one process that serves."""

    def __init__(self):
        self.registry = CollectorRegistry()
        of = {"registry": self.registry}
        self.requests = Counter("visionpeft_requests", "Requests answered", ("path", "code"), **of)
        self.seconds = Histogram(
            "visionpeft_request_seconds", "From a request to its answer", ("path",), buckets=SECONDS, **of
        )
        self.images = Histogram("visionpeft_batch_images", "Images in a batch", buckets=IMAGES, **of)
        self.batch_seconds = Histogram("visionpeft_batch_seconds", "Time of a batch", buckets=SECONDS, **of)

    def watch(self, service: "Service") -> None:
        """Tell of the queue and the adapters of a service, too, as they are when the metrics are read."""
        of = {"registry": self.registry}
        waiting = Gauge("visionpeft_waiting", "Images that wait for their batch", **of)
        waiting.set_function(service.batches.waiting)
        loaded = Gauge("visionpeft_adapters_loaded", "Adapters in memory", **of)
        loaded.set_function(service.number_loaded)
        held = Gauge("visionpeft_adapter_bytes", "Bytes of the adapters in memory", **of)
        held.set_function(service.bytes_loaded)

    def computed(self, images: int, seconds: float) -> None:
        """Count a batch."""
        self.images.observe(images)
        self.batch_seconds.observe(seconds)

    def answered(self, path: str, code: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(path, str(code)).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
