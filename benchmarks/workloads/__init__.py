"""What is measured, one class a workload."""

from benchmarks.workloads.base import FULL, QUICK, Figure, Room, Scale, Workload
from benchmarks.workloads.capacity import Growth, Memory
from benchmarks.workloads.latency import Evict, Get, Insert, Memoize, Overwrite
from benchmarks.workloads.start import Start
from benchmarks.workloads.tails import Paced, Readers
from benchmarks.workloads.throughput import Expiry, Hot, Mix, Pressure

__all__ = ["FULL", "QUICK", "WORKLOADS", "Figure", "Room", "Scale", "Workload"]

WORKLOADS: dict[str, type[Workload]] = {
    workload.name: workload
    for workload in (
        *(Get, Overwrite, Insert, Evict, Memoize, Mix, Hot, Pressure, Expiry, Readers, Paced, Memory, Growth, Start),
    )
}
