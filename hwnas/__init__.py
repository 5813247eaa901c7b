"""hwnas: a phone, a data set and a latency budget in; a trained network that meets the
budget out.
"""

__version__ = "0.1.0"
