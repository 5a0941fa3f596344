"""A model's config by name: packaged, in a folder, or counted without weights where its shapes are not known here."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from rlvr_lightning.profiling.parameters import ARCHITECTURES, COUNTED, Parameter, named

SUFFIX = re.compile(r"-(instruct|base|chat|it|hf|v\d[\d.]*)\b.*$")
ALIASES = {"smollm2": "smollm2-135m", "meta-llama-3.1-8b": "llama-3.1-8b"}


def find_model(name: str) -> tuple[dict[str, Any], str]:
    """The config of a model, and a remark where it is not exactly that ('' otherwise).

    Args:
        name: `tiny`, a packaged name in any case, a hub name whose last part is one, or a folder with a `config.json`.

    Raises:
        ValueError: there is none; the message has near names.

    >>> find_model("Qwen/Qwen3-1.7B")[0]["hidden_size"], find_model("qwen3-1.7b")[1]
    (2048, '')
    """
    if name == "tiny":
        return json.loads((_tiny() / "config.json").read_text()), ""
    models = named()
    short = name.rpartition("/")[2].lower()
    for key in (short, ALIASES.get(short, ""), SUFFIX.sub("", short)):
        if key in models and not Path(name).is_dir():
            return models[key], ""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _of_folder(folder)
    near = difflib.get_close_matches(short, models, 3, 0.5) or difflib.get_close_matches(SUFFIX.sub("", short), models)
    hint = f"; near: {', '.join(near)}" if near else f"; one of {', '.join(models)}"
    raise ValueError(f"--model: no packaged model {name!r}, and no folder with a config.json{hint}")


def _tiny() -> Path:
    from rlvr_lightning.configuration import PACKAGED  # the package's own folder, also through the link

    return PACKAGED.parent / "assets" / "tiny"


def _of_folder(folder: Path) -> tuple[dict[str, Any], str]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        kind = (config.get("text_config") or config).get("model_type")
    except FileNotFoundError:
        raise ValueError(f"--model: {folder} has no config.json; give a folder written by save_pretrained") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"--model: {path} is not a JSON object: {error}") from None
    if kind in ARCHITECTURES:
        return config, ""
    return _count_module(folder, config, str(kind)), (
        f"{kind}: its shapes are not known here; counted on a module without weights, activations estimated as of Llama"
    )


def _count_module(folder: Path, config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The config with the parameters of its module: an import of torch and transformers, seconds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlvr_lightning.strategy import decoder_layers

    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        layers = decoder_layers(module)
    except (ValueError, KeyError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"--model: {folder} holds a {kind!r} model that cannot be built: {line}") from None
    inside: dict[int, str] = {}
    for number, layer in enumerate(layers):
        inside |= {id(p): f"layer {number}" for p in layer.parameters()}
    found = [Parameter(name, tuple(p.shape), inside.get(id(p), "rest"), 1) for name, p in module.named_parameters()]
    text = module.config.get_text_config().to_dict()
    return {**text, "model_type": kind, COUNTED: found}
