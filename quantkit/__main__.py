# SPDX-License-Identifier: Apache-2.0
"""`python -m quantkit`."""

from quantkit.cli import main

main()
