"""Find, verify and ship sparse trainable networks ("tickets") with TensorFlow and Keras."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from typing import Any

# In time for whoever imports TensorFlow after this: tfmot works with tf_keras only.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

_HOMES = {
    "DATASETS": "datasets",
    "Density": "callbacks",
    "GMP": "callbacks",
    "GraNet": "callbacks",
    "MODELS": "models",
    "SCOPES": "scopes",
    "Rewind": "callbacks",
    "RigL": "callbacks",
    "SET": "callbacks",
    "SCORERS": "scorers",
    "Spec": "spec",
    "Ticket": "tickets",
    "UserError": "errors",
    "get_mask": "pruning",
    "imp": "experiments",
    "load_ticket": "tickets",
    "one_shot": "experiments",
    "one_shot_mask": "scorers",
    "prunable": "pruning",
    "prune": "pruning",
    "score": "scorers",
    "set_mask": "pruning",
    "strip": "pruning",
}
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: TensorFlow takes seconds to load."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lth_tf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lth_tf.{_HOMES[name]}"), name)


class _Later:
    """Stands for `MaskedLayer` in tf_keras' registry: who reads a pruned model need import no more.

    On `sys.meta_path` it waits for tf_keras, and finds nothing itself.
    """

    @staticmethod
    def from_config(config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Returns a `MaskedLayer`."""
        masked = importlib.import_module("lth_tf.pruning").MaskedLayer
        return masked.from_config(config, custom_objects)

    @classmethod
    def register(cls) -> None:
        """Enters the name, unless the layer itself has done so."""
        objects = sys.modules["tf_keras"].saving.get_custom_objects()
        objects.setdefault("lth_tf>MaskedLayer", cls)

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        """Has whoever imports tf_keras register the layer, too."""
        if name != "tf_keras":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                if cls in sys.meta_path:
                    sys.meta_path.remove(cls)
                cls.register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "tf_keras" in sys.modules:
    _Later.register()
else:
    sys.meta_path.insert(0, _Later)  # type: ignore[arg-type]
