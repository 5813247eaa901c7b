"""Networks to files that run on devices: TFLite in float32 and int8, ONNX; and the
bundle that carries them.
"""
