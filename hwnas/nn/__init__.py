"""Networks in torch: blocks from ops, stand-alone networks, the weight-shared
super-net, BN recalibration.
"""
