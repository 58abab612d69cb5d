# SPDX-License-Identifier: Apache-2.0
"""How quantized linears are stored: each format packs, unpacks, and describes itself, and knows no method and no file.

FORMATS["awq"].pack(quantized) -> {"qweight": ..., "qzeros": ..., "scales": ...}
"""

from quantkit.formats.awq import AWQ
from quantkit.formats.base import Format, TensorSpec
from quantkit.formats.compressed_tensors import COMPRESSED_TENSORS
from quantkit.formats.gguf import GGUF
from quantkit.formats.gptq import GPTQ, GPTQ_V2
from quantkit.formats.names import QuantizedLayer

FORMATS: dict[str, Format] = {item.name: item for item in (AWQ, GPTQ, GPTQ_V2, COMPRESSED_TENSORS, GGUF)}

__all__ = ["FORMATS", "Format", "QuantizedLayer", "TensorSpec"]
