"""The core of hwnas, which does not need torch: ops, architectures, spaces, latency
tables, costs and objectives.
"""
