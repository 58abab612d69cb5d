# SPDX-License-Identifier: Apache-2.0
"""Self-contained pages that open offline: of a run, of what `fit` counts, of a sweep. Pure functions of documents."""
