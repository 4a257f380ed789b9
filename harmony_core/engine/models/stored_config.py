"""The config.json of a model that we write: what its base's says, in words that old and new readers understand.

transformers 5 keeps rotary settings in `rope_parameters`; what came before it reads `rope_theta`, `rope_scaling` and
`rope_local_base_freq`, and takes its defaults where they are missing, without a word. Both forms are written.
"""

from __future__ import annotations

from typing import Any

_LOCAL = "sliding_attention"
"""The layers of gemma3_text with a rotation of their own."""


def both_forms(stored: dict[str, Any], config: Any, dtype: str) -> dict[str, Any]:
    """`stored`, the content of a config.json, with type and rotary settings under their old and their new names.

    `config` is transformers' reading of it, which is what is computed; `dtype` a name such as "float32".
    """
    made = stored | {"dtype": dtype, "torch_dtype": dtype}
    rope = config.get_text_config().rope_parameters
    kinds = {kind: dict(values) for kind, values in rope.items() if isinstance(values, dict)}
    made["rope_parameters"] = kinds or dict(rope)
    main = kinds.get("full_attention", made["rope_parameters"])
    if "rope_parameters" in stored or "rope_theta" not in stored:
        scaling = {name: value for name, value in main.items() if name != "rope_theta"}
        made |= {"rope_theta": main["rope_theta"], "rope_scaling": scaling if main["rope_type"] != "default" else None}
        if _LOCAL in kinds:
            made["rope_local_base_freq"] = kinds[_LOCAL]["rope_theta"]
    return made
