"""What Prometheus is told."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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

    def watch(self, waiting: Callable[[], int], loaded: Callable[[], int], held: Callable[[], int]) -> None:
        """Tell of the queue and the adapters, too, as they are when the metrics are read.

        Args:
            waiting: number of images that wait.
            loaded: number of adapters in memory.
            held: bytes of these.
        """
        gauges = {
            ("visionpeft_waiting", "Images that wait for their batch"): waiting,
            ("visionpeft_adapters_loaded", "Adapters in memory"): loaded,
            ("visionpeft_adapter_bytes", "Bytes of the adapters in memory"): held,
        }
        for (name, text), value in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)

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
