# SPDX-License-Identifier: Apache-2.0
"""Number grids: which values a quantized weight may take, how their parameters are found, and what the codes mean.

`base` says what a grid is, `registry` lists them; a file each holds how its parameters are searched.
"""
