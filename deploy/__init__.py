"""From one server to many: images, Helm chart, KServe, monitoring, balancing, capacity (docs/fleet.md)."""
