# SPDX-License-Identifier: Apache-2.0
"""Bits under a budget: which scheme each part of a model gets, so that all fits and the expected KL is least.

A *part* is a site of a decoder layer: linears that read the same input and have one scheme. What it may become is an
*entry* of the menu: a scheme, or 16 bit.

    1. measure   one pass over the model: the loss of every part at every entry of the menu, and the KL of swapping
                 each part alone to one entry (`sensitivity`). KL(part, entry) = KL(swap) x loss(entry) / loss(swap):
                 for small errors the KL is quadratic in them, and so is the loss (`table`).
    2. solve     the entries of least summed KL within the bytes, exactly (`knapsack`).
    3. check     a second pass with all the chosen roundings in place, as a run makes them: the true KL, and what it
                 falls by when one part goes back to 16 bit. These correct the table, and it is solved again; a third
                 pass measures a choice that came out of that, and the better of the two is kept.

Bytes are those of `plan` and `fit`: the recipe is planned as a run plans it (`problem`). The windows that measure KL
are taken from the end of the calibration tokens and do not calibrate.

    problem.py     parts, bytes, what fits, what would            menu.py         entries; which an engine runs
    table.py       KL by part and entry; solving                  sensitivity.py  the pass over the model
    table_file.py  measurements kept for other budgets            knapsack.py     the solver
    recipe_file.py the recipe and its reasons

`commands.allocate` goes through the three steps, and runs what they choose.
"""
