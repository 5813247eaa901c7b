"""Hardware-aware NAS: from a phone, a data set and a latency budget to a trained
network that meets the budget.
"""

__version__ = "0.1.0"
