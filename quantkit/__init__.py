# SPDX-License-Identifier: Apache-2.0
"""quantkit: the most accurate quantized checkpoint that fits your card, with the measurements that prove it."""

__version__ = "0.1.0"
