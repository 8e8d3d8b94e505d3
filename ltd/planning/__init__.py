"""What steps amount to in operations and time, and what a device can do. Knows numbers, no model and no process."""

from ltd.planning.devices import Peak, find_peak, measure_peak
from ltd.planning.workload import Rates, Workload, rates

__all__ = ["Peak", "Rates", "Workload", "find_peak", "measure_peak", "rates"]
