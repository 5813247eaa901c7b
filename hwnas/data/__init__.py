"""Images and labels, by name, in three splits: ``train``, ``held_out`` (of the training images) and ``test``."""

from hwnas.registry import Registry

DATASETS = Registry(
    "data",
    {
        "digits": "hwnas.data.arrays:digits",
        "npz": "hwnas.data.arrays:npz",
        "cifar10": "hwnas.data.arrays:cifar10",
        "folder": "hwnas.data.folder:folder",
    },
)
