"""Other people's checkpoint formats: PEFT's AdaMSS and ordinary LoRA."""

from .contents import Contents, LayerContents, read_contents
from .files import PEFT_CONFIG_FILE, PEFT_TENSORS_FILE, read_peft_config
from .lora import export_lora
from .peft import export_peft, import_peft

__all__ = [
    "PEFT_CONFIG_FILE",
    "PEFT_TENSORS_FILE",
    "Contents",
    "LayerContents",
    "export_lora",
    "export_peft",
    "import_peft",
    "read_contents",
    "read_peft_config",
]
