"""What [NCD] prints, for orientation beside our numbers: top-1 accuracy in per cent, ResNets on photographs."""

from __future__ import annotations

TABLE_1 = {"ce": 72.1, "etf-dr": 72.1, "normface": 72.4, "ntce": 72.9, "nonl": 73.6, "scl": 73.9}
"""CIFAR-100; SCL is that with fixed prototypes, of Table 2."""
TABLE_2 = {"FP": 73.9, "LP": 73.9, "NLP": 73.6}
"""CIFAR-100."""
TABLE_3_METRICS = (
    "intra_erank",
    "inter_erank",
    "weights_erank",
    "weight_alignment",
    "instance_alignment",
    "mir",
    "hdr",
)
TABLE_3 = {
    "ce": (96.4, 57.1, 89.7, 0.83, 1.05, 0.97, 0.13),
    "etf-dr": (18.4, 94.8, 99.0, 0.59, 0.61, 1.00, 0.11),
    "normface": (13.6, 96.2, 96.1, 0.01, 0.06, 1.00, 0.30),
    "ntce": (12.6, 99.0, 98.9, 0.01, 0.05, 1.00, 0.30),
    "nonl": (11.4, 99.0, 99.0, 0.01, 0.06, 1.00, 0.30),
    "scl": (7.5, 66.7, 66.5, 0.00, 0.34, 0.87, 0.14),
}
"""CIFAR-100."""
TABLE_4 = {"ce": 67.0, "etf-dr": 54.6, "normface": 68.7, "ntce": 68.3, "nonl": 70.7}
"""Mean over eight data sets that ImageNet-1K features are transferred to."""
TABLE_5 = {"ce": 80.1, "etf-dr": 79.2, "normface": 77.8, "ntce": 77.6, "nonl": 77.8}
"""mCE on ImageNet-C, with AlexNet as the baseline."""
TABLE_6 = {
    "ce": {0.1: 55.5, 0.02: 41.5, 0.01: 37.4},
    "etf-dr": {0.1: 54.4, 0.02: 40.6, 0.01: 36.2},
    "normface": {0.1: 54.6, 0.02: 40.1, 0.01: 35.9},
    "ntce": {0.1: 56.8, 0.02: 43.7, 0.01: 39.0},
    "nonl": {0.1: 57.4, 0.02: 44.7, 0.01: 40.0},
}
"""CIFAR-100-LT, by imbalance."""
