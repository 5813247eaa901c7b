"""How long a run will take, from timing a few steps of each stage: what ``hwnas run
CONFIG --plan`` says.
"""
