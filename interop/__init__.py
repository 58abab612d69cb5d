# SPDX-License-Identifier: Apache-2.0
"""Real clients against what quantkit writes; see RESULTS.md."""
