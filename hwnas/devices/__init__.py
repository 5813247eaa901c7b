"""Devices: documents that describe them, ways to reach them, and profiling them into
latency tables.
"""

from hwnas.registry import Registry

CONNECTIONS = Registry(
    "connection",
    {
        "host": "hwnas.devices.host:Host",
        "ssh": "hwnas.devices.ssh:Ssh",
        "adb": "hwnas.devices.adb:Adb",
        "simulated": "hwnas.devices.simulated:Simulated",
    },
)
