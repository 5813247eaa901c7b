"""Latency tables from other sources: imported from published files, fitted to measured
networks, and compared with ours.
"""
