"""The mathematics of hwnas, without torch: ops, architectures, spaces, tables, costs,
objectives.
"""
