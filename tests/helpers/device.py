"""The device of the tests marked `gpu`: CUDA's, or what `MAIHT_TEST_DEVICE` names, with which they are rehearsed."""

import os

import torch

DEVICE = torch.device(os.environ.get("MAIHT_TEST_DEVICE", "cuda"))
THERE = DEVICE.type != "cuda" or torch.cuda.is_available()
MISSING = "no CUDA device"
