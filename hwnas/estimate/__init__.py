"""Estimates how long a run will take, by timing a few steps of each stage, for
``hwnas run CONFIG --plan``.
"""
