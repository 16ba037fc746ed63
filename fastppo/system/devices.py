"""Which device a name means. Every comparison of devices goes through here."""

import torch


def resolved(device: torch.device | str) -> torch.device:
    """`device` with its index: "cuda" is the current GPU, "cuda:0" unless somebody has chosen another; others as they are."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
