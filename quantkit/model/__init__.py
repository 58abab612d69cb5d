# SPDX-License-Identifier: Apache-2.0
"""The model as the pipeline sees it: which linears share an input, and one decoder layer at a time."""
