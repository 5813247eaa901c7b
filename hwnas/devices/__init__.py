"""Devices: the documents that describe them, the connections to them, and the
measurements that fill latency tables.
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
