"""Estimates how long a run will take, by timing a few steps of each stage; behind
``hwnas run CONFIG --plan``.
"""
