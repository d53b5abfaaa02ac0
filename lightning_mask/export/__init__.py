"""Export: what a pruned network becomes on disk, and the smaller network inside of it.

Needs torch and safetensors alone, but for what the extra ``lightning-mask[export]`` brings: torch-pruning to shrink networks,
and ONNX. Each function that writes checks what it wrote by loading it, and writes it whole or not at all.
"""

from lightning_mask.export.dense import save_dense
from lightning_mask.export.physical import load_physical, save_physical, shrink
from lightning_mask.export.program import Inputs, load_onnx, program, save_onnx, save_program
from lightning_mask.export.semi_structured import (
    layers_2to4,
    load_semi_structured,
    save_semi_structured,
    semi_structured,
)
from lightning_mask.export.sparse import load_sparse, save_sparse

__all__ = [
    "Inputs",
    "layers_2to4",
    "load_onnx",
    "load_physical",
    "load_semi_structured",
    "load_sparse",
    "program",
    "save_dense",
    "save_onnx",
    "save_physical",
    "save_program",
    "save_semi_structured",
    "save_sparse",
    "semi_structured",
    "shrink",
]
