"""Adapters in the formats of other libraries."""

from visionpeft.interoperability.peft_export import export_peft
from visionpeft.interoperability.peft_import import import_peft

__all__ = ["export_peft", "import_peft"]
