# SPDX-License-Identifier: Apache-2.0
"""From a verified output folder to a repository on the Hugging Face hub: `push.push` is the way in."""
