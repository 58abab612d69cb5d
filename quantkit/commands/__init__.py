# SPDX-License-Identifier: Apache-2.0
"""What the commands do, a file each: from what was asked to what is left behind. `cli` only parses and prints."""
