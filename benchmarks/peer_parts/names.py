"""Names of those who are compared."""

OURS, LIGHTLY, TORCHVISION = "fastclr", "lightly", "torchvision v2"
WEBDATASET, METRIC_LEARNING = "webdataset", "pytorch-metric-learning"
TORCH_OPTIMIZER, SGD = "torch-optimizer", "torch's SGD, foreach"
BOTH = f"{TORCHVISION} and {METRIC_LEARNING}"
