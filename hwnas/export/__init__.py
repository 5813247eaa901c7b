"""Writing networks as files that run on devices: TFLite in float32 and int8, ONNX, and
the bundle that contains them.
"""
