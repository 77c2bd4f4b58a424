"""Libraries that compute what takes most of the time; `nova.tune` chooses among those installed."""

TORCH = "torch"  # and, where it has ops of its own for it, this package
