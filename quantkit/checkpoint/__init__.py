# SPDX-License-Identifier: Apache-2.0
"""Models and outputs on disk: finding a model, reading it lazily, writing atomically, and resuming."""
