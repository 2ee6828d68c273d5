"""The text tower of a model that also sees pictures: which tensors it is, under which names.

Mistral3ForConditionalGeneration wraps a text model. Its parts have these names:

    transformers 4, mlx-lm  language_model.model.layers…  language_model.lm_head, vision_tower…
    transformers 5          model.language_model.layers…  lm_head, model.vision_tower…

The text tower is read as the model that it is, under that model's own names. What sees pictures is
left out.
"""

from __future__ import annotations

_PREFIXES = {  # the wrapper's → the text model's; the longer one of two comes first
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_VISION = ("vision_tower.", "multi_modal_projector.")
# In Mistral's own layout.
_NATIVE_VISION = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.")

VISION_LEFT_OUT = "also sees pictures; its vision tower is left out: text alone is read here"


def text_name(name: str) -> str:
    """Return what the text model itself calls a tensor or a module of the wrapper."""
    for prefix, own in _PREFIXES.items():
        if f"{name}.".startswith(prefix):
            return (own + f"{name}."[len(prefix) :]).removesuffix(".")
    return name


def is_vision(name: str) -> bool:
    """Whether a tensor belongs to what sees pictures: the vision tower, or what joins the two."""
    return name.removeprefix("model.").startswith(_VISION) or name.startswith(_NATIVE_VISION)
