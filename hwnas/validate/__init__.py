"""Validation: are the exported files as fast and as accurate as promised, on the device?

A prediction holds for the device as it was when it was profiled. Clocks, temperature
and neighbours change, so validation measures the network's own blocks again, in the
same rounds as the files: their sum, against the table's, is the *drift* of the device.
The prediction is judged at the profiled speed (measured time divided by the drift); the
plain measured time and the drift stand beside it. A drift above the tolerance is said,
one above ``validate.max_drift`` fails: that is not the device that was profiled. And a
table of another device never predicts anything here.

Outputs are compared on the device, too: each file gets the bundle's real images there,
and its outputs are held against PyTorch's. A file whose runtime the device lacks is
left out, and the verdict says so.

A prediction is of the network alone. Where a file holds more, a normalisation, a
softmax or a detector's decoding, the network is timed alone, too, in the same rounds,
and that time is the one that is held against the prediction (``network_ms``).

Detectors are judged by their AP (``detector``). Their ONNX files decode, or choose, in
the same graph, and so have no prediction, nor has a file with NMS: its measured time
stands beside that of the file without, and the time that NumPy takes for the same. How
long NMS takes depends on how many boxes it looks at: it is timed on a test image, at
the threshold of scores that AP needs and at an app's (``validate.app_score``).
"""
