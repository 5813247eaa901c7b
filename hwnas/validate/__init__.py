"""Validation: are the exported files as fast and as accurate on the device as expected?

A prediction holds for the device in the state in which it was profiled. Clocks,
temperature and other processes change, so validation measures the network's own blocks
again, in the same rounds as the files. The ratio of their sum to that in the table is
the *drift* of the device. The prediction is checked at the profiled speed (measured
time divided by the drift); the plain measured time and the drift are reported next to
it. A drift above the tolerance is reported. A drift above ``validate.max_drift`` fails,
because this is no longer the device that was profiled. A table of another device never
predicts anything here.

Outputs are also compared on the device: each file runs there on the bundle's real
images, and its outputs are compared with PyTorch's. A file whose runtime the device
lacks is left out, and the verdict lists it.

A prediction covers the network only. If a file contains more (a normalisation, a
softmax or a detector's decoding), the network is also timed by itself, in the same
rounds, and that time is compared with the prediction (``network_ms``).

Detectors are evaluated by their AP. Their ONNX files decode boxes, or run NMS, in the
same graph and so have no prediction, nor does any file with NMS. Its measured time is
reported next to that of the file without NMS and to the time that NumPy takes for the
same work. The time of NMS depends on the number of boxes: it is measured on a test
image, at the score threshold of AP and at that of an app (``validate.app_score``).
"""
