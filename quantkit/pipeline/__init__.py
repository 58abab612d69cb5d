# SPDX-License-Identifier: Apache-2.0
"""The loop over the layers, and all that runs in it."""
