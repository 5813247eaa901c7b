"""Networks in torch: blocks built from ops, standalone networks, the weight-sharing
super-net, BN recalibration.
"""
