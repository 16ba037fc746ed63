"""Devices with their index. Use this before comparing two devices."""

import torch


def resolved(device: torch.device | str) -> torch.device:
    """`device` with its index: "cuda" becomes the current GPU, normally "cuda:0". Other devices are returned as they are."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
