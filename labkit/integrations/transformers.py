"""What labkit has for Hugging Face's transformers.

    from labkit.integrations import transformers as lkt

`serve_experts` and `attach` let a model's experts live in a swarm, `from_pretrained` loads it without, `save_adapters`
saves what servers have learnt beside them, and `detach` brings them home; a callback shows what a Trainer does in a
swarm's dashboard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labkit.integrations.adapter_folders import save_adapters as save_adapters
from labkit.integrations.attaching import attach as attach
from labkit.integrations.attaching import detach as detach
from labkit.integrations.loading import from_pretrained as from_pretrained
from labkit.integrations.serving_experts import serve_experts as serve_experts

if TYPE_CHECKING:
    from labkit.integrations.trainer_callback import TransformersCallback as TransformersCallback


def __getattr__(name: str) -> Any:
    if name == "TransformersCallback":  # what it stands on takes seconds to import
        from labkit.integrations.trainer_callback import TransformersCallback

        return TransformersCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
