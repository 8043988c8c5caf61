"""Known accelerators by the names that CUDA gives them."""

import pytest
import torch

from blt.device_peak import device_peak_flops, published_device


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("h100", 989e12),
    ],
)
def test_known_devices(name: str, flops: float) -> None:
    device = published_device(name)
    assert device is not None
    assert device.bfloat16_flops == flops


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA A10", "Tesla V100", "NVIDIA RTX 4000", ""])
def test_other_devices_are_not_taken_for_them(name: str) -> None:
    assert published_device(name) is None


def test_the_speed_of_others_is_measured() -> None:
    assert device_peak_flops(torch.device("cpu"), torch.float32) > 1e8
